"""Whose chunk or token goes through the model next."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol
from weakref import WeakKeyDictionary


class Urgency(IntEnum):
    """Who waits for a piece of work."""

    NOBODY = 0
    NEXT_TOKEN = 1  # of an answer that has begun
    FIRST_TOKEN = 2  # of an answer


#: The share of the time that goes to work that nobody waits for, while urgent work waits all the time.
CALM_SHARE = 0.2
#: Seconds of the turn that such work must be owed before it goes ahead of next tokens, and of first tokens.
QUANTUM, LONG = 0.1, 2.0


@dataclass(eq=False)
class _Ticket:
    who: object
    urgency: Urgency
    thread: int
    depth: int = 1
    paused: bool = False  # in the middle of its work
    since: float = 0.0  # when it had the turn
    called: threading.Event = field(default_factory=threading.Event)


class Waiting(Protocol):
    """The way in which work that paused waits for its turn (``ComputeThread``)."""

    def wait(self, called: threading.Event) -> None: ...

    def wake(self) -> None:
        """Wake it; called after the event was set."""


class Turns:
    """A lock whose holders take turns: one forward of the model each.

    Work is *urgent* when somebody waits for its first or next token. Urgent work goes first, first tokens before next,
    and other work lets it in between its steps (``pause``), so that a short question waits for one layer of another
    session's reading at most. That other work gets ``CALM_SHARE`` of the time all the same, so that reading goes on
    while others talk. Among equals, who was served longest ago is next. A thread that has the turn may take it again.

    Args:
        waiting: how work that paused waits; None: its thread sleeps.
    """

    def __init__(self, waiting: Waiting | None = None) -> None:
        self._how = waiting
        self._mutex = threading.Lock()
        self._holder: _Ticket | None = None
        self._waiting: list[_Ticket] = []
        self._served: WeakKeyDictionary[object, float] = WeakKeyDictionary()
        self._owed = 0.0  # seconds of the turn, to work that is not urgent

    @contextmanager
    def turn(self, who: object, *, urgency: Urgency = Urgency.NOBODY) -> Iterator[None]:
        """Wait for the turn and hold it.

        Args:
            who: whose work it is, such as a session's memory.
        """
        self._take(who, urgency)
        try:
            yield
        finally:
            self._release()

    @property
    def waiting(self) -> int:
        """The number of threads that wait for their turn."""
        return len(self._waiting)

    def pause(self) -> None:
        """Let urgent work go first; called by the work that has the turn, in whatever thread, and does nothing if that
        is urgent itself. Whoever paused goes on before new work begins."""
        with self._mutex:
            mine = self._holder
            if mine is None or mine.urgency:
                return
            if not any(ticket.urgency for ticket in self._waiting):
                return
            self._account(mine)
            if self._owed > 0:
                return
            mine.paused = True
            mine.called.clear()
            self._waiting.append(mine)
            self._call_next()
        self._wait(mine)

    def _take(self, who: object, urgency: Urgency) -> None:
        me = threading.get_ident()
        with self._mutex:
            if self._holder is not None and self._holder.thread == me:
                self._holder.depth += 1
                return
            ticket = _Ticket(who, urgency, me)
            self._waiting.append(ticket)
            if self._holder is None:
                self._call_next()
        self._wait(ticket)

    def _wait(self, ticket: _Ticket) -> None:
        try:
            if ticket.paused and self._how is not None:
                self._how.wait(ticket.called)
            else:
                ticket.called.wait()
        except BaseException:  # KeyboardInterrupt: nobody will come for this turn
            with self._mutex:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                else:
                    self._call_next()
            raise

    def _release(self) -> None:
        with self._mutex:
            ticket = self._holder
            if ticket is None or ticket.thread != threading.get_ident():
                return  # interrupted while it waited: the turn is not this thread's any more
            ticket.depth -= 1
            if not ticket.depth:
                self._account(ticket)
                self._call_next()

    def _call_next(self) -> None:
        """Give the turn to the next in line. The mutex is held."""
        self._holder = None
        if not self._waiting:
            return
        ticket = min(self._waiting, key=self._rank)
        self._waiting.remove(ticket)
        self._holder = ticket
        ticket.since = self._served[ticket.who] = time.monotonic()
        ticket.called.set()
        if ticket.paused and self._how is not None:
            self._how.wake()

    def _account(self, ticket: _Ticket) -> None:
        """Account for the time that the holder of the turn had since the last account."""
        now = time.monotonic()
        seconds, ticket.since = now - ticket.since, now
        if not ticket.urgency:
            self._owed = max(0.0, self._owed - seconds)
        elif any(not other.urgency for other in self._waiting):
            self._owed += seconds * CALM_SHARE / (1 - CALM_SHARE)
        else:
            self._owed = 0.0

    def _rank(self, ticket: _Ticket) -> tuple[float, bool, float]:
        urgency: float = ticket.urgency
        if not urgency and self._owed > QUANTUM:
            urgency = 1.5 if self._owed < LONG else 2.5
        return -urgency, not ticket.paused, self._served.get(ticket.who, 0.0)
