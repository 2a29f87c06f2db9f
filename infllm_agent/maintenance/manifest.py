"""What a bucket says of a published commit."""

from __future__ import annotations

import json
import zlib
from typing import NamedTuple

from infllm_agent.blocks.remote import Parts, as_parts
from infllm_agent.errors import CorruptSession
from infllm_agent.maintenance.committed import tail_name
from infllm_agent.storage.integrity import FOREIGN

FORMAT = 1


class Manifest(NamedTuple):
    """A published commit.

    Attributes:
        number: of the manifest, one more than the one before.
        id: of this commit, everywhere.
        generation: of the session.
        tail: the name of the tail in the session's folder; None if nothing was committed.
        digests: SHA-256 of the database and of the tail.
        parts: of each segment, by its id.
        deleted: the session was deleted; there is nothing else of it.
    """

    number: int
    id: str
    name: str
    generation: int
    tail: str | None
    digests: tuple[str, str]
    parts: dict[str, Parts]
    deleted: bool = False

    def to_bytes(self) -> bytes:
        text = json.dumps({"format": FORMAT, **self._asdict()}, sort_keys=True).encode()
        return text + b"\n%08x" % zlib.crc32(text)

    @classmethod
    def of(cls, data: bytes) -> Manifest | None:
        """None for one that was cut off, or damaged.

        Raises:
            CorruptSession: it is whole, and of another version.
        """
        text, _, crc = data.rpartition(b"\n")
        try:
            if int(crc, 16) != zlib.crc32(text):
                return None
            found = json.loads(text)
            if found.pop("format") != FORMAT:
                raise CorruptSession("the bucket was written by another version; upgrade infllm-agent")
            if found["tail"] is not None:
                tail_name(found)
            parts = {str(id): as_parts(value) for id, value in found.pop("parts").items()}
            return cls(**{**found, "digests": tuple(found["digests"])}, parts=parts)
        except FOREIGN:
            return None
