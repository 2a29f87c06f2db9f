"""Which session a call works on, and that it does so alone, and leaves it either further on or as it was."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

from infllm_agent.catalog import SessionExists, SessionInfo
from infllm_agent.errors import Cancelled, InfLLMError, SessionBusy, SessionLocked, UnknownSession
from infllm_agent.integrations.tree import Place, PrefixTree, beginnings, branch_names, family
from infllm_agent.integrations.turns import Turn
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session import Session

log = logging.getLogger(__name__)

#: Asked between chunks and tokens whether to stop.
CancelCheck = Callable[[], bool]
#: What happens to a list of messages that continues no session of its family.
OnDivergence = Literal["branch", "warn", "error"]
#: Sessions that calls opened and none uses: so many stay open, each with its windows and cached blocks.
KEPT_OPEN = 4


class DivergedHistory(InfLLMError, ValueError):
    """A list of messages that continues no session, where branches are not wanted."""


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
    """Hands out the sessions of a runtime to calls: to each alone the one that its history continues.

    One per runtime, so that all who share a runtime queue for its sessions.
    """

    def __init__(self) -> None:
        self.tree = PrefixTree()
        self._mutex = threading.RLock()
        self._locks: dict[str, CallLock] = {}
        self._opened: OrderedDict[str, None] = OrderedDict()  # by this desk, latest used last

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
        self,
        runtime: AgentRuntime,
        base: str,
        turns: Sequence[Turn],
        cancelled: CancelCheck,
        *,
        on_divergence: OnDivergence = "branch",
        max_branches: int | None = None,
    ) -> Iterator[Session]:
        """For one call, the session of the family ``base`` that ``turns`` continue; what it holds is a beginning of
        them, as long a one as there is.

        It is the session that ends there, or a fork of one that holds more, or a new one.

        Raises:
            DivergedHistory: ``on_divergence`` is ``error``, and no session ends at a beginning of ``turns``.
        """
        history = beginnings(turns)
        locked_elsewhere: set[str] = set()
        while True:
            with self._mutex:
                name, source = self._choose(runtime, base, history, locked_elsewhere, on_divergence)
                lock = self._lock_of(name)
                taken = lock.take_if_free()
            if not taken:
                lock.take(cancelled)
            try:
                try:
                    session = self._open(runtime, name, source)
                except SessionExists:
                    continue  # another process has just made it
                except SessionLocked:
                    if source is None:
                        raise
                    locked_elsewhere.add(source.name)  # by another process: what it holds is computed again
                    continue
                # The call that was waited for may have gone on with it, or the catalogue be behind.
                digests = self.tree.note(session)
                known = len(digests) - 1
                if known < len(history) and digests[known] == history[known]:
                    yield session
                    self.tree.note(session)
                    break
            finally:
                lock.release()
        self._tidy(runtime, base, max_branches)

    def prune(self, runtime: AgentRuntime, base: str, keep: int) -> list[str]:
        """Delete all branches of ``base`` that no call is using but the ``keep`` latest used; the names of those
        deleted. The family's first session stays."""
        deleted = []
        branches = [info for info in family(runtime, base) if info.name != base]
        for info in sorted(branches, key=lambda info: info.updated)[: max(0, len(branches) - keep)]:
            if self._delete(runtime, info):
                deleted.append(info.name)
        return deleted

    def delete(self, runtime: AgentRuntime, base: str, cancelled: CancelCheck) -> list[str]:
        """Delete ``base`` and its branches, once the calls that use them are done; the names of those there were."""
        deleted = []
        for info in family(runtime, base):
            lock = self._lock_of(info.name)
            lock.take(cancelled)
            try:
                runtime.delete(info.name)
                self.tree.forget(info.id)
                deleted.append(info.name)
            finally:
                lock.release()
        return deleted

    def _choose(
        self,
        runtime: AgentRuntime,
        base: str,
        history: Sequence[bytes],
        locked_elsewhere: set[str],
        on_divergence: OnDivergence,
    ) -> tuple[str, Place | None]:
        """The name of the session to work on; and, if it is to be made, the place to fork it from, or None."""
        places = self.tree.places(runtime, base, history)
        for place in places:
            lock = self._lock_of(place.name)
            # An empty one that is in use is another call's, which has just begun it.
            if place.is_end and not lock.held_here and (place.known or not lock.held):
                return place.name, None
        if on_divergence != "branch" and places and not any(place.is_end for place in places):
            _say_diverged(places[0], len(history) - 1, on_divergence)
        taken = {place.name for place in places}
        sources = [place for place in places if place.messages and place.name not in locked_elsewhere]
        source = sources[0] if sources else None
        return next(name for name in branch_names(base) if name not in taken and not self._lock_of(name).held), source

    def _open(self, runtime: AgentRuntime, name: str, source: Place | None) -> Session:
        known_before = runtime.is_open(name)
        if source is None:
            session = _settled(runtime, name)
        else:
            session = runtime.fork(source.name, name, messages=source.messages)
        with self._mutex:
            if not known_before or name in self._opened:
                self._opened[name] = None
                self._opened.move_to_end(name)
        return session

    def _tidy(self, runtime: AgentRuntime, base: str, max_branches: int | None) -> None:
        """Close what this desk opened and no call has used for long, and delete branches beyond their bound."""
        if max_branches is not None:
            self.prune(runtime, base, max_branches)
        with self._mutex:
            idle = [name for name in self._opened if not self._lock_of(name).held]
            for name in idle[: max(0, len(self._opened) - KEPT_OPEN)]:
                del self._opened[name]
                runtime.release(name)

    def _delete(self, runtime: AgentRuntime, info: SessionInfo) -> bool:
        lock = self._lock_of(info.name)
        if not lock.take_if_free():
            return False
        try:
            runtime.delete(info.name)
        except (SessionLocked, UnknownSession):  # another process uses it, or has deleted it
            return False
        finally:
            lock.release()
        self.tree.forget(info.id)
        return True

    def _lock_of(self, name: str) -> CallLock:
        with self._mutex:
            return self._locks.setdefault(name, CallLock(name))


def _say_diverged(place: Place, messages: int, on_divergence: OnDivergence) -> None:
    if place.messages == messages:
        said = f'the list ends after {messages} messages, and session "{place.name}" has {place.known}'
    else:
        said = (
            f"message {place.messages + 1} of the {messages} given is not the one that "
            f'session "{place.name}" has there (it has {place.known})'
        )
    if on_divergence == "error":
        raise DivergedHistory(f'{said}; give the history that it has, or set on_divergence="branch"')
    log.warning("%s: the call goes on in a branch", said)


_desks: WeakKeyDictionary[AgentRuntime, Desk] = WeakKeyDictionary()
_desks_mutex = threading.Lock()


def desk_of(runtime: AgentRuntime) -> Desk:
    with _desks_mutex:
        return _desks.setdefault(runtime, Desk())


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
