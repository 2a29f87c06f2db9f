"""Which sessions to delete, by their age and by what they take on disk."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from os import PathLike
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from infllm_agent.errors import ConfigError, CorruptSession, SessionLocked, StorageError, UnknownSession
from infllm_agent.platform.locks import WriterLock
from infllm_agent.storage.catalog import Catalog, SessionInfo

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

#: A file on disk, whatever it is called: device and inode number.
File = tuple[int, int]


@dataclass(frozen=True)
class Pruned:
    """A session that is to go. ``bytes`` are what it takes on disk, files that it shares with forks included."""

    info: SessionInfo
    bytes: int
    why: str


@dataclass
class Plan:
    """What a prune would do.

    Attributes:
        sessions: to delete, those used longest ago first.
        skipped: one line for each that would go but for what the line says.
        total: bytes that all sessions take on disk; files that several share counted once.
        freed: how many of them the deletion gives back.
    """

    sessions: list[Pruned] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    total: int = 0
    freed: int = 0


def plan_prune(
    root: str | PathLike[str],
    *,
    older_than: timedelta | None = None,
    larger_than: int | None = None,
    keep_under: int | None = None,
    now: float | None = None,
) -> Plan:
    """Find the sessions to delete. Nothing is changed.

    Args:
        older_than, larger_than: those whose last commit is so long ago, and that take more than so many bytes; if both
            are given, both must hold.
        keep_under: then more, those used longest ago first, until all sessions together take at most so many bytes.
        now: unix seconds; None: the clock's.

    Raises:
        ConfigError: none of the three is given.
        StorageError: the root cannot be read.
    """
    if older_than is None and larger_than is None and keep_under is None:
        raise ConfigError("nothing to prune by: give --older-than, --larger-than or --keep-under")
    catalog, now = Catalog(root), time.time() if now is None else now
    found, problems = catalog.survey()
    files = {id: dict(_files(catalog.folder(id))) for id in (*found, *problems)}
    holders: dict[File, int] = {}
    for held in files.values():
        for file in held:
            holders[file] = holders.get(file, 0) + 1
    plan = Plan(total=sum({file: size for held in files.values() for file, size in held.items()}.values()))
    plan.skipped = [f"not readable: {problem}" for problem in problems.values()]

    def go(info: SessionInfo, why: str) -> None:
        if not _free(catalog, info):
            plan.skipped.append(f"{info.name}: open in another process")
            return
        plan.sessions.append(Pruned(info, sum(files[info.id].values()), why))
        for file, size in files[info.id].items():
            holders[file] -= 1
            plan.freed += size if not holders[file] else 0

    oldest_first = sorted(found.values(), key=lambda info: (info.updated, info.name))
    rest = []
    for info in oldest_first:
        reasons = []
        if older_than is not None and now - info.updated > older_than.total_seconds():
            reasons.append(f"last commit {timedelta(seconds=int(now - info.updated))} ago")
        if larger_than is not None and (size := sum(files[info.id].values())) > larger_than:
            reasons.append(f"takes {size:,} bytes")
        if reasons and len(reasons) == (older_than is not None) + (larger_than is not None):
            go(info, ", ".join(reasons))
        else:
            rest.append(info)
    for info in rest:
        if keep_under is not None and plan.total - plan.freed > keep_under:
            go(info, f"all take more than {keep_under:,} bytes")
    plan.sessions.sort(key=lambda one: (one.info.updated, one.info.name))
    return plan


def prune(
    root: str | PathLike[str], sessions: Sequence[Pruned], skipped: Callable[[str], None] = lambda line: None
) -> Iterator[Pruned]:
    """Delete the sessions of a plan, giving each that is gone. What has been used since the plan was made stays.

    Args:
        skipped: told, in a line, of each that is not deleted.
    """
    catalog = Catalog(root)
    for one in sessions:
        try:
            if catalog.delete_unchanged(one.info):
                yield one
            else:
                skipped(f"{one.info.name}: used meanwhile")
        except SessionLocked:
            skipped(f"{one.info.name}: open in another process")
        except UnknownSession:
            skipped(f"{one.info.name}: deleted meanwhile")
        except (StorageError, CorruptSession) as error:
            skipped(f"{one.info.name}: {error}")


def parse_age(text: str) -> timedelta:
    """``30d``, ``12h``, ``90m``, ``2w``, or a duration of ISO 8601. Raises ValueError."""
    with suppress(ValidationError, OverflowError):
        if short := re.fullmatch(r"(\d{1,9}) ?([mhdw])", text.strip()):
            return timedelta(**{_UNITS[short[2]]: int(short[1])})
        age = TypeAdapter(timedelta).validate_python(text.strip())
        if age >= timedelta(0):
            return age
    raise ValueError(f"{text!r} is no duration; write 30d, 12h, 90m or 2w")


def parse_size(text: str) -> int:
    """``5GB``, ``1.5 GiB``, or a number of bytes. Raises ValueError."""
    with suppress(ValidationError, OverflowError):
        return int(TypeAdapter(ByteSize).validate_python(text.strip()))
    raise ValueError(f"{text!r} is no size; write 5GB, 500MB, 2GiB or a number of bytes")


def _files(folder: Path) -> Iterator[tuple[File, int]]:
    """The files below a folder, each with the bytes that it takes on disk."""
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a commit may replace it while we look
                status = os.stat(os.path.join(path, name), follow_symlinks=False)
                yield (status.st_dev, status.st_ino), status.st_blocks * 512


def _free(catalog: Catalog, info: SessionInfo) -> bool:
    """Whether no process has the session open for writing."""
    try:
        WriterLock(catalog.folder(info.id), info.name).release()
    except SessionLocked:
        return False
    except (StorageError, UnknownSession):
        pass  # deleting it will tell
    return True
