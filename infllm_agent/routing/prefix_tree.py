"""The histories of a runtime's sessions as trees of messages, so that a call goes on where it continues one.

A history has a digest for each of its beginnings; equal digests are equal beginnings. The sessions of one family,
``ID``, ``ID.b2``, ``ID.b3``, ..., share beginnings as the lines of a tree do. What is noted here is a cache of what
the sessions hold: sessions that another process made or continued are read again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from infllm_agent.errors import CorruptSession, SessionMismatch, StorageError, UnknownSession
from infllm_agent.messages import Message, Turn
from infllm_agent.routing.turns import BEGINNING, link
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session
from infllm_agent.storage.catalog import SessionInfo
from infllm_agent.storage.session_store import SessionStore

log = logging.getLogger(__name__)


def beginnings(turns: Iterable[Turn | Message], after: bytes = BEGINNING) -> list[bytes]:
    """The digest of a history and of each of its continuations by ``turns``: entry n has its first n."""
    return list(accumulate(turns, link, initial=after))


class Place(NamedTuple):
    """A point in a session's history: after its first ``messages``, of ``known`` that it has."""

    name: str
    messages: int
    known: int

    @property
    def is_end(self) -> bool:
        """Whether a history that leads here continues the session, rather than leaving it midway."""
        return self.messages == self.known


class _Line(NamedTuple):
    generation: int
    digests: list[bytes]  # of all its beginnings


class PrefixTree:
    """Finds the sessions of a family that hold a beginning of a given history."""

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        self._lines: dict[str, _Line] = {}  # by session id

    def places(self, runtime: AgentRuntime, sessions: Iterable[SessionInfo], history: Sequence[bytes]) -> list[Place]:
        """Where sessions leave ``history`` (the digests of its beginnings), the deepest place first; those left out
        that cannot be read, or not with the runtime's model and memory.

        Of places equally deep, ends of sessions come first, then the earlier of ``sessions``.
        """
        found = []
        for info in sessions:
            try:
                found.append(self._place(runtime, info, history))
            except SessionMismatch as error:
                log.debug("passed over: %s", error)
            except (CorruptSession, StorageError, UnknownSession) as error:  # damaged, or deleted just now
                log.warning('session "%s" is passed over: %s', info.name, error)
        return sorted(found, key=lambda place: (-place.messages, not place.is_end))

    def note(self, session: Session) -> Sequence[bytes]:
        """The digests of the beginnings of what a session holds, all of it committed; remembered."""
        id, generation = session.store.id, session.store.generation
        with self._mutex:
            line = self._lines.get(id)
            if line is None or line.generation != generation:
                known = line.digests if line else [BEGINNING]
                new = session.messages(len(known) - 1)  # histories only grow
                line = self._lines[id] = _Line(generation, [*known, *beginnings(new, known[-1])[1:]])
            return line.digests

    def forget(self, id: str) -> None:
        """The session of that id is no more."""
        with self._mutex:
            self._lines.pop(id, None)

    def _place(self, runtime: AgentRuntime, info: SessionInfo, history: Sequence[bytes]) -> Place:
        digests = self._digests(runtime, info)
        shared, beyond = 0, min(len(digests), len(history))
        while beyond - shared > 1:  # equal up to some number of messages, and from there on no more
            middle = (shared + beyond) // 2
            if digests[middle] == history[middle]:
                shared = middle
            else:
                beyond = middle
        return Place(info.name, shared, len(digests) - 1)

    def _digests(self, runtime: AgentRuntime, info: SessionInfo) -> list[bytes]:
        with self._mutex:
            line = self._lines.get(info.id)
            if line is None or line.generation < info.generation:  # the catalogue may be behind, never ahead
                known = line.digests if line else [BEGINNING]
                with SessionStore.open(runtime.root, info.name, readonly=True) as store:
                    runtime.check(info.name, store.fingerprint)
                    new = store.messages(len(known) - 1, info.messages)
                line = self._lines[info.id] = _Line(info.generation, [*known, *beginnings(new, known[-1])[1:]])
            return line.digests
