"""Text that streams to a terminal with one line of progress beneath it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prompt_toolkit.utils import get_cwidth

from infllm_agent.platform.text import printable

#: Seconds between two looks at the progress; work that is shorter shows none.
TICK = 0.3

# Cursor movements that every terminal of the last decades knows.
_ERASE_BELOW, _ERASE_LINE = "\x1b[J", "\x1b[K"
_INDEX, _UP, _DOWN = "\x1bD", "\x1b[A", "\x1b[B"
_SAVE, _RESTORE = "\x1b7", "\x1b8"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class LiveText:
    """Writes text as it comes, and keeps a dim line beneath the row that the text has reached.

    Each piece is one write, and touches the line only when the text reaches the end of its row: no flicker, and few
    bytes. The terminal itself remembers where the text goes on, so the text is right whatever width the terminal
    gives a character; where that width is in doubt, the line is left out until the next row.
    """

    def __init__(self, write: Callable[[str], None], columns: Callable[[], int], status: Callable[[], str]) -> None:
        """
        Args:
            write: writes and flushes.
            columns: the terminal's width.
            status: what the line says; it is cut to the terminal's width.
        """
        self._write, self._columns, self._status = write, columns, status
        self._lock = threading.Lock()  # between the text and the clock that renews the line
        self._width = columns()
        self._column = 0
        self._sure = True  # whether _column is where the terminal's cursor is
        self._wanted = False  # from the first renewal on
        self._shown = False

    def text(self, piece: str) -> None:
        """Write a piece of text; control characters in it are replaced."""
        piece = printable(piece)
        with self._lock:
            self._look()
            if self._advance(piece) and self._shown:
                piece, self._shown = _ERASE_BELOW + piece, False
            if self._wanted and not self._shown:
                piece += self._line()
            self._write(piece)

    def renew(self) -> None:
        """Draw the line with what it says now."""
        with self._lock:
            self._look()
            self._wanted = True
            if line := self._line():
                self._write(line)

    def end(self) -> None:
        """Take the line away; what comes next stands on a row of its own."""
        with self._lock:
            line = _ERASE_BELOW if self._shown else ""
            self._shown = False
            if self._column or not self._sure:
                line += "\r\n"
                self._column, self._sure = 0, True
            if line:
                self._write(line)

    def _look(self) -> None:
        """After a change of the terminal's width nobody knows where it has moved the text to."""
        if (width := self._columns()) != self._width:
            self._width, self._sure = width, False

    def _advance(self, piece: str) -> bool:
        """Follow the cursor through a piece; whether it may have reached the end of its row."""
        row_ends = False
        for char in piece:
            wide = get_cwidth(char)
            if char == "\n":
                self._column, self._sure, row_ends = 0, True, True
            elif char == "\t":
                self._column = min(self._column + 8 - self._column % 8, self._width - 1)
            elif self._column + wide > self._width:
                self._column, row_ends = wide, True
                self._sure &= wide == 1  # nor on where a wide one goes that does not fit
            else:
                self._column += wide
            # Terminals do not agree on joined characters and emoji.
            self._sure &= wide > 0 or char in "\n\t"
            self._sure &= ord(char) < 0x1F000
            row_ends |= self._column >= self._width  # the cursor hangs behind the last column
        return row_ends or not self._sure

    def _line(self) -> str:
        if not self._sure or self._column >= self._width:
            return ""
        self._shown = True
        text = _cut(printable(self._status()), self._width - 1)
        there = _INDEX + _UP + _SAVE + _DOWN  # the index makes room where the text is in the last row
        return f"{there}\r{_DIM}{text}{_PLAIN}{_ERASE_LINE}{_RESTORE}"


@contextmanager
def ticking(live: LiveText) -> Iterator[None]:
    """Renew the line again and again; at the end it is taken away."""
    done = threading.Event()

    def tick() -> None:
        try:
            while not done.wait(TICK):
                live.renew()
        except (OSError, ValueError):  # the terminal is gone: whoever writes the text is told
            pass

    clock = threading.Thread(target=tick, name="progress", daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        live.end()


def _cut(text: str, width: int) -> str:
    """As much of a line as ``width`` columns hold."""
    used = 0
    for index, char in enumerate(text):
        used += get_cwidth(char)
        if used > width:
            return text[:index]
    return text
