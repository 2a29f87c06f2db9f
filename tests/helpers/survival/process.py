"""A forked child that works and tells how far it came through shared memory, so that nothing is lost when it dies."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import traceback
from collections.abc import Callable
from typing import NoReturn

TEXT = 4096  # where the child's last words begin


class Progress:
    """Two numbers and a text that a child writes and its parent reads, also after the child is dead."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1 << 16)

    @property
    def acknowledged(self) -> int:
        """The last generation whose commit returned."""
        return int(struct.unpack_from("<q", self._shared, 0)[0])

    @acknowledged.setter
    def acknowledged(self, generation: int) -> None:
        struct.pack_into("<q", self._shared, 0, generation)

    @property
    def phase(self) -> str:
        """What the child was doing."""
        return self._shared[8:64].rstrip(b"\0").decode()

    @phase.setter
    def phase(self, name: str) -> None:
        self._shared[8:64] = name.encode().ljust(56, b"\0")

    @property
    def words(self) -> str:
        """What the child left to say: an error that it met."""
        (size,) = struct.unpack_from("<q", self._shared, 64)
        return self._shared[TEXT : TEXT + size].decode("utf-8", "replace")

    @words.setter
    def words(self, text: str) -> None:
        data = text.encode("utf-8", "replace")[-(len(self._shared) - TEXT) :]
        self._shared[TEXT : TEXT + len(data)] = data
        struct.pack_into("<q", self._shared, 64, len(data))


def fork(work: Callable[[Progress], object]) -> tuple[int, Progress]:
    """Run ``work`` in a child; returns its process number and its progress. The caller waits for it."""
    progress = Progress()
    progress.phase = "the beginning"
    pid = os.fork()
    if pid == 0:
        _work(work, progress)
    return pid, progress


def _work(work: Callable[[Progress], object], progress: Progress) -> NoReturn:
    code = 1
    try:
        work(progress)
        code = 0
    except BaseException:
        progress.words = traceback.format_exc()
    finally:
        os._exit(code)


def wait(pid: int, progress: Progress) -> bool:
    """Wait for a child's end: whether it was killed. Raises AssertionError if it failed by itself."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        if (number := os.WTERMSIG(status)) != signal.SIGKILL:
            raise AssertionError(f"the child died of {signal.Signals(number).name} in {progress.phase}")
        return True
    if os.WEXITSTATUS(status):
        raise AssertionError(f"the child failed in {progress.phase}:\n{progress.words}")
    return False
