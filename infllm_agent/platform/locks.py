"""Locks that the kernel drops when their process ends, however it ends.

A forked child shares its parent's locks: they are free again only when both have let go.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infllm_agent.errors import SessionLocked, UnknownSession
from infllm_agent.platform.faults import storage_errors

LOCK_FILE = "lock"
FOLDER_LOCK_SECONDS = 10.0


class WriterLock:
    """The right to write to one session folder, held until ``release``, garbage collection or the process's end."""

    def __init__(self, folder: Path, name: str) -> None:
        """Take the lock at once, without waiting.

        Raises SessionLocked if another holder, in this process or another, has it; UnknownSession if the folder was
        deleted meanwhile; StorageError if the lock file cannot be opened for writing.
        """
        path = folder / LOCK_FILE
        with storage_errors(path):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                raise UnknownSession(f'session "{name}" was deleted by another process') from None
            self._file = os.fdopen(descriptor, "r+b", buffering=0)
            try:
                self._take(path, name)
            except BaseException:
                self._file.close()
                raise

    def _take(self, path: Path, name: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._file.read(20).decode("ascii", "replace").strip()
            where = f" by process {holder}" if holder.isdigit() else ""
            raise SessionLocked(f'session "{name}" is open for writing{where}; close it there first') from None
        mine = os.fstat(self._file.fileno())
        try:
            there = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(mine, there):
            raise UnknownSession(f'session "{name}" was deleted by another process')
        with suppress(OSError):  # the number serves the message above only; a full disk must not stop us here
            self._file.truncate(0)
            self._file.write(str(os.getpid()).encode("ascii"))

    def release(self) -> None:
        """Give the lock back; more than once does no harm."""
        self._file.close()


@contextmanager
def exclusive(folder: Path, seconds: float = FOLDER_LOCK_SECONDS) -> Iterator[None]:
    """Hold a short-term lock on the folder itself, so that there is no lock file to keep; waits its turn.

    Raises StorageError if the folder cannot be opened, or is still locked after so many seconds.
    """
    with storage_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + seconds
        with storage_errors(folder):
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OSError(errno.EBUSY, "locked by another process", str(folder)) from None
                    time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)
