"""Who works on which session, and which are open: a bounded number of workers and bytes, idle ones closed."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

from infllm_agent.config import RuntimeConfig
from infllm_agent.errors import BudgetExceeded, Cancelled, SessionBusy, Stopped
from infllm_agent.live.inbox import Inbox, Loan
from infllm_agent.live.worker import Worker
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.platform.logs import event
from infllm_agent.session.observer import Observer
from infllm_agent.session.session import Session

log = logging.getLogger(__name__)


class OpenSessions(Protocol):
    """What is open, and how to open and close; ``AgentRuntime`` is one."""

    observer: Observer

    def open_idle(self, name: str) -> Session:
        """The session, open for as long as it has something to do."""

    def open_names(self) -> set[str]:
        """All open sessions."""

    def open_sizes(self) -> dict[str, int]:
        """Bytes of the memories of all open sessions."""

    def may_close(self, name: str) -> bool:
        """Whether the session was opened by ``open_idle`` only."""

    def working_size(self) -> int:
        """Most bytes of the memory of a session that is new, while it is worked on."""

    def commit_idle(self, name: str) -> None:
        """Commit: what has arrived of a message lasts."""

    def close_idle(self, name: str) -> None:
        """Commit and close; a message that is arriving goes on when the session is opened again."""

    def drop(self, name: str) -> None:
        """Close without a commit."""

    def is_unread(self, name: str) -> bool:
        """Whether full chunks of an open session wait for the model, and nobody holds it."""


class Backlog(NamedTuple):
    """Sessions that are worked on; messages and requests queued, and their text."""

    running: int
    items: int
    chars: int


class Dispatcher:
    """Gives each session to one at a time who works on it: a worker, for what is in its inbox; or a caller who borrows
    it, for as long as the call takes.

    Workers and callers of one session come in the order in which they asked. Of the sessions that wait for a worker,
    those that somebody waits for go first. A session is open while it is worked on, and as long after as ``idle_s``,
    ``kept_open`` and ``device_budget`` allow.
    """

    def __init__(self, sessions: OpenSessions, config: RuntimeConfig) -> None:
        self.sessions = sessions
        self.config = config
        self._inboxes: dict[str, Inbox] = {}
        self._ready: list[str] = []
        self._running: set[str] = set()
        self._lent: dict[str, int] = {}  # to the thread of that number
        self._wanted: Counter[str] = Counter()  # by who goes before all that is queued
        self._pinned: Counter[str] = Counter()
        self._used: dict[str, float] = {}
        self._changed = threading.Condition(threading.RLock())
        self._stopping = False
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="infllm")
        self._keeper: threading.Thread | None = None

    def inbox(self, name: str) -> Inbox:
        with self._changed:
            if name not in self._inboxes:
                self._inboxes[name] = Inbox(self.config.queued_chars, lambda: self._news(name))
                if self._stopping:
                    self._inboxes[name].refuse(_stopped())
            if self._keeper is None:
                arguments = (weakref.ref(self), self._changed, self.config)
                self._keeper = threading.Thread(target=_keep, args=arguments, name="infllm-keeper", daemon=True)
                self._keeper.start()
            return self._inboxes[name]

    def backlog(self) -> Backlog:
        """What there is to do. Takes no lock, so that it can be asked at any time."""
        inboxes = list(self._inboxes.values())
        return Backlog(len(self._running), sum(map(len, inboxes)), sum(inbox.chars for inbox in inboxes))

    # -- for callers -------------------------------------------------------------------------------------------------

    def ask(self, name: str) -> Loan:
        """Queue for a session, to have it alone: ``borrow`` waits for it.

        Raises:
            SessionBusy: this thread has it, and would wait for itself.
        """
        if self.is_mine(name):
            raise SessionBusy(f'session "{name}": this thread still has a stream open on it; finish or close it first')
        loan = Loan(name)
        self.inbox(name).put(loan)
        return loan

    @contextmanager
    def borrow(self, loan: Loan, cancelled: Cancellation) -> Iterator[None]:
        """Wait for a session that was asked for, and have it alone.

        Raises:
            Cancelled: ``cancelled`` said so, while others had it.
        """
        try:
            if cancelled() or not cancelled.wait_for(loan):
                raise Cancelled(f'session "{loan.name}": stopped while waiting for another call')
            yield
        finally:
            if loan.cancel():
                self.inbox(loan.name).withdraw(loan)
                self._news(loan.name)
            else:
                self._give_back(loan.name)
                self._close_surplus()

    @contextmanager
    def quiet(self, name: str) -> Iterator[None]:
        """Have a session alone before all who wait for it. A worker that is at it takes what is queued, and leaves."""
        with self._changed:
            mine = self.is_mine(name)
            if not mine:
                self._wanted[name] += 1
                try:
                    self._changed.wait_for(lambda: name not in self._running and name not in self._lent)
                finally:
                    self._wanted[name] -= 1
                self._lent[name] = threading.get_ident()
            if name in self._ready:
                self._ready.remove(name)
        try:
            yield
        finally:
            if not mine:
                self._give_back(name)

    def if_unused(self, name: str, act: Callable[[str], None]) -> bool:
        """Do it, unless a call has the session or forks from it. Returns whether it was done."""
        with ExitStack() as stack:
            with self._changed:
                if name in self._lent or self._pinned[name]:
                    return False
                stack.enter_context(self.quiet(name))
            act(name)
        return True

    @contextmanager
    def pinned(self, name: str) -> Iterator[None]:
        """Keep a session that somebody reads, such as a fork's source: it is neither closed nor deleted meanwhile."""
        with self._changed:
            self._pinned[name] += 1
        try:
            yield
        finally:
            with self._changed:
                self._pinned[name] -= 1

    def is_mine(self, name: str) -> bool:
        """Whether this thread has the session."""
        return self._lent.get(name) == threading.get_ident()

    def is_taken(self, name: str) -> bool:
        """Whether somebody works on the session, or waits for it."""
        with self._changed:
            return name in self._running or name in self._lent or len(self._inboxes.get(name, ())) > 0

    def _give_back(self, name: str) -> None:
        with self._changed:
            del self._lent[name]
            self._used[name] = time.monotonic()
            self._changed.notify_all()
            self._news(name, unfinished=self.sessions.is_unread(name))

    # -- the end -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Let the workers take what is queued and leave. Nothing new is taken in. Answers end as they stand."""
        with self._changed:
            self._stopping = True
            for inbox in self._inboxes.values():
                inbox.refuse(_stopped())
            self._changed.notify_all()

    def close(self) -> None:
        """``stop``, and wait until all that was queued is on disk."""
        self.stop()
        self._pool.shutdown(wait=True)
        for name, inbox in self._inboxes.items():
            if len(inbox) and not isinstance(inbox.head(), Loan):
                self._run(name, inbox)

    # -- for workers -------------------------------------------------------------------------------------------------

    def _news(self, name: str, *, unfinished: bool = False) -> None:
        """Lend the session to who is next, or see that a worker comes."""
        with self._changed:
            inbox = self.inbox(name)
            self._lend(name, inbox)
            busy = name in self._running or name in self._ready
            if not busy and (unfinished or inbox.has_work) and not isinstance(inbox.head(), Loan):
                self._ready.append(name)
            while len(self._running) < self.config.workers and not self._stopping:
                ready = [name for name in self._ready if name not in self._lent and not self._wanted[name]]
                if not ready:
                    return
                chosen = next((name for name in ready if self._inboxes[name].asks), ready[0])
                if not self._make_room(chosen):
                    return
                self._ready.remove(chosen)
                self._running.add(chosen)
                self._pool.submit(self._run, chosen, self._inboxes[chosen])

    def _lend(self, name: str, inbox: Inbox) -> None:
        while name not in self._running and name not in self._lent and not self._wanted[name]:
            loan = inbox.head()
            if not isinstance(loan, Loan):
                return
            inbox.drop(loan)
            if loan.set_running_or_notify_cancel():
                self._lent[name] = loan.thread
                loan.set_result(None)

    def _run(self, name: str, inbox: Inbox) -> None:
        unfinished, worker = False, None
        try:
            session = self.sessions.open_idle(name)
            worker = Worker(
                session,
                inbox,
                self.config,
                stopping=lambda: self._stopping or self._wanted[name] > 0,
                give_way=self._give_way,
            )
            unfinished = worker.work()
        except BaseException as error:
            self._tell('session "%(session)s" is given up: %(reason)s', name, error)
            self._give_up(name, inbox, worker, error)
        finally:
            with self._changed:
                self._running.discard(name)
                self._used[name] = time.monotonic()
                self._changed.notify_all()
                self._news(name, unfinished=unfinished and not self._wanted[name])
            self._close_surplus()

    def _give_up(self, name: str, inbox: Inbox, worker: Worker | None, error: BaseException) -> None:
        """The session cannot go on as it is: what is queued fails, and the next message finds it as last committed."""
        try:
            self.sessions.drop(name)
        except Exception as another:
            self._tell('session "%(session)s" could not be dropped: %(reason)s', name, another)
        inbox.fail_all(error)
        if worker is not None:
            worker.fail_taken(error)

    def _give_way(self, seconds: float) -> bool:
        with self._changed:
            if not self._ready or seconds < self.config.slice_s:
                return False
            return len(self._running) >= self.config.workers or self.config.device_budget is not None

    def _make_room(self, name: str) -> bool:
        """Close idle sessions until this one fits; False if it must wait for others to become idle."""
        ceiling = self.config.device_budget
        if ceiling is None:
            return True
        needed = self.sessions.working_size()
        while True:
            sizes = self.sessions.open_sizes()
            busy = {*self._running, *self._lent, *self._pinning(), name}
            size = sum(max(sizes.get(other, 0), needed) for other in busy)
            size += sum(bytes for other, bytes in sizes.items() if other not in busy)
            if size <= ceiling:
                return True
            if self._close_one(set(sizes) - busy):
                continue
            if not self._running and not self._lent:
                self._ready.remove(name)
                full = BudgetExceeded(
                    f'session "{name}" and those that were opened directly need {size:,} bytes, and device_budget is '
                    f"{ceiling:,}: release some, or raise it"
                )
                self.sessions.observer.failed(name, full)
                self._inboxes[name].fail_all(full)
            return False

    def close_idle(self) -> bool:
        """Close the session that was idle for longest, and that nobody holds; whether there was one."""
        with self._changed:
            return self._close_one(self._idle())

    def _idle(self) -> set[str]:
        return self.sessions.open_names() - {*self._running, *self._lent, *self._pinning()}

    def _pinning(self) -> set[str]:
        return {name for name, forks in self._pinned.items() if forks}

    def _close_one(self, idle: set[str]) -> bool:
        idle = {name for name in idle if self.sessions.may_close(name)}
        if idle:
            self.sessions.close_idle(min(idle, key=lambda name: self._used.get(name, 0.0)))
        return bool(idle)

    def _close_surplus(self) -> None:
        """Close the sessions that were idle for longest, of more than may stay open."""
        with self._changed:
            idle = {name for name in self._idle() - {*self._ready} if self.sessions.may_close(name)}
            for name in sorted(idle, key=lambda name: self._used.get(name, 0.0))[: -self.config.kept_open or None]:
                self._close_or_tell(name)

    def _close_or_tell(self, name: str) -> None:
        try:
            self.sessions.close_idle(name)
        except Exception as error:
            log.error('session "%s" could not be committed: %s', name, error, exc_info=error)

    def _tell(self, said: str, name: str, error: BaseException) -> None:
        self.sessions.observer.failed(name, error)
        event(log, logging.ERROR, "gave_up", said, error, session=name, error=type(error).__name__, reason=str(error))

    def look_after(self) -> bool:
        """Close sessions that are idle for long; commit those in which a message arrives, but slowly. Returns whether
        to look again later."""
        with self._changed:
            now = time.monotonic()
            for name in self._idle() - {*self._ready}:
                if not self.sessions.may_close(name):
                    continue
                idle = now - self._used.setdefault(name, now)
                if idle >= self.config.idle_s:
                    self._close_or_tell(name)
                elif idle >= self.config.commit_s and len(self._inboxes.get(name, ())):
                    try:
                        self.sessions.commit_idle(name)
                    except Exception as error:
                        log.error('session "%s" could not be committed: %s', name, error, exc_info=error)
            return not self._stopping


def _keep(dispatcher: weakref.ref[Dispatcher], changed: threading.Condition, config: RuntimeConfig) -> None:
    """Look after idle sessions now and then, for as long as somebody has the dispatcher."""
    while True:
        with changed:
            changed.wait(max(0.05, min(config.idle_s / 4, config.commit_s, 60.0)))
        there = dispatcher()
        if there is None or not there.look_after():
            return
        del there


def _stopped() -> Stopped:
    return Stopped("the runtime is stopping, and takes nothing more in")
