"""Tokens of several sessions in one forward of the model.

Whoever decodes brings one token. The first to come leads: once the model is its own, it takes along the tokens that
have come meanwhile. So sessions join and leave between steps, and what else waits for the model is let in between them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor

from infllm_agent.model.attention_hook import Memory

#: Of a step's time, how long the next one waits for sessions that were in it and have not come back yet.
PATIENCE = 0.1

TakeTurn = Callable[[], AbstractContextManager[None]]
Outcome = Tensor | Exception
Compute = Callable[[Sequence[int], Sequence[Memory]], list[Outcome]]


@dataclass(eq=False)
class _Entry:
    token: int
    memory: Memory
    size: int
    outcome: Outcome | None = None
    called: threading.Event = field(default_factory=threading.Event)  # it has its outcome, or leads


class DecodeBatch:
    """The place where sessions meet that decode with one model.

    Args:
        turn: the turn at the model, held for a step.
        compute: one forward for the tokens of several memories; gives each its logits, or why it has none.
    """

    def __init__(self, turn: TakeTurn, compute: Compute) -> None:
        self._turn, self._compute = turn, compute
        self._mutex = threading.Lock()
        self._waiting: list[_Entry] = []  # the first leads
        self._arrived = threading.Condition(self._mutex)
        self._last: set[int] = set()  # who was in the last step
        self._last_s = 0.0

    def step(self, token: int, memory: Memory, size: int) -> Tensor:
        """Compute one token of one session; returns its logits (vocab,).

        Args:
            size: most sessions in a forward.
        """
        entry = _Entry(token, memory, size)
        with self._mutex:
            self._waiting.append(entry)
            if self._waiting[0] is entry:
                entry.called.set()
            self._arrived.notify()
        try:
            entry.called.wait()
            if entry.outcome is None:
                self._lead(entry)
        except BaseException:  # KeyboardInterrupt
            self._leave(entry)
            raise
        if isinstance(entry.outcome, Exception):
            raise entry.outcome
        assert entry.outcome is not None
        return entry.outcome

    def _lead(self, entry: _Entry) -> None:
        taken: list[_Entry] = []
        try:
            with self._turn():
                self._take(entry.size, taken)
                began = time.perf_counter()
                outcomes = self._compute([one.token for one in taken], [one.memory for one in taken])
                with self._mutex:
                    self._last, self._last_s = _who(taken), time.perf_counter() - began
                    for one, outcome in zip(taken, outcomes, strict=True):
                        one.outcome = outcome
                        one.called.set()
                    self._call_next()
        except BaseException:  # KeyboardInterrupt: the others try again
            with self._mutex:
                self._waiting[:0] = [one for one in taken if one.outcome is None]
            raise

    def _take(self, size: int, taken: list[_Entry]) -> None:
        """Take the leader and those who wait behind it, after waiting a little for those who were in the last step."""
        with self._mutex:
            until = time.perf_counter() + PATIENCE * self._last_s
            while len(self._waiting) < size and not {id(one.memory) for one in self._waiting} >= set(
                map(id, self._last)
            ):
                left = until - time.perf_counter()
                if left <= 0:
                    break
                self._arrived.wait(left)
            taken += self._waiting[:size]
            del self._waiting[:size]

    def _leave(self, entry: _Entry) -> None:
        """Give up; not before a forward that its memory is in has ended."""
        while True:
            with self._mutex:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                    self._call_next()
                    return
                if entry.outcome is not None:
                    return
            entry.called.wait()

    def _call_next(self) -> None:
        """Let the first in line lead. The mutex is held."""
        if self._waiting:
            self._waiting[0].called.set()


def _who(entries: list[_Entry]) -> set[int]:
    return {id(one.memory) for one in entries}
