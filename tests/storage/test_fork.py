"""Forks of sessions: the same as reading everything again, and independent from then on, in memory and on disk."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infllm_agent import AgentRuntime, MemoryConfig, Session
from infllm_agent.blocks.segments import PAGE, SEGMENT_BLOCKS
from infllm_agent.errors import (
    Cancelled,
    CorruptSession,
    InvalidName,
    NeedsModel,
    SessionClosed,
    SessionExists,
    SessionLocked,
    StorageError,
    UnknownMessage,
    UnknownSession,
)
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.fork import fork_stored, write_fork
from infllm_agent.storage.session_store import SessionStore

SIZES: dict[str, int] = {"n_init": 4, "n_local": 32, "block_size": 8, "topk": 3, "chunk_size": 16}
SMALL = MemoryConfig(**SIZES, max_cached_block=5, candidates=6)
PAPER = MemoryConfig.paper(**SIZES, max_cached_block=5, repr_topk=2)
TALK = [
    ("system", "be brief"),
    ("user", "the tool printed a line of its log and the agent asked what it means"),
    ("tool", "error 404 at 12:30, retry in 5 s\n" * 4),
    ("observation", "the agent asked what it means; " * 4),
    ("assistant", ""),
]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> LocalModel:
    return LocalModel.load(str(tiny_model_folder), dtype="float32", device="cpu")


@pytest.fixture
def runtime(model: LocalModel, tmp_path: Path) -> Iterator[AgentRuntime]:
    with AgentRuntime(tmp_path / "root", model, SMALL) as opened:
        yield opened


def talk(session: Session, times: int = 1) -> None:
    for _ in range(times):
        for role, text in TALK:
            session.append(role, text, name="shell" if role == "tool" else None)


def long_session(runtime: AgentRuntime, name: str = "ops") -> Session:
    """Two full segments and part of a third, committed."""
    session = runtime.session(name)
    while session.memory.store.count < 2 * SEGMENT_BLOCKS + 5:
        session.append_observation("error 404 at 12:30, retry in 5 s\n" * 20)
    session.commit()
    return session


def logits_after(session: Session, ids: list[int]) -> torch.Tensor:
    """As the session would go on; nothing of it is kept."""
    memory = session.memory.fork()
    fed = [*session.working.pending, *ids]
    return torch.stack([session.model.forward(fed[start : start + 16], memory) for start in range(0, len(fed), 16)])


def cold_logits(session: Session, ids: list[int]) -> torch.Tensor:
    """The same from a memory that has read the whole log in the session's chunks."""
    memory, log = session.model.new_memory(session.config), session.token_ids()
    for start, length in session.chunks():
        session.model.forward(log[start : start + length], memory)
    fed = [*log[memory.length :], *ids]
    return torch.stack([session.model.forward(fed[start : start + 16], memory) for start in range(0, len(fed), 16)])


def assert_whole(session: Session) -> None:
    """It is what a cold session with the same log is; and what is committed can be read to the last byte."""
    assert torch.equal(logits_after(session, [5, 6]), cold_logits(session, [5, 6]))
    session.store.verify()
    assert list(session.memory.store.files.damages()) == []
    messages = session.messages()
    assert [message.index for message in messages] == list(range(len(messages)))
    assert (messages[-1].end if messages else 0) == session.token_count
    if messages:
        newest = session.store.search("error", limit=1)
        assert newest == [m for m in session.store.messages() if "error" in m.text][-1:]


def files(session: Session) -> dict[str, str]:
    """What is in a session's block files, up to the committed blocks."""
    shape, count = session.memory.store.shape, session.store.info.blocks
    found = {}
    for number, path in enumerate(sorted(session.store.folder.glob("segment-*"))):
        here, bytes = min(SEGMENT_BLOCKS, count - number * SEGMENT_BLOCKS), path.read_bytes()
        keys, records = PAGE, PAGE + SEGMENT_BLOCKS * shape.layers * shape.key_bytes
        used = (
            bytes[keys : keys + here * shape.layers * shape.key_bytes],
            bytes[records : records + here * shape.stride],
        )
        found[path.name] = hashlib.sha256(b"".join(used)).hexdigest()
    return found


