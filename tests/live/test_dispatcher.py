"""Sessions lent to callers: one at a time, in the order in which they asked, beside workers."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from infllm_agent.config import MemoryConfig, RuntimeConfig
from infllm_agent.errors import Cancelled, SessionBusy
from infllm_agent.live.dispatcher import Dispatcher, OpenSessions
from infllm_agent.model.local_model import LocalModel
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.session_pool import pool_of
from infllm_agent.runtime import AgentRuntime

MEMORY = MemoryConfig(
    n_init=4, n_local=16, block_size=4, topk=4, candidates=8, chunk_size=16, question_chunk=4, max_cached_block=8
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Opened:
    """Sessions that are open, without any work in them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.closed: list[str] = []

    def open_names(self) -> set[str]:
        return set(self.names)

    def may_close(self, name: str) -> bool:
        return name != "held"

    def close_idle(self, name: str) -> None:
        self.names.remove(name)
        self.closed.append(name)

    def is_unread(self, name: str) -> bool:
        return False


def dispatcher(sessions: Opened | None = None, **config: Any) -> Dispatcher:
    return Dispatcher(cast(OpenSessions, sessions or Opened()), RuntimeConfig(**config))


class Caller(threading.Thread):
    """Asks for a session, says so, and keeps it until told to let go."""

    def __init__(self, lender: Dispatcher, name: str, got: Callable[[], None], cancelled: Cancellation) -> None:
        super().__init__()
        self._lender, self._name, self._got, self._cancelled = lender, name, got, cancelled
        self.asked, self.has, self.let_go = threading.Event(), threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.start()
        assert self.asked.wait(10)

    def run(self) -> None:
        loan = self._lender.ask(self._name)
        self.asked.set()
        try:
            with self._lender.borrow(loan, self._cancelled):
                self._got()
                self.has.set()
                assert self.let_go.wait(10)
        except Cancelled as error:
            self.error = error


def test_callers_come_in_the_order_in_which_they_asked() -> None:
    lender, order = dispatcher(), list[int]()
    callers = [Caller(lender, "ops", partial(order.append, number), Cancellation()) for number in range(9)]
    for number, caller in enumerate(callers):
        assert caller.has.wait(10)
        assert not any(later.has.is_set() for later in callers[number + 1 :])
        caller.let_go.set()
    for caller in callers:
        caller.join(10)
    assert order == list(range(9))
    assert not lender.is_taken("ops")


def test_who_stops_waiting_holds_up_nobody() -> None:
    lender, gone = dispatcher(), Cancellation()
    first = Caller(lender, "ops", lambda: None, Cancellation())
    second = Caller(lender, "ops", lambda: None, gone)
    third = Caller(lender, "ops", lambda: None, Cancellation())
    assert first.has.wait(10)
    gone.cancel()
    second.join(10)
    assert isinstance(second.error, Cancelled)
    assert not third.has.is_set()
    first.let_go.set()
    assert third.has.wait(10)
    third.let_go.set()
    third.join(10)
    assert not lender.is_taken("ops")


def test_a_thread_does_not_wait_for_itself() -> None:
    lender = dispatcher()
    with lender.borrow(lender.ask("ops"), Cancellation()):
        assert lender.is_mine("ops")
        with pytest.raises(SessionBusy, match="this thread still has a stream open"):
            lender.ask("ops")
        with lender.quiet("ops"):  # it has it already
            pass
        assert lender.is_mine("ops")
    assert not lender.is_taken("ops")


def test_who_must_not_wait_goes_before_who_is_queued() -> None:
    lender, order = dispatcher(), list[str]()
    first = Caller(lender, "ops", lambda: None, Cancellation())
    assert first.has.wait(10)
    queued = Caller(lender, "ops", lambda: order.append("queued"), Cancellation())

    def quiet() -> None:
        with lender.quiet("ops"):
            order.append("quiet")

    urgent = threading.Thread(target=quiet)
    urgent.start()
    while not lender._wanted["ops"] and urgent.is_alive():
        time.sleep(0.001)
    first.let_go.set()
    urgent.join(10)
    queued.let_go.set()
    queued.join(10)
    assert order == ["quiet", "queued"]


