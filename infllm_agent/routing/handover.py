"""Sessions pass from one process to another that shares their root, such as the replicas of a server.

Who wants a session that another process has open leaves a file that says so, and waits; who has it gives it back as
soon as no call uses it. A process that is killed has nothing open any more: the kernel drops its locks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from infllm_agent.errors import Cancelled, SessionLocked

log = logging.getLogger(__name__)

#: Seconds between two looks at what others want.
LOOK_S = 0.1
#: A wish that is older, in seconds, is of a process that waits no more.
STALE_S = 30.0


class Handover:
    """Asks other processes for sessions, and gives them those that they ask for.

    Args:
        root: the folder of sessions that all share.
        patience_s: how long to wait for a session that another process is at work on.
    """

    def __init__(self, root: str | os.PathLike[str], patience_s: float = 60.0) -> None:
        self.patience_s = patience_s
        self._folder = Path(root) / "wanted"
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None

    def until_free(
        self, name: str, open: Callable[[], object], cancelled: Callable[[], bool], patience_s: float | None = None
    ) -> None:
        """``open`` a session, or delete it, which raises SessionLocked as long as another process has it.

        Args:
            patience_s: None: as long as for any.

        Raises:
            SessionLocked: it has not been given back within ``patience_s``.
            Cancelled.
        """
        end = time.monotonic() + (self.patience_s if patience_s is None else patience_s)
        wish = self._folder / self._file(name)
        try:
            while True:
                try:
                    open()
                    return
                except SessionLocked:
                    if time.monotonic() > end:
                        raise
                if cancelled():
                    raise Cancelled(f'session "{name}": stopped while waiting for another process to give it back')
                self._folder.mkdir(mode=0o700, exist_ok=True)
                wish.touch(mode=0o600)
                time.sleep(LOOK_S / 2)
        finally:
            with suppress(FileNotFoundError):
                wish.unlink()

    def start(self, opened: Callable[[], list[str]], release: Callable[[str], bool]) -> None:
        """Give back what others want, in a thread.

        Args:
            opened: the sessions that are open here.
            release: commits and closes one, unless a call uses it.
        """
        if self._keeper is None:
            self._keeper = threading.Thread(
                target=self._keep, args=(opened, release), name="infllm-handover", daemon=True
            )
            self._keeper.start()

    def close(self) -> None:
        self._ended.set()
        if self._keeper is not None:
            self._keeper.join()

    def wanted(self, name: str) -> bool:
        """Whether another process waits for a session."""
        with suppress(OSError):
            return time.time() - (self._folder / self._file(name)).stat().st_mtime < STALE_S
        return False

    def _keep(self, opened: Callable[[], list[str]], release: Callable[[str], bool]) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                wishes = set(os.listdir(self._folder))
            except OSError:
                continue  # nobody ever wanted anything
            for name in opened() if wishes else ():
                if self._file(name) in wishes and self.wanted(name):
                    try:
                        release(name)
                    except Exception as error:
                        log.error('session "%s" could not be given back: %s', name, error)

    @staticmethod
    def _file(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()[:32]
