"""An archive's file: a plain tar archive whose members come in a known order, the last a manifest of the others.

Each header is read by itself: links, sparse files and tar's extensions are refused, never followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from infllm_agent.errors import CorruptSession, StorageError
from infllm_agent.maintenance.committed import Stored
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import new_file

FORMAT = 1
#: The folder that an archive unpacks to. Those of another format have another.
FOLDER = f"infllm-session-{FORMAT}"
MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 << 20
PIECE = 1 << 20

_FOLDER = re.compile(r"infllm-session-(\d+)/")

Progress = Callable[[int], None]


class Readable(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes; an empty result means the end."""
        ...


class ArchiveWriter:
    """A tar archive under way."""

    def __init__(self, file: BinaryIO, time: int, progress: Progress) -> None:
        self._file = file
        self._time = time
        self._progress = progress
        self._members: list[dict[str, Any]] = []
        self._size = 0

    def add(self, path: Path, size: int | None = None, inode: int | None = None) -> None:
        """A file, or its first bytes. Raises CorruptSession if it is another file than the one by that inode."""
        with storage_errors(path), path.open("rb") as source:
            if inode not in (None, os.fstat(source.fileno()).st_ino):
                raise CorruptSession(f"{path}: the session was rebuilt while it was exported; export it again")
            size = os.fstat(source.fileno()).st_size if size is None else size
            self._head(path.name, size)
            digest, left = hashlib.sha256(), size
            while left:
                if not (piece := source.read(min(PIECE, left))):
                    raise CorruptSession(f"{path}: became shorter while it was read")
                digest.update(piece)
                self._write(piece)
                left -= len(piece)
        self._pad()
        self._members.append({"name": path.name, "size": size, "sha256": digest.hexdigest()})

    def finish(self, stored: Stored) -> int:
        """Write the manifest and the archive's end. Returns the archive's size."""
        head = stored.head
        manifest = {
            "format": FORMAT,
            "session": stored.session.name,
            "model": stored.fingerprint.get("model"),
            "messages": head.messages,
            "tokens": head.tokens,
            "blocks": head.blocks,
            "created": stored.session.created,
            "updated": head.updated,
            "members": self._members,
        }
        data = json.dumps(manifest, indent=1).encode()
        self._head(MANIFEST, len(data))
        self._write(data)
        self._pad()
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self._size

    def _head(self, name: str, size: int) -> None:
        info = tarfile.TarInfo(f"{FOLDER}/{name}")
        info.size, info.mtime, info.mode = size, self._time, 0o600
        self._write(info.tobuf(tarfile.GNU_FORMAT))

    def _pad(self) -> None:
        self._write(bytes(-self._size % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)
        self._progress(len(data))


class ArchiveReader:
    """A tar archive that is read, member by member as they are expected."""

    def __init__(self, file: Readable, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self._members: list[dict[str, Any]] = []

    def take(self, path: Path, size: int | None = None) -> None:
        """Write the next member, which must have the name of ``path``, to that new file, and sync it.

        Raises CorruptSession if it is another, or not of that size.
        """
        found = self._head(path.name)
        if size not in (None, found):
            raise CorruptSession(f"{path.name} has {found} bytes; it is of {size}")
        digest, left = hashlib.sha256(), found
        with new_file(path) as made:
            while left:
                piece = self._exactly(min(PIECE, left))
                digest.update(piece)
                made.write(piece)
                left -= len(piece)
        self._exactly(-found % tarfile.BLOCKSIZE)
        self._members.append({"name": path.name, "size": found, "sha256": digest.hexdigest()})

    def finish(self) -> None:
        """Compare all that was taken with the manifest, behind which nothing may follow."""
        size = self._head(MANIFEST)
        if size > MANIFEST_BYTES:
            raise CorruptSession(f"{MANIFEST} has {size} bytes, more than any session needs")
        manifest = json.loads(self._exactly(size))
        if manifest["format"] != FORMAT or manifest["members"] != self._members:
            raise CorruptSession(f"what it holds is not what its {MANIFEST} says")
        while piece := self._read(PIECE):
            if any(piece):
                raise CorruptSession(f"something follows its {MANIFEST}")

    def _head(self, name: str) -> int:
        """Read a member's header. Returns the member's size."""
        try:
            info = tarfile.TarInfo.frombuf(self._exactly(tarfile.BLOCKSIZE), "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise CorruptSession(f"no tar archive of a session: {error} where {name} should be") from None
        version = _FOLDER.match(info.name)
        if version and version[1] != str(FORMAT):
            raise StorageError(f"it was made by another version (format {version[1][:20]}); upgrade infllm-agent")
        if info.name != f"{FOLDER}/{name}" or info.type != tarfile.REGTYPE or info.size < 0:
            raise CorruptSession(f"{info.name[:140]!r} is where the file {FOLDER}/{name} should be")
        return info.size

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not (piece := self._read(size - len(data))):
                raise CorruptSession("it ends too early")
            data += piece
        return bytes(data)

    def _read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self._progress(len(piece))
        return piece
