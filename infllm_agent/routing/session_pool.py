"""Which session a call works on, and that it does so alone, and leaves it either further on or as it was."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from os import PathLike
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

from infllm_agent.errors import (
    Cancelled,
    CorruptSession,
    DivergedHistory,
    InfLLMError,
    SessionBusy,
    SessionClosed,
    SessionExists,
    SessionLocked,
    UnknownSession,
)
from infllm_agent.routing.families import branch_names, family
from infllm_agent.routing.handover import Handover
from infllm_agent.routing.prefix_tree import Place, PrefixTree, beginnings
from infllm_agent.routing.turns import Turn
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session
from infllm_agent.storage.catalog import Catalog

log = logging.getLogger(__name__)

#: Asked between chunks and tokens whether to stop.
CancelCheck = Callable[[], bool]
#: What happens to a list of messages that continues no session of its family.
OnDivergence = Literal["branch", "warn", "error"]
#: Sessions that calls opened and none uses: so many stay open, each with its windows and cached blocks.
KEPT_OPEN = 4
#: Seconds in which another process gives back a session that is to be deleted, unless a call uses it.
DELETE_S = 5.0


class CallLock:
    """Held by the call that works on a session; other calls queue."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()  # not re-entrant, and a generator may be closed by another thread
        self._owner: int | None = None
        self.waiting = 0  # calls

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
        self.waiting += 1
        try:
            while not self.take_if_free():
                if self.held_here:
                    raise SessionBusy(
                        f'session "{self.name}": this thread still has a stream open on it; finish or close it first'
                    )
                if cancelled():
                    raise Cancelled(f'session "{self.name}": stopped while waiting for another call')
                time.sleep(0.01)
        finally:
            self.waiting -= 1

    def release(self) -> None:
        self._owner = None
        self._lock.release()


class Sessions(Protocol):
    """A folder of sessions; ``AgentRuntime`` is one."""

    root: str | PathLike[str]

    def delete(self, name: str) -> None: ...


class SessionFolder:
    """A folder of sessions that no model of this process works on."""

    def __init__(self, root: str | PathLike[str]) -> None:
        self.root = root

    def delete(self, name: str) -> None:
        Catalog(self.root).delete(name)


