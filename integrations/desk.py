"""Which session a call works on, and that it does so alone, and leaves it either further on or as it was."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from itertools import accumulate, count
from weakref import WeakKeyDictionary

from infllm_agent.catalog import SessionInfo
from infllm_agent.errors import Cancelled, SessionBusy
from infllm_agent.integrations.turns import BEGINNING, Turn, link
from infllm_agent.records import Message
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session import Session
from infllm_agent.store import SessionStore

#: Asked between chunks and tokens whether to stop.
CancelCheck = Callable[[], bool]


class CallLock:
    """Held by the call that works on a session; other calls queue."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()  # not re-entrant, and a generator may be closed by another thread
        self._owner: int | None = None

    @property
    def held(self) -> bool:
        return self._lock.locked()

    @property
    def held_here(self) -> bool:
        """Held by this thread, which would wait for itself."""
        return self._owner == threading.get_ident()

    def take_if_free(self) -> bool:
        taken = self._lock.acquire(blocking=False)
        if taken:
            self._owner = threading.get_ident()
        return taken

    def take(self, cancelled: CancelCheck) -> None:
        while not self.take_if_free():
            if self.held_here:
                raise SessionBusy(
                    f'session "{self.name}": this thread still has a stream open on it; finish or close it first'
                )
            if cancelled():
                raise Cancelled(f'session "{self.name}": stopped while waiting for another call')
            time.sleep(0.01)

    def release(self) -> None:
        self._owner = None
        self._lock.release()


class Desk:
    """Knows which sessions of a runtime are in use by calls, and what their histories are.

    One per runtime, so that all who share a runtime queue for its sessions.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        self._locks: dict[str, CallLock] = {}
        self._digests: dict[str, tuple[int, bytes]] = {}  # session id -> generation, digest of the history in it

    @contextmanager
    def by_name(self, runtime: AgentRuntime, name: str, cancelled: CancelCheck) -> Iterator[Session]:
        """The session of that name, for one call."""
        lock = self._lock_of(name)
        lock.take(cancelled)
        try:
            yield _settled(runtime, name)
        finally:
            lock.release()

    @contextmanager
    def by_history(
        self, runtime: AgentRuntime, base: str, turns: Sequence[Turn], cancelled: CancelCheck
    ) -> Iterator[Session]:
        """For one call, the session of the family ``base`` whose history is the longest beginning of ``turns``."""
        beginnings = list(accumulate(turns, link, initial=BEGINNING))  # entry n: the digest of the first n messages
        others: set[str] = set()
        while True:
            with self._mutex:
                lock = self._lock_of(self._choose(runtime, base, beginnings, others))
                taken = lock.take_if_free()
            if not taken:
                lock.take(cancelled)
            try:
                session = _settled(runtime, lock.name)
                # The call that was waited for may have gone on with it, or the catalogue be behind.
                known = session.message_count
                digest = self._digest(session.store.id, session.store.generation, session.messages)
                if known < len(beginnings) and digest == beginnings[known]:
                    yield session
                    # Noted, so that the next call need not read all of it.
                    digest = reduce(link, session.messages(known), digest)
                    self._note(session.store.id, session.store.generation, digest)
                    return
                others.add(lock.name)  # histories only grow: it will not be ours again
            finally:
                lock.release()

    def _lock_of(self, name: str) -> CallLock:
        with self._mutex:
            return self._locks.setdefault(name, CallLock(name))

    def _choose(self, runtime: AgentRuntime, base: str, beginnings: Sequence[bytes], others: set[str]) -> str:
        """The name of the session to go on with, or of one to make; none of ``others``."""
        branch = re.compile(re.escape(base) + r"(\.b[1-9][0-9]*)?")
        family = [info for info in runtime.sessions() if branch.fullmatch(info.name)]
        for info in sorted(family, key=lambda info: -info.messages):
            lock = self._lock_of(info.name)
            if lock.held and (info.messages == 0 or lock.held_here):
                continue  # a history that another call has just begun will not be ours
            if info.name in others or info.messages >= len(beginnings):
                continue
            digest = self._digest(info.id, info.generation, partial(_stored, runtime, info))
            if digest == beginnings[info.messages]:
                return info.name
        unfit = others | {info.name for info in family}
        names = (base if number == 1 else f"{base}.b{number}" for number in count(1))
        return next(name for name in names if name not in unfit and not self._lock_of(name).held)

    def _digest(self, id: str, generation: int, read: Callable[[], Iterable[Message]]) -> bytes:
        with self._mutex:
            noted, digest = self._digests.get(id, (-1, BEGINNING))
            if noted != generation:
                digest = reduce(link, read(), BEGINNING)
                self._note(id, generation, digest)
            return digest

    def _note(self, id: str, generation: int, digest: bytes) -> None:
        with self._mutex:
            self._digests[id] = (generation, digest)


_desks: WeakKeyDictionary[AgentRuntime, Desk] = WeakKeyDictionary()
_desks_mutex = threading.Lock()


def desk_of(runtime: AgentRuntime) -> Desk:
    with _desks_mutex:
        return _desks.setdefault(runtime, Desk())


def _stored(runtime: AgentRuntime, info: SessionInfo) -> list[Message]:
    with SessionStore.open(runtime.root, info.name, readonly=True) as store:
        return store.messages(0, info.messages)


def _settled(runtime: AgentRuntime, name: str) -> Session:
    """The session, with what others appended to it committed: a failing call takes back its own part only."""
    session = runtime.session(name)
    session.commit()
    return session


@contextmanager
def all_or_nothing(session: Session, cancelled: CancelCheck) -> Iterator[None]:
    """Commit what the block did to the session, or, if it fails, take it back."""
    others = session.cancelled
    session.cancelled = lambda: cancelled() or others()
    try:
        yield
        session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        session.cancelled = others