def test_what_is_used_or_read_by_a_fork_is_left_alone() -> None:
    lender, done = dispatcher(), list[str]()
    caller = Caller(lender, "lent", lambda: None, Cancellation())
    assert caller.has.wait(10)
    with lender.pinned("source"):
        assert not lender.if_unused("lent", done.append)
        assert not lender.if_unused("source", done.append)
        assert lender.if_unused("other", done.append)
    caller.let_go.set()
    caller.join(10)
    assert lender.if_unused("lent", done.append)
    assert lender.if_unused("source", done.append)
    assert done == ["other", "lent", "source"]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_so_many_idle_sessions_stay_open(kept: int) -> None:
    sessions = Opened()
    lender = dispatcher(sessions, kept_open=kept)
    sessions.names.append("held")
    for name in "abcba":
        with lender.borrow(lender.ask(name), Cancellation()):
            if name not in sessions.names:
                sessions.names.append(name)
        assert len(sessions.names) <= kept + 1
    assert sessions.names[0] == "held"
    assert set(sessions.names[1:]) == {*"abc"} - {0: {*"abc"}, 1: {*"bc"}, 3: set[str]()}[kept]


@pytest.fixture
def runtime(tmp_path: Path, tiny_model: LocalModel) -> Iterator[AgentRuntime]:
    with AgentRuntime(tmp_path, tiny_model, MEMORY) as made:
        yield made


def test_live_messages_and_calls_come_in_one_order(runtime: AgentRuntime) -> None:
    live, pool, n = runtime.live("ops"), pool_of(runtime), 12
    expected = []
    for number in range(n):
        live.append_user(f"live {number}")
        with pool.by_name("ops", Cancellation()) as session:
            assert [message.text for message in session.messages()][-1] == f"live {number}"
            receipt = live.append_user(f"during {number}")  # waits until the call is over
            session.append_user(f"call {number}")
            session.commit()
            assert not receipt.done()
        expected += [f"live {number}", f"call {number}", f"during {number}"]
    live.flush(60)
    assert [message.text for message in live.messages()] == expected


def test_what_a_call_leaves_unread_is_read_before_anybody_asks(runtime: AgentRuntime) -> None:
    pool = pool_of(runtime)
    with pool.by_name("ops", Cancellation()) as session:
        session.eager = False
        session.append_observation("a line of a log\n" * 20)
        session.commit()
        assert session.pending_tokens >= MEMORY.chunk_size
    runtime.live("ops").flush(60)
    with pool.by_name("ops", Cancellation()) as session:
        assert session.pending_tokens < MEMORY.chunk_size


def test_a_call_does_not_wait_until_all_is_read(runtime: AgentRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that reads leaves as soon as a call asks."""
    pool, forward = pool_of(runtime), runtime.model.forward
    read, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        read.set()
        assert go_on.wait(30)
        return forward(*arguments, **options)

    with pool.by_name("ops", Cancellation()) as session:
        session.eager = False
        session.append_observation("a line of a log\n" * 40)
        session.commit()
        waiting = session.pending_tokens
        monkeypatch.setattr(runtime.model, "forward", slow)
    assert read.wait(30)
    loan = runtime.dispatcher.ask("ops")
    monkeypatch.setattr(runtime.model, "forward", forward)
    go_on.set()
    with runtime.dispatcher.borrow(loan, Cancellation()):
        session = runtime.open_for_call("ops")
        assert 0 < waiting - session.pending_tokens <= 2 * MEMORY.chunk_size


def test_nothing_of_the_dispatcher_keeps_a_runtime(tmp_path: Path, tiny_model: LocalModel) -> None:
    runtime = AgentRuntime(tmp_path, tiny_model, MEMORY)
    with pool_of(runtime).by_name("ops", Cancellation()) as session:
        session.append_user("hello")
    there = weakref.ref(runtime)
    del runtime, session
    gc.collect()
    assert there() is None
