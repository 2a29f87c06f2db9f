"""A program in a pseudo-terminal, and the screen that a person would see."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

import pexpect
import pyte


def _heed_signals() -> None:
    """As a program on a terminal does. What runs the tests may ignore them, in the background for instance."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """Starts a program, types, and reads the screen. ``raw`` has every byte that the program wrote."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        rows: int = 100,
        columns: int = 80,
        screen: type[pyte.Screen] = pyte.Screen,
        **env: str,
    ) -> None:
        self.screen = screen(columns, rows)
        self.screen.write_process_input = lambda told: self.child.send(told)  # type: ignore[method-assign,assignment]  # it tells where the cursor is
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        self.child = pexpect.spawn(
            command[0],
            list(command[1:]),
            env=os.environ | {"TERM": "xterm"} | env,
            dimensions=(rows, columns),
            preexec_fn=_heed_signals,
        )
        self.child.delaybeforesend = None

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, text: str) -> None:
        for start in range(0, len(text), 512):  # a terminal's buffer is small
            self.child.send(text[start : start + 512])
            self._read(0)

    def wait(self, wanted: str | Callable[[], object], seconds: float = 60.0) -> None:
        """Read until the text, wherever it is wrapped, or the condition is there."""
        there = wanted if callable(wanted) else lambda: wanted in " ".join(self.text.split())
        deadline = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < deadline, f"{wanted} did not come:\n{self.text}"
            assert self._read(0.1) or there(), f"ended without {wanted}:\n{self.text}"

    def resize(self, columns: int) -> None:
        self.screen.resize(columns=columns)
        self.child.setwinsize(self.screen.lines, columns)

    def end(self) -> int:
        """Wait for the program's end; its exit code, or minus the signal that ended it."""
        while self._read(0.1):
            pass
        self.child.wait()
        return -self.child.signalstatus if self.child.signalstatus else self.child.exitstatus

    def _read(self, seconds: float) -> bool:
        """Whether the program is still there."""
        try:
            data = self.child.read_nonblocking(1 << 16, seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True
