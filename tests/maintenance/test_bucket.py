"""Sessions in an object store: others fetch what was published, to the bit, and no more than they need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from command_line import Cli

from infllm_agent import AgentRuntime
from infllm_agent.blocks.remote import Origin, open_bucket
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import (
    BucketError,
    ConfigError,
    CorruptSession,
    Diverged,
    SessionLocked,
    StorageError,
    UnknownSession,
)
from infllm_agent.integrations.server.errors import error_of
from infllm_agent.maintenance.archive import export_session, import_session
from infllm_agent.maintenance.bucket import Bucket
from infllm_agent.maintenance.check import check
from infllm_agent.messages import Turn
from infllm_agent.model.local_model import LocalModel
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.session_pool import SessionPool
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.session_store import SessionStore

SMALL = MemoryConfig(n_init=4, n_local=32, block_size=8, topk=4, candidates=8, chunk_size=32, max_cached_block=8)
LOG = "error 404 at 12:30, retry in 5 s; the tool printed a line of its log\n"


@pytest.fixture(autouse=True)
def _(one_thread: None) -> None:
    pass


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/bucket"
        return
    yield f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


def machine(root: Path, model: LocalModel, url: str | None) -> AgentRuntime:
    return AgentRuntime(root, model, SMALL, bucket=url)


def talk(runtime: AgentRuntime, lines: int, name: str = "ops") -> None:
    session = runtime.session(name)
    for number in range(lines):
        session.append_tool_result("shell", f"{number}: {LOG}")
    session.commit()


def answer(runtime: AgentRuntime, name: str = "ops") -> tuple[str, torch.Tensor]:
    """What a session answers, and the logits that follow."""
    session = runtime.session(name)
    session.append_user("What was the error?")
    text = session.reply(max_tokens=12).text
    session.commit()
    with torch.inference_mode():
        return text, runtime.model.forward([7, 8, 9], session.memory.fork())


class Counting:
    """Bytes that come out of a bucket."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fs, _ = open_bucket(url)
        self.bytes, self.ranges = 0, 0
        cat_ranges, cat_file = fs.cat_ranges, fs.cat_file

        def ranges(paths: list[str], starts: list[int], ends: list[int], **options: Any) -> list[bytes]:
            found: list[bytes] = cat_ranges(paths, starts, ends, **options)
            self.bytes += sum(map(len, found))
            self.ranges += len(found)
            return found

        def file(path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
            data: bytes = cat_file(path, start, end, **options)
            if start is None:
                self.bytes += len(data)
            return data

        monkeypatch.setattr(fs, "cat_ranges", ranges)
        monkeypatch.setattr(fs, "cat_file", file)


def stored_bytes(root: Path, name: str = "ops") -> int:
    catalog = Catalog(root)
    return sum(path.stat().st_size for path in catalog.folder(catalog.require(name)).iterdir())


@pytest.mark.parametrize("block_dtype", ["model", "int8"])
def test_it_goes_on_elsewhere_to_the_bit(
    block_dtype: str, url: str, tmp_path: Path, tiny_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMALL.changed(block_dtype=block_dtype)
    with AgentRuntime(tmp_path / "a", tiny_model, config, bucket=url) as a:
        talk(a, 80)
        a.release("ops")
        shutil.copytree(tmp_path / "a", tmp_path / "stayed")
    with AgentRuntime(tmp_path / "stayed", tiny_model, config) as stayed:
        expected = answer(stayed)
    counting = Counting(url, monkeypatch)
    with AgentRuntime(tmp_path / "b", tiny_model, config, bucket=url) as b:
        text, logits = answer(b)
        assert b.session("ops").memory.store.count > 200
    assert text == expected[0]
    assert torch.equal(logits, expected[1])
    size = stored_bytes(tmp_path / "b")
    assert 0 < counting.bytes < 0.6 * size
    assert counting.ranges > 0
    with AgentRuntime(tmp_path / "a", tiny_model, config, bucket=url) as a:  # and back: what was said there is here
        assert a.session("ops").messages(-1)[0].text == text


def test_what_was_fetched_is_not_fetched_again(
    url: str, tmp_path: Path, tiny_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 60)
    with machine(tmp_path / "b", tiny_model, url) as b:
        answer(b)
    with machine(tmp_path / "a", tiny_model, url) as a:  # which is behind, and has all blocks but the new ones
        counting = Counting(url, monkeypatch)
        answer(a)
        blocks = a.session("ops").memory.store
        assert counting.ranges < 2 * blocks.shape.planes * 4
    assert all(one.ok for one in check(tmp_path / "a"))
    found = list(check(tmp_path / "b"))  # reads everything: what was never fetched comes now
    assert all(one.ok for one in found), found
    counting.ranges = 0
    assert all(one.ok for one in check(tmp_path / "b"))
    assert counting.ranges == 0


def test_only_what_is_new_is_uploaded(url: str, tmp_path: Path, tiny_model: LocalModel) -> None:
    bucket = Bucket(url)
    with machine(tmp_path, tiny_model, None) as runtime:
        talk(runtime, 120)
        first = bucket.publish(tmp_path, "ops")
        again = bucket.publish(tmp_path, "ops")
        blocks = runtime.session("ops").memory.store.count
        talk(runtime, 3)
        more = runtime.session("ops").memory.store.count - blocks
        second = bucket.publish(tmp_path, "ops")
        shape = runtime.session("ops").memory.store.shape
    assert again == (0, 0)
    least = blocks * (shape.stride + shape.layers * shape.key_bytes)
    rest = first.bytes - least  # database, tail, manifest
    assert 0 < rest < 2_000_000
    assert abs(second.bytes - rest - more * (shape.stride + shape.layers * shape.key_bytes)) < 0.2 * rest + 100_000
    with machine(tmp_path / "b", tiny_model, url) as b:
        assert b.session("ops").message_count == 123


def test_of_two_that_go_on_one_is_refused(url: str, tmp_path: Path, tiny_model: LocalModel) -> None:
    with machine(tmp_path / "a", tiny_model, url) as a, machine(tmp_path / "b", tiny_model, url) as b:
        talk(a, 20)
        a.release("ops")
        talk(b, 2)  # fetched, and published again
        b.release("ops")
        session = a.session("ops")
        assert session.message_count == 22
        session.append_user("from a")
        talk(b, 1)
        with pytest.raises(Diverged, match="another machine has published it since"):
            session.commit()
        assert session.messages(-1)[0].text == "from a"  # nothing is lost
        a.drop("ops")
        with pytest.raises(Diverged):
            a.session("ops")
        b.release("ops")
        Catalog(tmp_path / "a").delete("ops")
        assert a.session("ops").message_count == 23


def test_two_that_publish_at_once(
    url: str, tmp_path: Path, tiny_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds its manifest's place taken, though it looked before."""
    bucket = Bucket(url)
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 20)
    with machine(tmp_path / "b", tiny_model, url) as b:
        b.session("ops")
    for name in ("a", "b"):
        with machine(tmp_path / name, tiny_model, None) as runtime:
            talk(runtime, 1)
    last = bucket.last("ops")
    bucket.publish(tmp_path / "a", "ops")
    numbers = list(bucket._numbers(Bucket._session("ops")))
    monkeypatch.setattr(bucket, "last", lambda name: last)
    monkeypatch.setattr(bucket, "_numbers", lambda session: [n for n in numbers if last is None or n <= last.number])
    with pytest.raises(Diverged):
        bucket.publish(tmp_path / "b", "ops")


class Failing:
    """A bucket whose n-th write fails, or is cut off half-way."""

    def __init__(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, at: int, *, torn: bool) -> None:
        self.writes = 0
        write = bucket._write

        def failing(path: str, data: bytes, *, create: bool = False) -> None:
            self.writes += 1
            if self.writes == at:
                if torn:
                    write(path, data[: len(data) // 2], create=create)
                raise StorageError("the network is down")
            write(path, data, create=create)

        monkeypatch.setattr(bucket, "_write", failing)


@pytest.mark.parametrize("torn", [False, True])
def test_an_upload_that_fails_anywhere_changes_nothing(
    torn: bool, url: str, tmp_path: Path, tiny_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 40)
    with machine(tmp_path / "a", tiny_model, None) as a:
        talk(a, 5)
    points = 0
    while True:
        bucket = Bucket(url)
        failing = Failing(bucket, monkeypatch, points + 1, torn=torn)
        try:
            bucket.publish(tmp_path / "a", "ops")
        except StorageError:
            points += 1
            assert failing.writes == points
            other = tmp_path / f"b{points}"
            assert bucket.pull(other, "ops")
            with SessionStore.open(other, "ops") as store:
                assert store.message_count == 40
            assert all(one.ok for one in check(other))
            continue
        break
    assert points == 5  # a full segment, the next one, database, tail, manifest
    assert bucket.pull(tmp_path / "c", "ops")
    with SessionStore.open(tmp_path / "c", "ops") as store:
        assert store.message_count == 45
    assert all(one.ok for one in check(tmp_path / "c"))


def test_a_process_that_ends_just_after_publishing(url: str, tmp_path: Path, tiny_model: LocalModel) -> None:
    """Its folder does not know yet that it has published; it recognises its own commit."""
    with machine(tmp_path, tiny_model, url) as runtime:
        talk(runtime, 20)
    catalog = Catalog(tmp_path)
    folder = catalog.folder(catalog.require("ops"))
    now = Origin.of(folder)
    assert now is not None
    assert now.base is not None
    Origin(url, None, 0, (now.base,)).write(folder)
    with machine(tmp_path, tiny_model, url) as runtime:
        talk(runtime, 1)
    assert Bucket(url).pull(tmp_path / "b", "ops")
    with SessionStore.open(tmp_path / "b", "ops") as store:
        assert store.message_count == 21


def objects(url: str, kind: str) -> list[str]:
    fs, path = open_bucket(url)
    return [name for name in fs.find(path) if kind in name]


@pytest.mark.parametrize("kind", [".db", ".tail", "segments"])
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_what_is_damaged_is_refused(kind: str, how: str, url: str, tmp_path: Path, tiny_model: LocalModel) -> None:
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 60)
    fs, _ = open_bucket(url)
    for name in objects(url, kind):
        if how == "gone":
            fs.rm(name)
        else:
            data = bytearray(fs.cat_file(name))
            for place in range(100, len(data), 512):
                data[place] ^= 1
            fs.pipe_file(name, bytes(data))
    with machine(tmp_path / "b", tiny_model, url) as b:
        with pytest.raises(CorruptSession):
            answer(b)
        assert not Catalog(tmp_path / "b").problems()


def test_a_bucket_that_cannot_be_reached(
    url: str, tmp_path: Path, tiny_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 60)
    fs, _ = open_bucket(url)
    with machine(tmp_path / "b", tiny_model, url) as b:
        session = b.session("ops")
        session.append_user("What was the error?")
        with monkeypatch.context() as patched:

            def down(*arguments: Any, **options: Any) -> None:
                raise ConnectionError("connection refused")

            patched.setattr(fs, "cat_ranges", down)
            with pytest.raises(BucketError, match=r"bucket .*connection refused"):
                session.reply(max_tokens=4)
        assert session.reply(max_tokens=4).usage.output_tokens == 4  # and when it is back, it goes on


def test_forks_share_blocks_and_survive_their_source(url: str, tmp_path: Path, tiny_model: LocalModel) -> None:
    bucket = Bucket(url)
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 150)
    with machine(tmp_path / "b", tiny_model, url) as b:
        b.session("ops")
        before = len(objects(url, "segments"))
        b.fork("ops", "copy")
        talk(b, 1, "copy")
        assert len(objects(url, "segments")) - before == 1  # of the copied last segment alone
        expected = answer(b, "copy")[0]
        assert bucket.names() == ["copy", "ops"]
        b.delete("ops")
        assert bucket.names() == ["copy"]
    with machine(tmp_path / "c", tiny_model, url) as c:
        assert c.session("copy").messages(-1)[0].text == expected
        answer(c, "copy")
        c.delete("copy")
    assert bucket.names() == []
    assert objects(url, "segments") == []


def test_export_of_what_was_fetched_is_whole(url: str, tmp_path: Path, tiny_model: LocalModel) -> None:
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 60)
    Bucket(url).pull(tmp_path / "b", "ops")
    export_session(tmp_path / "b", "ops", tmp_path / "ops.tar")
    import_session(tmp_path / "c", tmp_path / "ops.tar")
    fs, path = open_bucket(url)
    fs.rm(path, recursive=True)
    assert all(one.ok for one in check(tmp_path / "c"))


def test_it_is_not_fetched_while_it_is_open(url: str, tmp_path: Path, tiny_model: LocalModel) -> None:
    bucket = Bucket(url)
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 10)
    bucket.pull(tmp_path / "b", "ops")
    with machine(tmp_path / "a", tiny_model, url) as a:
        talk(a, 1)
    with closing(SessionStore.open(tmp_path / "b", "ops")), pytest.raises(SessionLocked):
        bucket.pull(tmp_path / "b", "ops")
    assert bucket.pull(tmp_path / "b", "ops")
    assert not bucket.pull(tmp_path / "b", "ops")


