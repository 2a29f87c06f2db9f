"""What the command line takes in: text from files and stdin, and requests to stop."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import BinaryIO, Protocol, cast

from infllm_agent.errors import Cancelled, StorageError

READ_BYTES = 1 << 14


class ByteSource(Protocol):
    """A binary file that gives what is there, without waiting for more."""

    def read1(self, size: int, /) -> bytes: ...


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP as a request to stop at the next good place. A second one ends the process at once,
    but for SIGHUP, of which a terminal that is closed may send several.

    Called, it says whether to stop: use it as ``Session.cancelled``. Signals that were ignored stay ignored.

    Attributes:
        before_kill: called before the process ends at once.
    """

    def __init__(self) -> None:
        self.before_kill: Callable[[], None] = lambda: None
        self._request: signal.Signals | None = None
        self._wake: Callable[[], None] | None = None
        self._before: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self._request is not None

    @property
    def final(self) -> bool:
        """Whether to end altogether, not only what is being done."""
        return self._request not in (None, signal.SIGINT)

    def clear(self) -> None:
        """Go on after a Ctrl-C."""
        if not self.final:
            self._request = None

    @contextmanager
    def waiting(self, wake: Callable[[], None] | None = None) -> Iterator[None]:
        """Around reads that may take for ever: here a request raises Cancelled at once, or calls ``wake``."""
        self._wake = wake or _stop
        try:
            if self._request is not None:
                self._wake()
            yield
        finally:
            self._wake = None

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._request is not None and number != signal.SIGHUP:
            self.before_kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._request = signal.Signals(number)
        if self._wake is not None:
            self._wake()


def _stop() -> None:
    raise Cancelled("stopped")


@contextmanager
def open_input(path: str) -> Iterator[tuple[ByteSource, int | None]]:
    """A file, or stdin for ``-``, and its size where it has one."""
    if path != "-":
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size or None
    else:
        yield standard_input(), None


def standard_input() -> ByteSource:
    """Stdin as bytes."""
    if sys.stdin is None:
        raise StorageError("stdin is closed: name a file")
    return cast(ByteSource, cast(BinaryIO, sys.stdin.buffer))


def read_text(source: ByteSource, interrupts: Interrupts, *, newlines: bool = False) -> Iterator[str]:
    """The text of a file as it comes, nothing of it kept. What is not UTF-8 becomes U+FFFD.

    With ``newlines``, every line ends with a plain newline, whatever it ended with in the file.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    decoder = io.IncrementalNewlineDecoder(utf8, translate=newlines)
    while True:
        with interrupts.waiting():
            data = source.read1(READ_BYTES)
        if text := decoder.decode(data, final=not data):
            yield text
        if not data:
            return


def split_lines(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Parts of lines, as they come, each with whether its line ends there."""
    for piece in pieces:
        *whole, rest = piece.split("\n")
        for line in whole:
            yield line, True
        if rest:
            yield rest, False


def read_lines(source: ByteSource, interrupts: Interrupts) -> Iterator[str]:
    """Whole lines, without their ends."""
    line = ""
    for part, ends in split_lines(read_text(source, interrupts, newlines=True)):
        line += part
        if ends:
            yield line
            line = ""
    if line:
        yield line