class Desk:
    """Hands out the sessions of a runtime to calls: to each alone the one that its history continues.

    One per runtime, so that all who share a runtime queue for its sessions.

    Attributes:
        kept_open: of the sessions that calls opened and none uses, so many stay open.
    """

    def __init__(self) -> None:
        self.tree = PrefixTree()
        self._mutex = threading.RLock()
        self._locks: dict[str, CallLock] = {}
        self._forking: Counter[str] = Counter()  # forks under way, by the source's name
        self._opened: OrderedDict[str, None] = OrderedDict()  # by this desk, latest used last
        self.kept_open = KEPT_OPEN
        self.handover: Handover | None = None

    def share(self, runtime: AgentRuntime, handover: Handover) -> None:
        """Exchange sessions with other processes that have the same root."""
        self.handover = handover
        handover.start(lambda: list(self._opened), lambda name: self._give_back(runtime, name))

    def _give_back(self, runtime: AgentRuntime, name: str) -> bool:
        given = self._while_unused(name, runtime.release)
        if given:
            with self._mutex:
                self._opened.pop(name, None)
        return given

    @contextmanager
    def by_name(
        self, runtime: AgentRuntime, name: str, cancelled: CancelCheck, *, make: bool = True
    ) -> Iterator[Session]:
        """The session of that name, for one call. If there is none, it is made; and deleted again, if the block fails
        and leaves it empty.

        Raises:
            UnknownSession: there is none, and ``make`` is False.
        """
        lock = self._lock_of(name)
        lock.take(cancelled)
        try:
            runtime.refresh(name)
            made = not runtime.is_open(name) and Catalog(runtime.root).find(name) is None
            if made and not make:
                raise UnknownSession(f"no session {name!r} here")
            try:
                yield self._open(runtime, name, None, cancelled)
            except BaseException:
                if made:
                    self._delete_if_empty(runtime, name)
                raise
        finally:
            lock.release()
            self._close_idle(runtime)

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

        It is the session that ends there, or a fork of one that holds more, or a new one. If the block fails, one that
        was made for it is deleted.

        Raises:
            DivergedHistory: ``on_divergence`` is ``error``, and no session ends at the longest such beginning.
            SessionLocked: the session to go on with is open in another process.
        """
        history = beginnings(turns)
        unusable: set[str] = set()
        self._while_unused(base, runtime.refresh)  # while it is used here, nobody else goes on with it
        while True:
            with self._claimed(runtime, base, history, unusable, on_divergence, cancelled) as (name, source, made):
                try:
                    session = self._open(runtime, name, source, cancelled)
                except (SessionLocked, CorruptSession):
                    if source is None:
                        raise
                    unusable.add(source.name)  # in use by another process, or damaged: it is computed again
                    continue
                except (SessionExists, SessionClosed, UnknownSession):
                    if made:
                        unusable.add(name)  # there by now, or in a folder that cannot be read
                    continue
                except BaseException:
                    if made:
                        self._delete_if_empty(runtime, name)
                    raise
                # The call that was waited for may have gone on with it, or the catalogue be behind.
                digests = self.tree.note(session)
                known = len(digests) - 1
                if known >= len(history) or digests[known] != history[known]:
                    continue
                try:
                    yield session
                except BaseException:
                    if made:
                        self._discard(runtime, session)
                    raise
                self.tree.note(session)
                break
        if made and max_branches is not None:
            self.prune(runtime, base, max_branches)
        self._close_idle(runtime)

    def prune(self, sessions: Sessions, base: str, keep: int) -> list[str]:
        """Delete all branches of ``base`` that no call is using but the ``keep`` latest used; the names of those
        deleted. The family's first session stays."""
        deleted = []
        branches = [info for info in family(sessions.root, base) if info.name != base]
        for info in sorted(branches, key=lambda info: info.updated)[: max(0, len(branches) - keep)]:
            with suppress(SessionLocked, UnknownSession):  # another process uses it, or has deleted it
                if self._while_unused(info.name, sessions.delete):
                    self.tree.forget(info.id)
                    deleted.append(info.name)
        return deleted

    def delete(self, sessions: Sessions, base: str, cancelled: CancelCheck) -> list[str]:
        """Delete ``base`` and its branches, once the calls that use them are done; the names of those there were.

        One that another process has open is asked for, as for a call.

        Raises:
            SessionLocked: a call of another process uses it, or that process does not share.
        """
        deleted = []
        for info in family(sessions.root, base):
            lock = self._lock_of(info.name)
            lock.take(cancelled)
            try:
                delete = partial(sessions.delete, info.name)
                if self.handover is None:
                    delete()
                else:
                    self.handover.until_free(info.name, delete, cancelled, patience_s=DELETE_S)
            finally:
                lock.release()
            self.tree.forget(info.id)
            deleted.append(info.name)
        return deleted

    def close(self, runtime: AgentRuntime, cancelled: CancelCheck) -> None:
        """Commit and close what this desk opened, once the calls that use it are done."""
        with self._mutex:
            names = list(self._opened)
        for name in names:
            lock = self._lock_of(name)
            lock.take(cancelled)
            try:
                self._opened.pop(name, None)
                runtime.release(name)
            finally:
                lock.release()

    def waiting(self, name: str) -> bool:
        """Whether a call waits for the session of that name, here or in another process."""
        return self._lock_of(name).waiting > 0 or (self.handover is not None and self.handover.wanted(name))

    @contextmanager
    def _claimed(
        self,
        runtime: AgentRuntime,
        base: str,
        history: Sequence[bytes],
        unusable: set[str],
        on_divergence: OnDivergence,
        cancelled: CancelCheck,
    ) -> Iterator[tuple[str, Place | None, bool]]:
        """What ``_choose`` says; meanwhile the session is this call's alone, and the source stays."""
        if cancelled():
            raise Cancelled(f'session "{base}": stopped before it was opened')
        with self._mutex:
            name, source, made = self._choose(runtime, base, history, unusable, on_divergence)
            lock = self._lock_of(name)
            taken = lock.take_if_free()
            used = source.name if source else ""
            self._forking[used] += 1
        try:
            if not taken:
                lock.take(cancelled)
            try:
                yield name, source, made
            finally:
                lock.release()
        finally:
            with self._mutex:
                self._forking[used] -= 1

    def _choose(
        self,
        runtime: AgentRuntime,
        base: str,
        history: Sequence[bytes],
        unusable: set[str],
        on_divergence: OnDivergence,
    ) -> tuple[str, Place | None, bool]:
        """The name of the session to work on; the place to fork it from, or None; and whether it is to be made."""
        sessions = sorted(family(runtime.root, base), key=lambda info: (info.name != base, -info.updated))
        places = self.tree.places(runtime, (info for info in sessions if info.name not in unusable), history)
        deepest = [place for place in places if place.messages == places[0].messages]
        for place in deepest:
            lock = self._lock_of(place.name)
            # An empty one that is in use is another call's, which has just begun it.
            if place.is_end and not lock.held_here and (place.known or not lock.held):
                return place.name, None, False
        diverged = any(place.known for place in places) and not any(place.is_end for place in deepest)
        if on_divergence != "branch" and diverged:
            _say_diverged(places[0], len(history) - 1, on_divergence)
        taken = unusable.union(info.name for info in sessions)
        name = next(
            name
            for name in branch_names(base)
            if name not in taken and not self._lock_of(name).held and not runtime.is_taken(name)
        )
        return name, places[0] if places and places[0].messages else None, True

    def _open(self, runtime: AgentRuntime, name: str, source: Place | None, cancelled: CancelCheck) -> Session:
        """The session, with what others appended to it committed: a failing call takes back its own part only."""
        opens = [used for used in (source.name if source else "", name) if used and not runtime.is_open(used)]
        if self.handover is not None:
            first = source.name if source else name
            self.handover.until_free(first, partial(runtime.session, first), cancelled)
        if source is None:
            session = runtime.session(name)
            session.commit()
        else:
            session = runtime.fork(source.name, name, messages=source.messages, cancelled=cancelled)
        with self._mutex:
            self._opened.update(dict.fromkeys(opens))
            for used in (source.name if source else "", name):
                if used in self._opened:
                    self._opened.move_to_end(used)
        return session

    def _discard(self, runtime: AgentRuntime, session: Session) -> None:
        with suppress(InfLLMError):
            runtime.delete(session.name)
            self.tree.forget(session.store.id)
            self._opened.pop(session.name, None)

    def _delete_if_empty(self, runtime: AgentRuntime, name: str) -> None:
        """Undo the making of a session that a failed call has left without a message."""
        with suppress(InfLLMError):
            if runtime.is_open(name):
                session = runtime.session(name)
                empty = not session.message_count and session.open_message is None
            else:
                empty = any(info.name == name and not info.messages for info in Catalog(runtime.root).list())
            if empty:
                runtime.delete(name)
                self._opened.pop(name, None)

    def _close_idle(self, runtime: AgentRuntime) -> None:
        """Close what this desk opened and no call has used for longest."""
        with self._mutex:
            for name in list(self._opened)[: max(0, len(self._opened) - self.kept_open)]:
                if self._while_unused(name, runtime.release):
                    del self._opened[name]

    def _while_unused(self, name: str, act: Callable[[str], None]) -> bool:
        """Do it, unless a call uses the session of that name or forks from it; whether it was done."""
        with self._mutex:
            lock = self._lock_of(name)
            if self._forking[name] or not lock.take_if_free():
                return False
        try:
            act(name)
        finally:
            lock.release()
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


@contextmanager
def all_or_nothing(session: Session, cancelled: CancelCheck) -> Iterator[None]:
    """Commit what the block did to the session, or, if it fails, take it back."""
    with session.cancelled_by(cancelled):
        try:
            yield
            session.commit()
        except BaseException:
            if not session.closed:
                session.rollback()
            raise