def test_names_and_urls(tmp_path: Path, tiny_model: LocalModel) -> None:
    bucket = Bucket(f"file://{tmp_path}/bucket")
    assert bucket.names() == []
    assert bucket.last("ops") is None
    assert not bucket.pull(tmp_path, "ops")
    with pytest.raises(UnknownSession):
        bucket.publish(tmp_path, "ops")
    with pytest.raises(UnknownSession, match="not in the bucket"):
        bucket.delete("ops")
    long = "X" + "x.-_:9" * 20
    with machine(tmp_path / "a", tiny_model, bucket.url) as a:
        talk(a, 2, long)
    assert bucket.names() == [long]
    with pytest.raises(ConfigError, match="bucket nothing://here"):
        Bucket("nothing://here")


class Machine:
    """A server's pool on a machine of its own."""

    def __init__(self, root: Path, model: LocalModel, url: str) -> None:
        self.runtime = machine(root, model, url)
        self.pool = SessionPool(self.runtime)

    def append(self, text: str) -> None:
        with self.pool.by_name("ops", Cancellation()) as session:
            session.append_user(text)
            session.commit()

    def turn(self, texts: list[str]) -> tuple[str, int]:
        """As a client that sends all messages each time; the session, and how many messages were new to it."""
        turns = [Turn("user", text) for text in texts]
        with self.pool.by_history("ops", turns, Cancellation()) as session:
            known = session.message_count
            for turn in turns[known:]:
                session.append_user(turn.text)
            session.commit()
            return session.name, len(turns) - known


