"""The tail of a committed generation on disk: what is not in sealed blocks, as safetensors with a checksum."""

from __future__ import annotations

import contextlib
import re
import uuid
import zlib
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from infllm_agent.errors import CorruptSession, StorageError
from infllm_agent.platform.files import write_atomically

#: What a tail file is called.
TAIL_NAME = re.compile(r"tail-[0-9a-f]{32}\.safetensors")


def write_tail(folder: Path, tensors: dict[str, Tensor]) -> tuple[str, int]:
    """Put a new tail file on stable storage; the one in use is not touched. Returns its name and CRC-32."""
    # A name of its own each time: after a failed commit two tails may claim to be the next generation.
    name = f"tail-{uuid.uuid4().hex}.safetensors"
    data = safetensors.torch.save(tensors)
    write_atomically(folder / name, data)
    return name, zlib.crc32(data)


def read_tail(folder: Path, name: str, crc: int) -> dict[str, Tensor]:
    """The tensors of a tail file.

    Raises:
        CorruptSession: the file is missing, or not as it was written.
        StorageError: it cannot be read.
    """
    path = folder / name
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptSession(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    if zlib.crc32(data) != crc:
        raise CorruptSession(f"{path}: fails its checksum")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CorruptSession(f"{path}: {error}") from error


def remove_other_tails(folder: Path, keep: str) -> None:
    """Collect the tails of earlier generations and of commits that never happened. What cannot be removed now is
    removed after the next commit."""
    with contextlib.suppress(OSError):
        for path in list(folder.glob("*tail-*.safetensors")):  # those that are not complete, too
            if path.name != keep:
                path.unlink()
