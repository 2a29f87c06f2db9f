"""Requests to stop, which may come from any thread: asked between chunks and tokens, and waited with."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any


class Cancellation:
    """Says whether some work is to stop: because ``cancel`` was called, its time is up, or one above it says so.

    Args:
        above: cancellations of which each cancels this one too.
        seconds: how long the work may take; None: as long as it likes.
    """

    def __init__(self, *above: Cancellation, seconds: float | None = None) -> None:
        self._above = above
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._cancelled = False
        self._mutex = threading.Lock()
        self._watchers: list[Callable[[], None]] = []

    def __call__(self) -> bool:
        return self._cancelled or self.timed_out or any(one() for one in self._above)

    @property
    def timed_out(self) -> bool:
        """Whether its own time is up."""
        return time.monotonic() > self._end

    def cancel(self) -> None:
        """Stop the work, and wake who waits meanwhile."""
        with self._mutex:
            self._cancelled = True
            watchers = list(self._watchers)
        for wake in watchers:
            wake()

    def wait_for(self, future: Future[Any]) -> bool:
        """Wait until ``future`` is done. Returns False if the work is to stop before."""
        woken = threading.Event()
        future.add_done_callback(lambda _: woken.set())
        with self.watched(woken.set):
            while not future.done():
                if self():
                    return False
                left = self._ends() - time.monotonic()
                woken.wait(None if left == math.inf else max(0.0, left))
                woken.clear()
        return True

    @contextmanager
    def watched(self, wake: Callable[[], None]) -> Iterator[None]:
        """Inside, ``wake`` is called when somebody cancels this or what is above it; not when time is up."""
        with self._mutex:
            self._watchers.append(wake)
        try:
            with ExitStack() as stack:
                for one in self._above:
                    stack.enter_context(one.watched(wake))
                yield
        finally:
            with self._mutex:
                self._watchers.remove(wake)

    def _ends(self) -> float:
        return min([self._end, *(one._ends() for one in self._above)])
