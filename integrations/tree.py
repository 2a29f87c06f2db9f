"""The histories of a runtime's sessions as trees of messages, so that a call goes on where it continues one.

A history has a digest for each of its beginnings; equal digests are equal beginnings. The sessions of one family,
``ID``, ``ID.b2``, ``ID.b3``, ..., share beginnings as the lines of a tree do. What is noted here is a cache of what
the sessions hold: sessions that another process made or continued are read again.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, count
from typing import NamedTuple

from infllm_agent.catalog import SessionInfo
from infllm_agent.errors import CorruptSession, StorageError, UnknownSession
from infllm_agent.integrations.turns import BEGINNING, Turn, link
from infllm_agent.records import Message
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session import Session
from infllm_agent.store import SessionStore

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

    def places(self, runtime: AgentRuntime, base: str, history: Sequence[bytes]) -> list[Place]:
        """Where the family's sessions leave ``history`` (the digests of its beginnings), the deepest place first.

        Of places equally deep, ends of sessions come first, then the family's first session, then the latest used.
        """
        found = []
        for info in family(runtime, base):
            try:
                found.append((info, self._place(runtime, info, history)))
            except (CorruptSession, StorageError, UnknownSession) as error:  # damaged, or deleted just now
                log.warning('session "%s" is passed over: %s', info.name, error)
        found.sort(key=lambda pair: (-pair[1].messages, not pair[1].is_end, pair[0].name != base, -pair[0].updated))
        return [place for _, place in found]

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
                    new = store.messages(len(known) - 1, info.messages)
                line = self._lines[info.id] = _Line(info.generation, [*known, *beginnings(new, known[-1])[1:]])
            return line.digests


def family(runtime: AgentRuntime, base: str) -> list[SessionInfo]:
    """The session named ``base`` and its branches, as of their last commits."""
    member = re.compile(re.escape(base) + r"(\.b[1-9][0-9]*)?")
    return [info for info in runtime.sessions() if member.fullmatch(info.name)]


def branch_names(base: str) -> Iterator[str]:
    """The names of a family, in their order."""
    return (base if number == 1 else f"{base}.b{number}" for number in count(1))
