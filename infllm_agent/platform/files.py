"""Files and folders on stable storage."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


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
    shutil.copyfile(old, new)
    os.chmod(new, 0o600)
    with open(new, "rb") as file:
        os.fsync(file.fileno())


def copy_beginning(old: Path, new: Path, size: int) -> None:
    """Copy the first bytes of a file, which may be shorter, to a new one.

    Raises OSError.
    """
    with open(old, "rb") as source, open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy:
        while size and (piece := source.read(min(size, 1 << 20))):
            if any(piece):
                copy.write(piece)
            else:
                copy.seek(len(piece), os.SEEK_CUR)  # a hole stays one
            size -= len(piece)
        copy.truncate()
        copy.flush()
        os.fsync(copy.fileno())


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
