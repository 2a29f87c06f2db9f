"""Machines that work on one session in a bucket at the wrong moment: nothing acknowledged is lost, no logit is another.

The store of these tests tells of each request before and after it is done, so that a test can act in between.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor

from infllm_agent import AgentRuntime, MemoryConfig, Session
from infllm_agent.blocks.remote import open_bucket
from infllm_agent.errors import CorruptSession, Diverged, SessionExists, StorageError
from infllm_agent.maintenance.bucket import Bucket
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.session_store import SessionStore

SMALL = MemoryConfig(n_init=4, n_local=32, block_size=8, topk=4, candidates=8, chunk_size=32, max_cached_block=8)
LINE = "error 404 at 12:30, retry in 5 s; the tool printed a line of its log\n"
PROBE = [5, 6, 7, 8]


class Killed(BaseException):
    """The process ends here."""


class Watched(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory, and somebody who is told of every request."""

    protocol = "watched"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    told: ClassVar[Callable[[str, str, str], None] | None] = None

    def _tell(self, what: str, path: str, act: Callable[[], Any]) -> Any:
        if Watched.told is not None:
            Watched.told("before", what, path)
        result = act()
        if Watched.told is not None:
            Watched.told("after", what, path)
        return result

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._tell("write", path, lambda: MemoryFileSystem.pipe_file(self, path, value, mode))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        found: bytes = self._tell("read", path, lambda: MemoryFileSystem.cat_file(self, path, start, end))
        return found


fsspec.register_implementation("watched", Watched)


@pytest.fixture(autouse=True)
def _(one_thread: None) -> Iterator[None]:
    yield
    Watched.told = None
    Watched.store.clear()


@pytest.fixture
def url() -> str:
    return f"watched://{uuid.uuid4().hex}"


Machines = Callable[[], AgentRuntime]


@pytest.fixture
def machine(tiny_model: LocalModel, tmp_path: Path, url: str) -> Iterator[Machines]:
    """Each with an empty disk of its own."""
    made: list[AgentRuntime] = []

    def machine() -> AgentRuntime:
        made.append(AgentRuntime(tmp_path / f"root-{len(made)}", tiny_model, SMALL, bucket=url))
        return made[-1]

    yield machine
    Watched.told = None
    for runtime in made:
        for name in list(runtime._sessions):
            runtime.drop(name)
        runtime.close()


def turn(session: Session, number: int, lines: int = 4) -> None:
    session.append_user(f"{number}: {LINE * lines}")
    session.reply(max_tokens=4)
    session.commit()


def next_logits(session: Session) -> Tensor:
    """After what the session holds; it is as it was afterwards."""
    memory = session.memory.fork(session.memory.length)
    rows = [session.model.forward([*session.working.pending, PROBE[0]], memory)]
    return torch.stack([*rows, *(session.model.forward([token], memory) for token in PROBE[1:])])


def once(when: str, what: str, part: str, act: Callable[[], None]) -> None:
    """Do it the first time that such a request is made."""

    def told(now: str, request: str, path: str) -> None:
        if (now, request) == (when, what) and part in path:
            Watched.told = None
            act()

    Watched.told = told


def test_what_was_never_committed_is_not_taken_for_what_was(machine: Machines) -> None:
    """A machine wrote blocks and ended before its commit. Another has published other blocks in their place."""
    home, away = machine(), machine()
    turn(home.session("ops"), 0)
    there = away.session("ops")
    there.append_user("something else entirely, " * 40)
    there.memory.store.write()
    assert there.memory.store.files.count > there.store.committed.blocks
    away.drop("ops")
    turn(home.session("ops"), 1)
    taken, ours = away.session("ops").memory.store.files, home.session("ops").memory.store.files
    assert taken.count == ours.count
    shape = home.session("ops").memory.store.shape
    for plane in range(shape.planes):
        found, expected = (torch.zeros((ours.count, shape.plane_bytes(plane)), dtype=torch.uint8) for _ in range(2))
        taken.read(range(ours.count), plane, found.numpy())
        ours.read(range(ours.count), plane, expected.numpy())
        assert torch.equal(found, expected)
    assert torch.equal(next_logits(away.session("ops")), next_logits(home.session("ops")))