def test_requests_that_go_to_one_machine_and_another(url: str, tmp_path: Path, tiny_model: LocalModel) -> None:
    machines = [Machine(tmp_path / name, tiny_model, url) for name in ("a", "b")]
    for number in range(5):
        machines[number % 2].append(f"line {number}")
    texts = [f"line {number}" for number in range(5)]
    assert [m.text for m in machines[0].runtime.session("ops").messages()] == texts
    for number in range(5, 9):
        texts.append(f"line {number}")
        assert machines[number % 2].turn(texts) == ("ops", 1)
    name, _ = machines[0].turn([*texts[:4], "another way"])  # a branch
    assert name != "ops"
    other, _ = machines[1].turn([*texts[:4], "a third way"])  # whose name is taken, though it is not here
    assert other not in ("ops", name)
    assert Bucket(url).names() == sorted(["ops", name, other])
    for one in machines:
        one.pool.close(Cancellation())
        one.runtime.close()


def test_the_commands(cli: Cli, tmp_path: Path, tiny_model: LocalModel) -> None:
    url = f"file://{tmp_path}/bucket"
    with machine(tmp_path / "a", tiny_model, None) as a:
        talk(a, 20)
    done = cli("sessions", "publish", "ops", "--bucket", url, "--root", str(tmp_path / "a"))
    assert (done.code, "objects" in done.out) == (0, True)
    assert "published already" in cli("sessions", "publish", "ops", "--bucket", url, "--root", str(tmp_path / "a")).out
    assert "fetched" in cli("sessions", "pull", "ops", "--bucket", url, "--root", str(tmp_path / "b")).out
    again = cli("sessions", "pull", "ops", "--bucket", url, "--root", str(tmp_path / "b"), "--json")
    assert again.json == {"session": "ops", "fetched": False}
    assert 'session "web" is not in the bucket' in cli("sessions", "pull", "web", "--bucket", url).error
    assert "bucket nothing://x" in cli("sessions", "publish", "ops", "--bucket", "nothing://x").error
    assert "bucket nothing://x" in cli("serve", "--bucket", "nothing://x", "--port", "0").error


@pytest.mark.parametrize(("error", "status"), [(BucketError("bucket s3://ours: gone"), 503), (Diverged("x"), 409)])
def test_what_a_servers_client_is_told(error: Exception, status: int) -> None:
    told = error_of(error)
    assert told.status_code == status
    assert "s3://ours" not in str(told.detail)
