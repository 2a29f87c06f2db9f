"""Signals that ask a program to end, as an orderly end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def exit_on_signals(*numbers: signal.Signals) -> Iterator[None]:
    """SIGTERM and SIGHUP (or the given ones) end the program as ``sys.exit`` does: ``with`` blocks are left in order,
    so that a runtime takes in what is queued and commits all its sessions. A second signal ends the process at once.

        with exit_on_signals(), AgentRuntime.open("sessions") as runtime:
            ...

    The exit status is 128 and the signal's number. Signals that were ignored stay ignored. Main thread only.
    """
    handled = numbers or (signal.SIGTERM, signal.SIGHUP)
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked = True
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, handle) for number in handled if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