# -- what a fork is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [True, False])
def test_after_each_message_it_is_a_session_that_read_so_much(runtime: AgentRuntime, committed: bool) -> None:
    session = runtime.session("ops")
    for _ in range(2):
        talk(session)
        session.reply(max_tokens=5)
        if committed:
            session.commit()
    expected, ids = session.messages(), session.token_ids()
    forward = runtime.model.forward
    for count in range(session.message_count + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(runtime.model), "forward", None)  # nothing is read again
            fork = runtime.fork("ops", f"ops-{count}", count)
        assert fork is runtime.session(f"ops-{count}")
        assert fork.messages() == expected[:count]
        assert fork.token_ids() == ids[: fork.token_count]
        assert fork.chunks() == [chunk for chunk in session.chunks() if sum(chunk) <= fork.token_count]
        assert fork.pending_tokens <= SMALL.chunk_size
        assert fork.store.generation == 1
        assert fork.store.fingerprint == session.store.fingerprint
        assert_whole(fork)
    assert runtime.model.forward == forward
    assert session.messages() == expected
    whole = runtime.fork("ops", "all")
    assert whole.messages() == expected
    assert list(whole.working.pending) == list(session.working.pending)
    assert torch.equal(logits_after(whole, [7]), logits_after(session, [7]))


def test_a_fork_goes_on_as_its_source_did(runtime: AgentRuntime) -> None:
    """An answer asked again after the same messages is the same."""
    session = runtime.session("ops")
    talk(session, 2)
    session.append_user("what happened?")
    count = session.message_count
    said = session.reply(max_tokens=12).text
    session.append_user("and then?")
    assert runtime.fork("ops", "again", count).reply(max_tokens=12).text == said


def test_forks_of_forks(runtime: AgentRuntime, model: LocalModel) -> None:
    session = long_session(runtime)
    first = runtime.fork("ops", "first", session.message_count - 2)
    first.append_user("another way")
    first.reply(max_tokens=3)
    second = runtime.fork("first", "second")
    second.append_user("error, and yet another")
    third = runtime.fork("second", "third", 3)
    for each in (session, first, second, third):
        assert_whole(each)
    runtime.close()
    with AgentRuntime(runtime.root, model) as again:
        for name in ("ops", "first", "second", "third"):
            assert_whole(again.session(name))


def test_both_go_on_and_neither_changes_the_other(runtime: AgentRuntime, model: LocalModel) -> None:
    session = long_session(runtime)
    fork = runtime.fork("ops", "copy")
    before = files(session)
    assert files(fork) == before
    for each, other in ((session, fork), (fork, session)):
        untouched = files(other)
        for number in range(3):
            each.append_observation(f"error {number} of {each.name}, not of {other.name}; " * 10)
            talk(each)
            each.reply(max_tokens=3)
            each.commit()
        assert files(other) == untouched
    assert session.memory.store.count > 2 * SEGMENT_BLOCKS + 40
    for name in list(before)[:2]:
        assert (session.store.folder / name).samefile(fork.store.folder / name)
        assert files(fork)[name] == before[name]
    for each in (session, fork):
        assert_whole(each)
    runtime.close()
    with AgentRuntime(runtime.root, model) as again:
        for name in ("ops", "copy"):
            assert_whole(again.session(name))


@pytest.mark.parametrize("gone", ["ops", "copy"])
def test_deleting_one_leaves_the_other_whole(runtime: AgentRuntime, model: LocalModel, gone: str) -> None:
    long_session(runtime)
    runtime.fork("ops", "copy")
    left = "copy" if gone == "ops" else "ops"
    runtime.delete(gone)
    assert_whole(runtime.session(left))
    runtime.close()
    with AgentRuntime(runtime.root, model) as again:
        assert [info.name for info in again.sessions()] == [left]
        session = again.session(left)
        assert_whole(session)
        talk(session)
        session.commit()
        assert_whole(session)


def test_what_is_shared_and_what_is_not(runtime: AgentRuntime) -> None:
    session = long_session(runtime)
    fork = runtime.fork("ops", "copy")
    links = {path.name: path.stat().st_nlink for path in fork.store.folder.iterdir() if "segment" in path.name}
    assert links == {"segment-000000.kv": 2, "segment-000001.kv": 2, "segment-000002.kv": 1}
    earlier = runtime.fork("ops", "earlier", 1)
    assert earlier.memory.store.count < SEGMENT_BLOCKS
    assert [path.stat().st_nlink for path in earlier.store.folder.glob("segment-*")] == [1]
    info = fork.store.info
    assert (info.messages, info.tokens, info.blocks) == (
        session.message_count,
        session.token_count,
        session.memory.store.count,
    )
    assert info.bytes["disk"] == pytest.approx(session.store.info.bytes["disk"], rel=0.1)
    assert info in Catalog(runtime.root).list()


