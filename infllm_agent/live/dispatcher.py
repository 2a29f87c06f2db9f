"""Which live sessions are worked on, and which are open: a bounded number of workers and bytes, idle ones closed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from infllm_agent.config import RuntimeConfig
from infllm_agent.errors import BudgetExceeded, Stopped
from infllm_agent.live.inbox import Inbox
from infllm_agent.live.worker import Worker
from infllm_agent.platform.logs import event
from infllm_agent.session.observer import Observer
from infllm_agent.session.session import Session

log = logging.getLogger(__name__)


class OpenSessions(Protocol):
    """What is open, and how to open and close; ``AgentRuntime`` is one."""

    observer: Observer

    def open_idle(self, name: str) -> Session:
        """The session, open for as long as it has something to do."""

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


class Backlog(NamedTuple):
    """Sessions that are worked on; messages and requests queued, and their text."""

    running: int
    items: int
    chars: int


class Dispatcher:
    """Gives sessions with something in their inboxes to workers.

    Those that somebody waits for go first. A session is open while it is worked on, and as long after as ``idle_s`` and
    ``device_budget`` allow.
    """

    def __init__(self, sessions: OpenSessions, config: RuntimeConfig) -> None:
        self.sessions = sessions
        self.config = config
        self._inboxes: dict[str, Inbox] = {}
        self._ready: list[str] = []
        self._running: set[str] = set()
        self._wanted: set[str] = set()  # by others than workers
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
                self._keeper = threading.Thread(target=self._keep, name="infllm-keeper", daemon=True)
                self._keeper.start()
            return self._inboxes[name]

    def backlog(self) -> Backlog:
        """What there is to do. Takes no lock, so that it can be asked at any time."""
        inboxes = list(self._inboxes.values())
        return Backlog(len(self._running), sum(map(len, inboxes)), sum(inbox.chars for inbox in inboxes))

    def while_quiet(self, name: str, act: Callable[[], None]) -> None:
        """Let a worker that is at the session take what is queued and leave; then do it, before one comes again."""
        with self._changed:
            self._wanted.add(name)
            try:
                self._changed.wait_for(lambda: name not in self._running)
                act()
            finally:
                self._wanted.discard(name)
                if name in self._inboxes:
                    self._news(name)

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
            if len(inbox):
                self._run(name, inbox)

    def _news(self, name: str, *, unfinished: bool = False) -> None:
        with self._changed:
            inbox = self._inboxes[name]
            if name not in self._running and name not in self._ready and (unfinished or inbox.has_work):
                self._ready.append(name)
            while len(self._running) < self.config.workers and not self._stopping:
                ready = [name for name in self._ready if name not in self._wanted]
                if not ready:
                    return
                chosen = next((name for name in ready if self._inboxes[name].asks), ready[0])
                if not self._make_room(chosen):
                    return
                self._ready.remove(chosen)
                self._running.add(chosen)
                self._pool.submit(self._run, chosen, self._inboxes[chosen])

    def _run(self, name: str, inbox: Inbox) -> None:
        unfinished, worker = False, None
        try:
            session = self.sessions.open_idle(name)
            worker = Worker(
                session,
                inbox,
                self.config,
                stopping=lambda: self._stopping or name in self._wanted,
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
                self._news(name, unfinished=unfinished)

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
            busy = {*self._running, name}
            size = sum(max(sizes.get(other, 0), needed) for other in busy)
            size += sum(bytes for other, bytes in sizes.items() if other not in busy)
            if size <= ceiling:
                return True
            if self._close_one(sizes.keys() - busy):
                continue
            if not self._running:
                self._ready.remove(name)
                full = BudgetExceeded(
                    f'session "{name}" and those that were opened directly need {size:,} bytes, and device_budget is '
                    f"{ceiling:,}: release some, or raise it"
                )
                self.sessions.observer.failed(name, full)
                self._inboxes[name].fail_all(full)
            return False

    def close_idle(self) -> bool:
        """Close the live session that was idle for longest; whether there was one."""
        with self._changed:
            return self._close_one(self.sessions.open_sizes().keys() - self._running)

    def _close_one(self, idle: set[str]) -> bool:
        idle = {name for name in idle if self.sessions.may_close(name)}
        if idle:
            self.sessions.close_idle(min(idle, key=lambda name: self._used.get(name, 0.0)))
        return bool(idle)

    def _tell(self, said: str, name: str, error: BaseException) -> None:
        self.sessions.observer.failed(name, error)
        event(log, logging.ERROR, "gave_up", said, error, session=name, error=type(error).__name__, reason=str(error))

    def _keep(self) -> None:
        """Close sessions that are idle for long; commit those in which a message arrives, but slowly."""
        while True:
            with self._changed:
                if self._stopping:
                    return
                self._changed.wait(max(0.05, min(self.config.idle_s / 4, self.config.commit_s, 60.0)))
                now = time.monotonic()
                for name in self.sessions.open_sizes():
                    if name in self._running or name in self._ready or not self.sessions.may_close(name):
                        continue
                    idle = now - self._used.setdefault(name, now)
                    try:
                        if idle >= self.config.idle_s:
                            self.sessions.close_idle(name)
                        elif idle >= self.config.commit_s and name in self._inboxes and len(self._inboxes[name]):
                            self.sessions.commit_idle(name)
                    except Exception as error:
                        log.error('session "%s" could not be committed: %s', name, error, exc_info=error)


def _stopped() -> Stopped:
    return Stopped("the runtime is stopping, and takes nothing more in")
