"""Whose chunk or token goes through the model next."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

#: Seconds without a turn after which work that nobody waits for has one before urgent work.
PATIENCE = 5.0


@dataclass(eq=False)
class _Ticket:
    who: object
    urgent: bool
    thread: int
    called: threading.Event = field(default_factory=threading.Event)


class Turns:
    """A lock whose holders take turns: one forward of the model each.

    Work is *urgent* when somebody waits for its next token. Urgent work goes first, so that a short question waits for
    one chunk of another session's reading at most; but when nothing else had a turn for ``patience`` seconds, one goes
    before it, so that reading goes on while others talk. Among equals, who was served longest ago is next. A thread
    that has the turn may take it again.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._mutex = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiting: list[_Ticket] = []
        self._served: WeakKeyDictionary[object, float] = WeakKeyDictionary()
        self._calm = 0.0  # when work that is not urgent had its last turn, or none of it waited

    @contextmanager
    def turn(self, who: object, *, urgent: bool = False) -> Iterator[None]:
        """Wait for the turn and hold it.

        Args:
            who: whose work it is, such as a session's memory.
        """
        self._take(who, urgent)
        try:
            yield
        finally:
            self._release()

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        return len(self._waiting)

    def _take(self, who: object, urgent: bool) -> None:
        me = threading.get_ident()
        with self._mutex:
            if self._owner == me:
                self._depth += 1
                return
            ticket = _Ticket(who, urgent, me)
            self._waiting.append(ticket)
            if self._owner is None:
                self._call_next()
        try:
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
            self._depth -= 1
            if not self._depth:
                self._call_next()

    def _call_next(self) -> None:
        """Give the turn to the next in line. The mutex is held."""
        self._owner = None
        if not self._waiting:
            return
        now = time.monotonic()
        calm = [ticket for ticket in self._waiting if not ticket.urgent]
        urgent = [ticket for ticket in self._waiting if ticket.urgent]
        if not calm:
            self._calm = now
        overdue = bool(calm) and now - self._calm > self.patience
        ticket = min(calm if overdue or not urgent else urgent, key=lambda ticket: self._served.get(ticket.who, 0.0))
        if not ticket.urgent:
            self._calm = now
        self._waiting.remove(ticket)
        self._owner, self._depth = ticket.thread, 1
        self._served[ticket.who] = now
        ticket.called.set()
