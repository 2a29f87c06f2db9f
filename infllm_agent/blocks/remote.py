"""The source of blocks whose bytes are not in a session's folder yet: parts of segments in a bucket.

A session that was fetched from a bucket has sparse segment files: their heads are there, everything else is read from
the bucket when it is first needed, and kept. What is there needs no list: bytes that are not fail their checksum.

    part = the keys that stand for its blocks | their records, as in a segment

Parts lie under their segment's own id, so forks, and sessions of one origin in several places, share them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from infllm_agent.errors import BucketError, ConfigError, CorruptSession, StorageError
from infllm_agent.platform.files import write_atomically

ORIGIN_FILE = "origin.json"

#: From which block of a segment to which each part goes, and the id of the commit that it was published with.
Parts = tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Origin:
    """What a session's folder says of the bucket that it has to do with.

    Attributes:
        url: of the bucket.
        base: the id of the published commit that the folder continues; None: none was published yet.
        generation: of that commit.
        publishing: the ids of those that were being published since then: if the bucket has one of them, it is ours.
        parts: of each segment, by its id in hexadecimal.
    """

    url: str
    base: str | None = None
    generation: int = 0
    publishing: tuple[str, ...] = ()
    parts: Mapping[str, Parts] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Origin | None:
        """Of a session's folder; None: it has to do with no bucket.

        Raises:
            CorruptSession: what it says makes no sense.
            StorageError.
        """
        path = folder / ORIGIN_FILE
        try:
            found = json.loads(path.read_bytes())
            return cls(
                str(found["url"]),
                found["base"],
                int(found["generation"]),
                tuple(map(str, found["publishing"])),
                {str(id): as_parts(parts) for id, parts in found["parts"].items()},
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CorruptSession(f"{path}: {type(error).__name__}: {str(error)[:80]}") from error

    def write(self, folder: Path) -> None:
        """Replace what the folder says. Raises OSError."""
        write_atomically(folder / ORIGIN_FILE, json.dumps(asdict(self)).encode())

    def object(self, segment: bytes, index: int) -> str | None:
        """The name of the part that has a block; None if no part has it."""
        for part in self.parts.get(segment.hex(), ()):
            if part[0] <= index < part[1]:
                return f"{self.url}/{part_name(segment.hex(), part)}"
        return None

    def keys(self, segment: bytes, count: int, row_bytes: int) -> bytes:
        """What stands for a segment's first blocks, as far as parts have them, one behind the other."""
        wanted = [
            (part, 0, (min(part[1], count) - part[0]) * row_bytes)
            for part in self.parts.get(segment.hex(), ())
            if part[0] < count
        ]
        return b"".join(self._read(segment, wanted))

    def records(
        self, segment: bytes, wanted: Sequence[tuple[int, int, int]], row_bytes: int, stride: int
    ) -> list[bytes]:
        """Pieces of records, each given as a block's index in the segment, and from where to where in its record; empty
        for blocks that no part has.

        Raises:
            CorruptSession: the part is not there.
            BucketError.
        """
        found, numbers, places = [b""] * len(wanted), [], []
        for number, (index, start, stop) in enumerate(wanted):
            for part in self.parts.get(segment.hex(), ()):
                if part[0] <= index < part[1]:
                    at = (part[1] - part[0]) * row_bytes + (index - part[0]) * stride
                    places.append((part, at + start, at + stop))
                    numbers.append(number)
        for number, piece in zip(numbers, self._read(segment, places), strict=True):
            found[number] = piece
        return found

    def _read(self, segment: bytes, places: Sequence[tuple[tuple[int, int, str], int, int]]) -> list[bytes]:
        """Each from some byte of a part to another."""
        if not places:
            return []
        fs, root = open_bucket(self.url)
        paths = [f"{root}/{part_name(segment.hex(), part)}" for part, _, _ in places]
        starts, stops = [place[1] for place in places], [place[2] for place in places]
        with bucket_errors(self.url):
            found: list[bytes] = fs.cat_ranges(paths, starts, stops, on_error="raise")
        return found


def as_parts(found: Any) -> Parts:
    """Check parts read from JSON: they follow each other without gaps, from 0 on. Raises ValueError or TypeError."""
    parts = tuple((int(first), int(stop), str(id)) for first, stop, id in found)
    before = 0
    for first, stop, id in parts:
        if first != before or stop <= first or not id.isalnum():
            raise ValueError(f"no parts of a segment: {str(parts)[:80]}")
        before = stop
    return parts


def part_name(segment: str, part: tuple[int, int, str]) -> str:
    """In the bucket."""
    first, stop, id = part
    return f"segments/{segment}/{first}-{stop}-{id}"


@cache
def open_bucket(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it.

    Raises:
        ConfigError: fsspec knows no such kind of URL, or a package that it needs is not installed.
    """
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"bucket {url}: {str(error).splitlines()[0]}") from error
    return fs, path.rstrip("/")


@contextmanager
def bucket_errors(url: str) -> Iterator[None]:
    """Errors of a bucket's file system, whose types differ, as ours."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptSession(f"bucket {url}: {error.filename or error}: not there") from error
    except OSError as error:
        what = (os.strerror(error.errno) if error.errno else str(error)) or type(error).__name__
        raise BucketError(f"bucket {url}: {what.splitlines()[0]}") from error
    except (CorruptSession, StorageError):
        raise
    except Exception as error:  # of the store's own client, such as botocore's
        text = str(error).splitlines()[0] if str(error) else ""
        raise BucketError(f"bucket {url}: {type(error).__name__}: {text[:200]}") from error