def test_a_slow_machine_removes_nothing_of_who_goes_on_from_it(machine: Machines, url: str) -> None:
    """Its manifest is written, what it replaces is not removed yet: then another continues."""
    home, away = machine(), machine()
    turn(home.session("ops"), 0)
    once("after", "write", "000000000002.json", lambda: turn(away.session("ops"), 2))
    turn(home.session("ops"), 1)
    last = Bucket(url).last("ops")
    assert last is not None
    assert last.generation == away.session("ops").store.generation == 3
    third = machine().session("ops")
    assert [m.text for m in third.messages()] == [m.text for m in away.session("ops").messages()]
    assert torch.equal(next_logits(third), next_logits(away.session("ops")))
    turn(third, 3)
    home.refresh("ops")
    assert home.session("ops").message_count == 8


def test_a_slow_machine_removes_nothing_that_another_is_uploading(machine: Machines) -> None:
    home, away = machine(), machine()
    turn(home.session("ops"), 0)

    def uploads_meanwhile() -> None:
        # ``home`` has published its second commit; ``away`` takes it, and is at its own manifest when home goes on.
        taken = away.session("ops")
        once("before", "write", "000000000003.json", lambda: resumed.append(True))
        turn(taken, 2)

    resumed: list[bool] = []
    once("after", "write", "000000000002.json", uploads_meanwhile)
    turn(home.session("ops"), 1)
    assert resumed
    assert machine().session("ops").message_count == 6


def test_a_race_has_one_winner_that_is_whole(machine: Machines) -> None:
    home, away = machine(), machine()
    turn(home.session("ops"), 0)
    mine, yours = home.session("ops"), away.session("ops")
    once("before", "write", "000000000002.json", lambda: turn(yours, 2))
    with pytest.raises(Diverged):
        turn(mine, 1)
    turn(yours, 3)
    assert torch.equal(next_logits(machine().session("ops")), next_logits(yours))
    assert mine.message_count == 4


def test_a_session_is_replaced_while_it_is_taken(machine: Machines) -> None:
    home = machine()
    session = home.session("ops")
    turn(session, 0)
    once("before", "read", ".db", lambda: [turn(session, number) for number in (1, 2, 3)] and None)  # type: ignore[arg-type]
    taken = machine().session("ops")
    assert taken.message_count == session.message_count == 8
    assert torch.equal(next_logits(taken), next_logits(session))


@pytest.mark.parametrize("lines", [4, 200])
def test_a_deleted_session_does_not_come_back_in_pieces(machine: Machines, url: str, lines: int) -> None:
    """Another machine has it open, with blocks that it never fetched."""
    home, away = machine(), machine()
    turn(home.session("ops"), 0, lines)
    there = away.session("ops")
    home.delete("ops")
    with pytest.raises((Diverged, StorageError, CorruptSession)):
        turn(there, 1)
    assert Bucket(url).last("ops") is None
    assert Bucket(url).names() == []


def test_a_name_that_was_deleted_can_be_given_again(machine: Machines) -> None:
    home, away = machine(), machine()
    turn(home.session("ops"), 0)
    away.session("ops")
    away.release("ops")
    home.delete("ops")
    turn(home.session("ops"), 1)
    away.refresh("ops")
    assert [m.text for m in away.session("ops").messages()] == [m.text for m in home.session("ops").messages()]


def test_a_fork_does_not_take_a_name_from_another_machine(machine: Machines) -> None:
    home, away = machine(), machine()
    turn(home.session("ops"), 0)
    turn(home.session("copy"), 1)
    away.session("ops")
    with pytest.raises(SessionExists):
        away.fork("ops", "copy")