def test_where_there_are_no_hard_links_files_are_copied(runtime: AgentRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    session = long_session(runtime)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    fork = runtime.fork("ops", "copy")
    assert files(fork) == files(session)
    assert {path.stat().st_nlink for path in fork.store.folder.iterdir()} == {1}
    assert {path.stat().st_mode & 0o777 for path in fork.store.folder.iterdir()} == {0o600}
    assert_whole(fork)


def test_leftovers_of_a_failed_commit_are_not_shared(runtime: AgentRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source writes over them when it commits again."""
    session = runtime.session("ops")
    while session.memory.store.count < SEGMENT_BLOCKS - 9:
        session.append_observation("error 404 at 12:30")
    session.commit()
    long_text = "error 404 at 12:30, retry in 5 s\n" * 12
    session.append_observation(long_text)
    assert session.memory.store.count > SEGMENT_BLOCKS
    with monkeypatch.context() as patch:
        patch.setattr(SessionStore, "commit", lambda *_, **__: (_ for _ in ()).throw(StorageError("full")))
        with pytest.raises(StorageError):
            session.commit()
    assert len(list(session.store.folder.glob("segment-*"))) == 2
    fork = runtime.fork("ops", "copy")
    assert {path.stat().st_nlink for path in fork.store.folder.iterdir()} == {1}
    before = files(fork)
    session.rollback()
    session.append_observation("error: something else " * 50)
    session.commit()
    assert files(fork) == before
    assert fork.messages()[-1].text == long_text
    for each in (session, fork):
        assert_whole(each)


def test_damage_is_not_copied(runtime: AgentRuntime, model: LocalModel) -> None:
    session = long_session(runtime)
    folder, shape = session.store.folder, session.memory.store.shape
    runtime.close()
    for segment in (2, 1):  # one that is copied, one that is shared
        path = folder / f"segment-{segment:06d}.kv"
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(PAGE + SEGMENT_BLOCKS * shape.layers * shape.key_bytes + 100)
            file.write(b"\xff" * 8)
        with AgentRuntime(runtime.root, model) as again:
            if segment == 2:
                with pytest.raises(CorruptSession, match=str(path)):
                    again.fork("ops", "copy")
                path.write_bytes(whole)
            else:
                fork = again.fork("ops", "copy")
                with pytest.raises(CorruptSession, match=str(fork.store.folder / path.name)):
                    fork.memory.store.keys([SEGMENT_BLOCKS], 0)


def test_a_reply_under_way_is_not_taken_over(runtime: AgentRuntime) -> None:
    session, twin = runtime.session("ops"), runtime.session("twin")
    for each in (session, twin):
        talk(each, 2)
    session.commit()
    before = session.messages()
    pieces: list[str] = []
    speaking = threading.Event()

    def speak() -> None:
        for piece in session.stream_reply(max_tokens=40):
            pieces.append(piece)
            speaking.set()

    thread = threading.Thread(target=speak)
    thread.start()
    assert speaking.wait(60)
    forks = [runtime.fork("ops", f"copy-{i}", count) for i, count in enumerate((None, None, 6))]
    thread.join(60)
    assert "".join(pieces) == twin.reply(max_tokens=40).text == session.messages()[-1].text
    for fork, count in zip(forks, (None, None, 6), strict=True):
        assert fork.messages() == before[:count]
        assert_whole(fork)
    assert_whole_after_commit(session)


def assert_whole_after_commit(session: Session) -> None:
    session.commit()
    assert_whole(session)


@pytest.mark.parametrize("then", ["commit", "rollback", "delete"])
@pytest.mark.parametrize("count", [None, 7])
def test_the_source_goes_on_while_the_fork_is_written(
    runtime: AgentRuntime, monkeypatch: pytest.MonkeyPatch, then: str, count: int | None
) -> None:
    session = runtime.session("ops")
    talk(session)
    session.commit()
    talk(session)
    expected = session.messages()[:count]

    def meanwhile(*arguments: Any, **options: Any) -> SessionStore:
        if then == "commit":
            talk(session)
            session.commit()
        elif then == "rollback":
            session.rollback()
            talk(session)
            session.append_user("something else")
            session.commit()
        else:
            runtime.delete("ops")
        return write_fork(*arguments, **options)

    monkeypatch.setattr("infllm_agent.session.session.write_fork", meanwhile)
    if then == "delete":
        with pytest.raises(SessionClosed):
            runtime.fork("ops", "copy", count)
        assert runtime.sessions() == []
        return
    fork = runtime.fork("ops", "copy", count)
    assert fork.messages() == expected
    for each in (fork, session):
        assert_whole(each)
    runtime.close()
    with SessionStore.open(runtime.root, "copy") as store:
        store.verify()


def test_a_stream_that_is_open_is_not_taken_over(runtime: AgentRuntime) -> None:
    session = runtime.session("ops")
    talk(session)
    with session.stream_tool_result("shell") as sink:
        sink.write("error 404 at 12:30, retry in 5 s\n" * 30)
        fork = runtime.fork("ops", "copy")
        assert fork.memory.length < session.memory.length
    assert fork.messages() == session.messages()[:-1]
    assert_whole(fork)
    assert_whole_after_commit(session)


# -- where the memory cannot be told from what is held -----------------------------------------------------------------


def test_sessions_under_the_papers_rules_read_their_log_again(
    tmp_path: Path, model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AgentRuntime(tmp_path, model, PAPER) as runtime:
        session = runtime.session("ops")
        talk(session, 2)
        session.reply(max_tokens=8)
        talk(session)
        session.commit()
        for count in (0, 3, 7, session.message_count):
            fork = runtime.fork("ops", f"copy-{count}", count)
            assert fork.messages() == session.messages()[:count]
            assert fork.chunks() == session.chunks()[: len(fork.chunks())]
            assert_whole(fork)
        session.cancelled = lambda: True
        with pytest.raises(Cancelled, match="read again"):
            runtime.fork("ops", "never", 7)
        assert "never" not in [info.name for info in runtime.sessions()]
    with pytest.raises(NeedsModel, match="after 3 messages"):
        fork_stored(tmp_path, "ops", "copy", 3)
    fork_stored(tmp_path, "ops", "whole")
    with AgentRuntime(tmp_path, model) as runtime:
        assert_whole(runtime.session("whole"))


# -- without a model ---------------------------------------------------------------------------------------------------


def test_a_stored_session_is_forked_without_its_model(runtime: AgentRuntime, model: LocalModel) -> None:
    session = long_session(runtime)
    session.reply(max_tokens=5)
    talk(session)
    session.commit()
    runtime.session("empty")
    expected = session.messages()
    with pytest.raises(SessionLocked):
        fork_stored(runtime.root, "ops", "copy")
    runtime.close()
    counts = [0, 2, len(expected) - 3, len(expected) - 1, len(expected)]
    for count in counts:
        info = fork_stored(runtime.root, "ops", f"copy-{count}", count)
        assert (info.name, info.messages) == (f"copy-{count}", count)
    fork_stored(runtime.root, "ops", "all")
    fork_stored(runtime.root, "empty", "empty-too")
    with pytest.raises(SessionExists):
        fork_stored(runtime.root, "ops", "all")
    with pytest.raises(UnknownMessage):
        fork_stored(runtime.root, "empty", "never", 1)
    with AgentRuntime(runtime.root, model) as again:
        for count in counts:
            fork = again.session(f"copy-{count}")
            assert fork.messages() == expected[:count]
            assert_whole(fork)
        assert again.session("all").messages() == expected
        assert again.session("empty-too").messages() == []


@pytest.mark.parametrize("messages", [None, 9])
def test_killed_at_any_point_it_is_there_whole_or_not_at_all(
    runtime: AgentRuntime, model: LocalModel, messages: int | None
) -> None:
    """A child dies at its first call that changes the file system, then at its second, and so on to the end."""
    session = long_session(runtime)
    talk(session)
    session.commit()
    count = session.message_count if messages is None else messages
    runtime.close()
    point, outcomes = 0, []
    while not outcomes or outcomes[-1] != 0:
        point += 1
        child = multiprocessing.get_context("fork").Process(
            target=fork_and_die, args=(runtime.root, messages, point), daemon=True
        )
        child.start()
        child.join(60)
        outcomes.append(child.exitcode)
        names = [info.name for info in Catalog(runtime.root).list()]
        assert names in (["ops"], ["copy", "ops"])
        assert Catalog(runtime.root).problems() == []
        assert len(list((Path(runtime.root) / "sessions").iterdir())) == len(names), "leftovers are collected"
        if "copy" in names:
            with SessionStore.open(runtime.root, "copy") as store:
                store.verify()
                assert store.message_count == count
            if outcomes[-1] == 0:
                break
            Catalog(runtime.root).delete("copy")
    assert set(outcomes[:-1]) == {-signal.SIGKILL}
    assert len(outcomes) > 8
    with AgentRuntime(runtime.root, model) as again:
        for name in ("ops", "copy"):
            assert_whole(again.session(name))


def fork_and_die(root: Path, messages: int | None, point: int) -> None:
    calls = 0

    def counted(call: Any) -> Any:
        def dying(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return dying

    for name in ("link", "fsync", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    SessionStore._rest = counted(SessionStore._rest)  # type: ignore[method-assign]  # in the midst of the database's rows
    fork_stored(root, "ops", "copy", messages)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_say_what_is_wrong(runtime: AgentRuntime, model: LocalModel) -> None:
    session = runtime.session("ops")
    talk(session)
    for messages in (-1, len(TALK) + 1):
        with pytest.raises(UnknownMessage, match=f"after {messages} messages: it has {len(TALK)}") as error:
            runtime.fork("ops", "copy", messages)
        assert "\n" not in str(error.value)
    with pytest.raises(InvalidName):
        runtime.fork("ops", "../copy")
    with pytest.raises(SessionExists, match='"ops" already exists'):
        runtime.fork("ops", "ops")
    with pytest.raises(UnknownSession, match='no session "nothing"'):
        runtime.fork("nothing", "copy")
    assert [info.name for info in runtime.sessions()] == ["ops"]
    session.commit()
    with AgentRuntime(runtime.root, model) as other, pytest.raises(SessionLocked):
        other.fork("ops", "copy")


def test_a_full_disk_leaves_nothing(runtime: AgentRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    session = long_session(runtime)

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(StorageError, match="No space left on device"):
            runtime.fork("ops", "copy")
    assert [info.name for info in runtime.sessions()] == ["ops"]
    assert len(list((Path(runtime.root) / "sessions").iterdir())) == 1
    assert_whole(session)
    assert_whole(runtime.fork("ops", "copy"))


# -- any order of things -----------------------------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 9), st.integers(0, 3)),
    st.tuples(st.sampled_from(["reply", "commit", "rollback", "delete", "reopen"]), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("fork"), st.integers(0, 9), st.integers(0, 12)),
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, min_size=4, max_size=12))
def test_any_order_of_appending_replying_committing_forking_and_deleting(
    model: LocalModel, tmp_path_factory: pytest.TempPathFactory, todo: list[tuple[str, int, int]]
) -> None:
    """Beside a plain model: for each session the messages it has, and those it had at its last commit."""
    with AgentRuntime(tmp_path_factory.mktemp("root"), model, SMALL) as runtime:
        now: dict[str, list[str]] = {"s0": []}
        stored: dict[str, list[str]] = {"s0": []}
        talk(runtime.session("s0"))
        now["s0"] = [text for _, text in TALK]
        for step, (what, which, number) in enumerate(todo, 1):
            name = sorted(now)[which % len(now)]
            session = runtime.session(name)
            if what == "append":
                text = f"error {step} " * (1, 3, 20, 60)[number]
                session.append_user(text)
                now[name].append(text)
            elif what == "reply" and now[name]:
                now[name].append(session.reply(max_tokens=3).text)
            elif what == "commit":
                session.commit()
                stored[name] = list(now[name])
            elif what == "rollback":
                session.rollback()
                now[name] = list(stored[name])
            elif what == "fork":
                count = number % (len(now[name]) + 1)
                runtime.fork(name, f"s{step}", count)
                now[f"s{step}"], stored[f"s{step}"] = now[name][:count], now[name][:count]
            elif what == "delete" and len(now) > 1:
                runtime.delete(name)
                del now[name], stored[name]
            elif what == "reopen":
                session.close()
                now[name] = list(stored[name])
        for name, texts in now.items():
            session = runtime.session(name)
            assert [message.text for message in session.messages()] == texts
            session.commit()
            assert_whole(session)
            session.close()
            assert_whole(runtime.session(name))
        assert sorted(info.name for info in runtime.sessions()) == sorted(now)


# -- the packaged model ------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_packaged_model_answers_in_a_fork_as_after_reading_all(tmp_path: Path) -> None:
    memory = MemoryConfig(n_init=16, n_local=64, block_size=16, topk=8, candidates=8, chunk_size=64)
    with AgentRuntime.open(tmp_path, memory=memory) as runtime:
        session = runtime.session("ops")
        session.append_user("The access code of the north gate is 7391. " + "The weather was fine all day. " * 18)
        session.append_user("What is the access code of the north gate?")
        said = session.reply(max_tokens=12).text
        session.append_user("Now forget all that and talk about the weather. " * 10)
        fork = runtime.fork("ops", "again", 2)
        assert fork.memory.store.count > 0
        assert fork.reply(max_tokens=12).text == said
        assert_same_answer_cold(fork)


def assert_same_answer_cold(fork: Session) -> None:
    assert torch.equal(logits_after(fork, [5]), cold_logits(fork, [5]))
