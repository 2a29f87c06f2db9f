"""Which session a call works on, and that it does so alone, and leaves it either further on or as it was."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from os import PathLike
from typing import Literal
from weakref import WeakKeyDictionary, ref

from infllm_agent.errors import (
    Cancelled,
    CorruptSession,
    DivergedHistory,
    InfLLMError,
    SessionClosed,
    SessionExists,
    SessionLocked,
    UnknownSession,
)
from infllm_agent.messages import Turn
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.families import branch_names, family
from infllm_agent.routing.handover import Handover
from infllm_agent.routing.prefix_tree import Place, PrefixTree, beginnings
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session
from infllm_agent.storage.catalog import Catalog, SessionInfo

log = logging.getLogger(__name__)

#: What happens to a list of messages that continues no session of its family.
OnDivergence = Literal["branch", "warn", "error"]
#: Seconds in which another process gives back a session that is to be deleted, unless a call uses it.
DELETE_S = 5.0


class SessionPool:
    """Lends the sessions of a runtime to calls: to each alone the one that its history continues.

    One per runtime (``pool_of``), so that all who share a runtime queue for its sessions. It does not keep the runtime.
    """

    def __init__(self, runtime: AgentRuntime) -> None:
        self.tree = PrefixTree()
        self.handover: Handover | None = None
        self._runtime = ref(runtime)
        self._choosing = threading.RLock()

    @property
    def runtime(self) -> AgentRuntime:
        runtime = self._runtime()
        assert runtime is not None, "whoever calls has the runtime"
        return runtime

    def share(self, handover: Handover) -> None:
        """Exchange sessions with other processes that have the same root."""
        self.handover = handover
        runtime = self.runtime
        handover.start(
            lambda: sorted(name for name in runtime.open_names() if runtime.may_close(name)),
            lambda name: runtime.dispatcher.if_unused(name, runtime.release),
        )

    @contextmanager
    def by_name(self, name: str, cancelled: Cancellation, *, make: bool = True) -> Iterator[Session]:
        """The session of that name, for one call. If there is none, it is made; and deleted again, if the block fails
        and leaves it empty.

        Raises:
            UnknownSession: there is none, and ``make`` is False.
            Cancelled: nothing was done.
        """
        runtime = self.runtime
        with runtime.dispatcher.borrow(runtime.dispatcher.ask(name), cancelled):
            runtime.refresh(name)
            made = not runtime.is_open(name) and Catalog(runtime.root).find(name) is None
            if made and not make:
                raise UnknownSession(f"no session {name!r} here")
            try:
                yield self._open(name, None, cancelled)
            except BaseException:
                if made:
                    self._delete_if_empty(name)
                raise

    @contextmanager
    def by_history(
        self,
        base: str,
        turns: Sequence[Turn],
        cancelled: Cancellation,
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
            Cancelled: nothing was done.
        """
        history = beginnings(turns)
        unusable: set[str] = set()
        runtime = self.runtime
        runtime.dispatcher.if_unused(base, runtime.refresh)  # while it is used here, nobody else goes on with it
        while True:
            with self._claimed(base, history, unusable, on_divergence, cancelled) as (name, source, made):
                try:
                    session = self._open(name, source, cancelled)
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
                        self._delete_if_empty(name)
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
                        self._discard(session)
                    raise
                self.tree.note(session)
                break
        if made and max_branches is not None:
            self.prune(base, max_branches)

    def prune(self, base: str, keep: int) -> list[str]:
        """Delete all branches of ``base`` that no call is using but the ``keep`` latest used. Returns the names of
        those deleted. The family's first session stays."""
        deleted = []
        for info in _old_branches(self.runtime.root, base, keep):
            with suppress(SessionLocked, UnknownSession):  # another process uses it, or has deleted it
                if self.runtime.dispatcher.if_unused(info.name, self.runtime.delete):
                    self.tree.forget(info.id)
                    deleted.append(info.name)
        return deleted

    def delete(self, base: str, cancelled: Cancellation) -> list[str]:
        """Delete ``base`` and its branches, once the calls that use them are done. Returns the names of those that
        there were.

        One that another process has open is asked for, as for a call.

        Raises:
            SessionLocked: a call of another process uses it, or that process does not share.
        """
        deleted = []
        dispatcher = self.runtime.dispatcher
        for info in family(self.runtime.root, base):
            with dispatcher.borrow(dispatcher.ask(info.name), cancelled):
                delete = partial(self.runtime.delete, info.name)
                if self.handover is None:
                    delete()
                else:
                    self.handover.until_free(info.name, delete, cancelled, patience_s=DELETE_S)
            self.tree.forget(info.id)
            deleted.append(info.name)
        return deleted

    def close(self, cancelled: Cancellation) -> None:
        """Commit and close the sessions that nobody holds, once the calls that use them are done."""
        runtime = self.runtime
        for name in runtime.open_names():
            if runtime.may_close(name):
                with runtime.dispatcher.borrow(runtime.dispatcher.ask(name), cancelled):
                    runtime.release(name)

    @contextmanager
    def _claimed(
        self,
        base: str,
        history: Sequence[bytes],
        unusable: set[str],
        on_divergence: OnDivergence,
        cancelled: Cancellation,
    ) -> Iterator[tuple[str, Place | None, bool]]:
        """What ``_choose`` says; meanwhile the session is this call's alone, and the source stays."""
        if cancelled():
            raise Cancelled(f'session "{base}": stopped before it was opened')
        dispatcher = self.runtime.dispatcher
        with ExitStack() as held:
            with self._choosing:
                name, source, made = self._choose(base, history, unusable, on_divergence)
                if source is not None:
                    held.enter_context(dispatcher.pinned(source.name))
                loan = dispatcher.ask(name)
            held.enter_context(dispatcher.borrow(loan, cancelled))
            yield name, source, made

    def _choose(
        self, base: str, history: Sequence[bytes], unusable: set[str], on_divergence: OnDivergence
    ) -> tuple[str, Place | None, bool]:
        """The name of the session to work on; the place to fork it from, or None; and whether it is to be made."""
        runtime, dispatcher = self.runtime, self.runtime.dispatcher
        sessions = sorted(family(runtime.root, base), key=lambda info: (info.name != base, -info.updated))
        places = self.tree.places(runtime, (info for info in sessions if info.name not in unusable), history)
        deepest = [place for place in places if place.messages == places[0].messages]
        for place in deepest:
            # An empty one that is in use is another call's, which has just begun it.
            mine, empty = dispatcher.is_mine(place.name), not place.known
            if place.is_end and not mine and not (empty and dispatcher.is_taken(place.name)):
                return place.name, None, False
        diverged = any(place.known for place in places) and not any(place.is_end for place in deepest)
        if on_divergence != "branch" and diverged:
            _say_diverged(places[0], len(history) - 1, on_divergence)
        taken = unusable.union(info.name for info in sessions)
        name = next(
            name
            for name in branch_names(base)
            if name not in taken and not dispatcher.is_taken(name) and not runtime.is_taken(name)
        )
        return name, places[0] if places and places[0].messages else None, True

    def _open(self, name: str, source: Place | None, cancelled: Cancellation) -> Session:
        """The session, with what others appended to it committed: a failing call takes back its own part only."""
        runtime = self.runtime
        if self.handover is not None:
            first = source.name if source else name
            self.handover.until_free(first, partial(runtime.open_for_call, first), cancelled)
        if source is None:
            session = runtime.open_for_call(name)
            session.commit()
            return session
        return runtime.fork(source.name, name, messages=source.messages, cancelled=cancelled, hold=False)

    def _discard(self, session: Session) -> None:
        with suppress(InfLLMError):
            self.runtime.delete(session.name)
            self.tree.forget(session.store.id)

    def _delete_if_empty(self, name: str) -> None:
        """Undo the making of a session that a failed call has left without a message."""
        runtime = self.runtime
        with suppress(InfLLMError):
            if runtime.is_open(name):
                session = runtime.open_for_call(name)
                empty = not session.message_count and session.open_message is None
            else:
                empty = any(info.name == name and not info.messages for info in Catalog(runtime.root).family(name))
            if empty:
                runtime.delete(name)