def test_the_damaged_object_is_named(machine: Machines, url: str) -> None:
    turn(machine().session("ops"), 0, 20)
    files = machine().session("ops").memory.store.files
    fs, path = open_bucket(url)
    (name,) = (name for name in fs.find(path) if "/segments/" in name)
    whole = fs.cat_file(name)
    for bad in (whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:], whole[: len(whole) // 2]):
        fs.pipe_file(name, bad)
        with pytest.raises(CorruptSession, match=name.rpartition("/")[2]):
            files.record(files.count - 1)
    fs.pipe_file(name, whole)
    files.record(files.count - 1)


def test_of_a_request_that_was_sent_twice_the_first_counts(machine: Machines, url: str) -> None:
    """A client that had no answer asks again to make the manifest, and is told that it is there."""
    home = machine()
    session = home.session("ops")
    turn(session, 0)

    def exists() -> None:
        raise FileExistsError

    once("after", "write", "000000000002.json", exists)
    turn(session, 1)
    last = Bucket(url).last("ops")
    assert last is not None
    assert last.generation == 2
    turn(session, 2)


@pytest.mark.parametrize("kind", [".db", ".tail", "segments/", ".json"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publication_that_is_killed_leaves_a_whole_commit(
    machine: Machines, url: str, tmp_path: Path, kind: str, when: str
) -> None:
    home = machine()
    turn(home.session("ops"), 0)
    expected = [next_logits(home.session("ops"))]

    def kill() -> None:
        raise Killed

    once(when, "write", kind, kill)
    with pytest.raises(Killed):
        turn(home.session("ops"), 1)
    expected.append(next_logits(home.session("ops")))
    home.drop("ops")
    there = machine().session("ops")
    assert torch.equal(next_logits(there), expected[there.store.generation - 1])
    assert there.store.generation == (2 if (kind, when) == (".json", "after") else 1)
    session = home.session("ops")  # as it was committed here
    assert torch.equal(next_logits(session), expected[1])
    session.commit()
    turn(session, 2)
    assert torch.equal(next_logits(machine().session("ops")), next_logits(session))
    fs, path = open_bucket(url)
    last = Bucket(url).last("ops")
    assert last is not None
    named = {f"/segments/{id}/{first}-{stop}-{own}" for id, ps in last.parts.items() for first, stop, own in ps}
    found = {name[name.index("/segments/") :] for name in fs.find(path) if "/segments/" in name}
    assert found == named  # of the killed one, nothing stays


def test_nothing_stays_of_a_session_that_was_rebuilt(machine: Machines, url: str) -> None:
    home = machine()
    turn(home.session("ops"), 0, 20)
    home.release("ops")
    home.rebuild("ops")
    turn(home.session("ops"), 1)
    assert torch.equal(next_logits(machine().session("ops")), next_logits(home.session("ops")))
    home.delete("ops")
    fs, path = open_bucket(url)
    assert [name for name in fs.find(path) if "/segments/" in name] == []


def test_what_is_committed_while_it_is_pulled_is_kept(
    machine: Machines, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the local folder and its replacement, another process commits to it."""
    home, away = machine(), machine()
    turn(home.session("ops"), 0)
    away.session("ops")
    away.release("ops")
    turn(home.session("ops"), 1)

    def commits() -> None:
        with SessionStore.open(away.root, "ops") as store:
            store.commit(
                messages=(),
                token_ids=[1, 2],
                chunks=(),
                state=store.state or {},
                bytes_on_disk=0,
                blocks=store.committed.blocks,
            )

    once("before", "read", ".db", commits)
    with pytest.raises(Diverged):
        Bucket(url).pull(away.root, "ops")
    with SessionStore.open(away.root, "ops", readonly=True) as store:
        assert store.token_ids(-2 % store.token_count).tolist() == [1, 2]


def test_who_made_a_session_is_told_that_it_was_deleted(machine: Machines, url: str) -> None:
    """All of it is still there, but not in the bucket, where the next commit would name what is gone."""
    home, away = machine(), machine()
    session = home.session("ops")
    turn(session, 0)
    away.session("ops")
    away.delete("ops")
    with pytest.raises(Diverged):
        turn(session, 1)
    assert Bucket(url).names() == []
    assert session.message_count == 4
