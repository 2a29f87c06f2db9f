"""A session that is closed or rolled back while other threads, a streamed message or an answer are at work on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infllm_agent import AgentRuntime, MemoryConfig, Session
from infllm_agent.errors import SessionBusy, SessionClosed
from infllm_agent.model.local_model import LocalModel

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = MemoryConfig(n_init=4, n_local=24, block_size=8, topk=3, chunk_size=16, max_cached_block=6, candidates=0)
LONG = "the tool printed a line of its log " * 10


@pytest.fixture
def session(tiny_model: LocalModel, tmp_path: Path) -> Iterator[Session]:
    with AgentRuntime(tmp_path / "root", tiny_model, SMALL) as runtime:
        session = runtime.session("ops")
        session.append_user("what happened on db-3?")
        session.commit()
        session.eager = False
        session.append_tool_result("shell", LONG)  # waits to go through the model
        yield session


class WatchedLock:
    """A lock that tells when a thread other than the one that made it has come to it."""

    def __init__(self, lock: Any) -> None:
        self._lock, self._maker = lock, threading.get_ident()
        self.reached = threading.Event()

    def __enter__(self) -> None:
        if threading.get_ident() != self._maker:
            self.reached.set()
        self._lock.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._lock.__exit__(*exception)


@contextmanager
def waiting(session: Session, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[Future[object]]:
    """Have a thread do ``work`` that waits for the session's lock until the block ends; then it is through."""
    lock = WatchedLock(session.working.lock)
    monkeypatch.setattr(session.working, "lock", lock)
    with ThreadPoolExecutor(1) as threads:
        with lock:
            future = threads.submit(work)
            assert lock.reached.wait(60)
            yield future


WORK: dict[str, Callable[[Session], object]] = {
    "ingest": lambda session: session.ingest(),
    "commit": lambda session: session.commit(),
    "append": lambda session: session.append_user("and then?"),
    "stream": lambda session: session.stream("tool"),
    "reply": lambda session: session.reply(max_tokens=2),
    "rollback": lambda session: session.rollback(),
    "fork": lambda session: session.fork("copy"),
    "messages": lambda session: session.messages(),
}


@pytest.mark.parametrize("work", WORK)
def test_who_waits_while_the_session_is_closed_is_told(
    session: Session, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(session, lambda: WORK[work](session), monkeypatch) as future:
        session.close()
    with pytest.raises(SessionClosed, match='"ops" is closed'):
        future.result()
    assert session.closed
    with pytest.raises(SessionClosed):
        session.rollback()
    assert session.closed


def test_who_waits_while_the_session_is_rolled_back_goes_on_from_the_commit(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(session, lambda: session.append_user("and then?"), monkeypatch) as future:
        session.rollback()
    assert future.result() == session.messages()[1]
    assert [message.text for message in session.messages()] == ["what happened on db-3?", "and then?"]
    session.commit()


@pytest.mark.parametrize("step", ["write", "close"])
def test_a_streamed_message_whose_session_is_closed_or_rolled_back(
    session: Session, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = session.stream("tool")

    def work() -> None:
        stream.write("x") if step == "write" else stream.close()

    with waiting(session, work, monkeypatch) as future:
        session.rollback()
    with pytest.raises(SessionBusy):
        future.result()
    stream = session.stream("tool")
    with waiting(session, work, monkeypatch) as future:
        session.close()
    with pytest.raises(SessionClosed):
        future.result()
    assert session.closed
    assert session.open_message is None


def test_an_answer_that_waits_while_its_session_is_closed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = session.stream_reply(prefix="It", max_tokens=50)
    assert next(pieces) == "It"
    with waiting(session, lambda: list(pieces), monkeypatch) as future:
        session.close()
    with pytest.raises(SessionClosed):
        future.result()
    assert session.closed
    assert session.last_reply is None


@pytest.mark.parametrize("ended", ["closed", "rolled back"])
@pytest.mark.parametrize("tokens", [1, 50])  # the last piece is out, or more would come
def test_an_answer_whose_session_is_closed_or_rolled_back(session: Session, ended: str, tokens: int) -> None:
    pieces, left = session.stream_reply(prefix="It", max_tokens=tokens), []
    left += [next(pieces) for _ in range(min(tokens, 2))]
    if ended == "closed":
        session.close()
    else:
        session.rollback()
    with pytest.raises(SessionClosed if ended == "closed" else SessionBusy):
        list(pieces)
    assert session.last_reply is None
    if ended == "rolled back":
        assert [message.role for message in session.messages()] == ["user"]
        assert session.reply(max_tokens=2).message == session.messages()[-1]


def test_an_answer_is_left_quietly_after_its_session_was_closed(session: Session) -> None:
    pieces = session.stream_reply(prefix="It", max_tokens=50)
    next(pieces)
    session.close()
    pieces.close()
    assert session.closed
    assert session.last_reply is None
