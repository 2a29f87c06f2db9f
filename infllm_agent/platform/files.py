"""Files and folders on stable storage."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

#: What ``write_atomically`` calls a file until it is complete; a process that is killed meanwhile leaves it behind.
UNFINISHED = re.compile(r"\.[0-9a-f]{32}-.+", re.DOTALL)


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object], *, create: bool = False) -> None:
    """Make or replace a file, readable by its owner only. Whoever looks sees the old content or all of the new, even
    after a power cut; when this returns, the new one is on stable storage.

    Args:
        content: the bytes, or a function that writes them to the open file.
        create: never replace a file.

    Raises:
        OSError: nothing has changed; or, if it is the folder that cannot be synced, the new file is there, but may be
            lost with the power. FileExistsError: with ``create``, the file exists.
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex}-{path.name[-100:]}")
    try:
        with new_file(unfinished) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
        if create:
            os.link(unfinished, path)
        else:
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Make a file that is readable by its owner only, and put it on stable storage at the end of the block. Its name
    lasts when its folder is synced, too. Raises OSError."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put the folder's entries (new files, renames) on stable storage. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(old: Path, new: Path) -> None:
    """Give a file that is never written again a second name, or a copy where the file system has no hard links.

    Raises OSError.
    """
    with suppress(OSError):
        os.link(old, new)
        return
    with open(old, "rb") as source, new_file(new) as copy:
        shutil.copyfileobj(source, copy)


def copy_beginning(old: Path, new: Path, size: int) -> None:
    """Copy the first bytes of a file, which may be shorter, to a new one.

    Raises OSError.
    """
    with open(old, "rb") as source, new_file(new) as copy:
        while size and (piece := source.read(min(size, 1 << 20))):
            if any(piece):
                copy.write(piece)
            else:
                copy.seek(len(piece), os.SEEK_CUR)  # a hole stays one
            size -= len(piece)
        copy.truncate()


def folder_bytes(folder: Path) -> int:
    """What a folder and all in it takes on disk. Files with several names count once.

    Raises OSError.
    """
    seen: set[tuple[int, int]] = set()
    total, folders = 0, [folder]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except FileNotFoundError:  # deleted meanwhile
            continue
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                    continue
                status = entry.stat(follow_symlinks=False)
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
    return total