def delete_stored(root: str | PathLike[str], base: str) -> list[str]:
    """Delete ``base`` and its branches in a folder of sessions that no model of this process works on. Returns their
    names.

    Raises:
        SessionLocked: another process has one open.
    """
    deleted = []
    for info in family(root, base):
        Catalog(root).delete(info.name)
        deleted.append(info.name)
    return deleted


def prune_stored(root: str | PathLike[str], base: str, keep: int) -> list[str]:
    """Delete the branches of ``base`` but the ``keep`` latest used, likewise. Returns the names of those deleted."""
    deleted = []
    for info in _old_branches(root, base, keep):
        with suppress(SessionLocked, UnknownSession):
            Catalog(root).delete(info.name)
            deleted.append(info.name)
    return deleted


def _old_branches(root: str | PathLike[str], base: str, keep: int) -> list[SessionInfo]:
    """The branches of ``base`` but the ``keep`` latest used, the oldest first."""
    branches = sorted((info for info in family(root, base) if info.name != base), key=lambda info: info.updated)
    return branches[: max(0, len(branches) - keep)]


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


_pools: WeakKeyDictionary[AgentRuntime, SessionPool] = WeakKeyDictionary()
_pools_mutex = threading.Lock()


def pool_of(runtime: AgentRuntime) -> SessionPool:
    """The pool that all who share a runtime use."""
    with _pools_mutex:
        if runtime not in _pools:
            _pools[runtime] = SessionPool(runtime)
        return _pools[runtime]


@contextmanager
def all_or_nothing(session: Session, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Commit what the block did to the session, or, if it fails, take it back."""
    with session.cancelled_by(cancelled):
        try:
            yield
            session.commit()
        except BaseException:
            if not session.closed:
                session.rollback()
            raise
