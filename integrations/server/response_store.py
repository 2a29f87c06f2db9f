"""Responses as they were given, kept beside the sessions that hold their histories.

A response is a file of the root, named by its session's id and by how many messages that had with it. So it outlives
the server, every process that shares the root finds it, and whose it is follows from the session.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from infllm_agent.errors import StorageError
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import sync_folder, write_atomically

_SESSION = re.compile("[0-9a-f]{32}")


class Key(NamedTuple):
    """Which response: a session's id, and how many messages it had with this one."""

    session: str
    messages: int

    def __str__(self) -> str:
        return f"{self.session}_{self.messages}"


class KeptResponses:
    """The responses of a root. Holds nothing open; any number of processes may use it at once."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._folder = Path(root) / "responses"

    def keep(self, key: Key, response: dict[str, Any], living: Callable[[], Collection[str]]) -> None:
        """Store a response; it is on disk when this returns.

        Args:
            living: the ids of all sessions there are; asked now and then, to forget the responses of others.

        Raises:
            StorageError.
        """
        path = self._path(key)
        with storage_errors(path):
            if not path.parent.exists():
                self.sweep(living)  # folders become more here, and nowhere else
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                sync_folder(self._folder.parent)
                sync_folder(self._folder)
            write_atomically(path, json.dumps(response, allow_nan=False).encode())

    def find(self, key: Key) -> dict[str, Any] | None:
        """Load a response as it was given; None if it is not stored. Raises StorageError."""
        path = self._path(key)
        with storage_errors(path), suppress(FileNotFoundError):
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                return dict(json.loads(file.read()))
        return None

    def forget(self, key: Key) -> bool:
        """Delete a response, and tell whether it was stored. Raises StorageError."""
        path = self._path(key)
        with storage_errors(path), suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)
            return True
        return False

    def sweep(self, living: Callable[[], Collection[str]]) -> None:
        """Delete the responses of sessions that are gone. Raises StorageError."""
        if not self._folder.is_dir():
            return
        self._refuse_links(self._folder)
        # Before the sessions: each folder here is younger than its session.
        with storage_errors(self._folder):
            found = [name for name in os.listdir(self._folder) if _SESSION.fullmatch(name)]
        ids = living() if found else ()
        for id in found:
            if id not in ids:
                shutil.rmtree(self._folder / id, ignore_errors=True)

    def _path(self, key: Key) -> Path:
        folder = self._folder / key.session
        self._refuse_links(self._folder, folder)
        return folder / f"{key.messages}.json"

    @staticmethod
    def _refuse_links(*folders: Path) -> None:
        for folder in folders:
            if folder.is_symlink():
                raise StorageError(f"{folder}: refused, because it is a symbolic link")
