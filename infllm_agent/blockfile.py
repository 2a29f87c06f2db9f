"""The bytes of a sealed block, in host memory and on disk alike, and the append-only files that hold them.

A *record* is one block of one session, all memory layers together, at a fixed stride: a block's place follows from
its number. Records in host memory have the same bytes, so a commit is a plain write and a resume is a memory map.

    record   = keys and values (layers, 2, kv_heads, block_size, head_dim)
             | representatives (layers, kv_heads, head_dim)
             | CRC-32 of each layer's keys and values, then of the representatives
             | zeros up to a multiple of 4096 bytes
    segment  = header of 4096 bytes (magic, JSON, zeros, CRC-32), then up to ``SEGMENT_BLOCKS`` records

Committed records are never overwritten; what lies past the committed number of blocks is a leftover of a crash and
is written over by the next commit.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infllm_agent.errors import CorruptSession

PAGE = 4096
MAGIC = b"INFLLM-KV1\n"
SEGMENT_BLOCKS = 64


@dataclass(frozen=True)
class BlockShape:
    """What a block holds. ``dtype`` is a torch dtype's name, such as ``bfloat16``."""

    layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's keys and values."""
        return 2 * self.kv_heads * self.block_size * self.head_dim * self.torch_dtype.itemsize

    @property
    def repr_bytes(self) -> int:
        """Bytes of all layers' representatives."""
        return self.layers * self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        used = self.layers * self.layer_bytes + self.repr_bytes + 4 * (self.layers + 1)
        return -(-used // PAGE) * PAGE


class Records:
    """Typed views of ``count`` records lying in one buffer of bytes (host memory or a memory map)."""

    def __init__(self, shape: BlockShape, buffer: Tensor) -> None:
        self.shape = shape
        self.count = buffer.numel() // shape.stride
        self.bytes = buffer[: self.count * shape.stride].view(self.count, shape.stride)
        kv_bytes = shape.layers * shape.layer_bytes
        heads, dim = shape.kv_heads, shape.head_dim
        #: (count, layers, 2, kv_heads, block_size, head_dim)
        self.kv = _typed(self.bytes[:, :kv_bytes], shape.torch_dtype).view(
            self.count, shape.layers, 2, heads, shape.block_size, dim
        )
        #: (count, layers, kv_heads, head_dim)
        self.representatives = _typed(self.bytes[:, kv_bytes : kv_bytes + shape.repr_bytes], shape.torch_dtype).view(
            self.count, shape.layers, heads, dim
        )
        crc_start = kv_bytes + shape.repr_bytes
        self._crcs = self.bytes[:, crc_start : crc_start + 4 * (shape.layers + 1)].numpy().view("<u4")

    @classmethod
    def empty(cls, shape: BlockShape, count: int, *, pin: bool = False) -> Records:
        """Records in new host memory; pinned where blocks are to be copied to a GPU."""
        return cls(shape, torch.zeros(count * shape.stride, dtype=torch.uint8, pin_memory=pin))

    def seal(self, index: int) -> None:
        """Write the checksums of record ``index``."""
        self._crcs[index] = self._checksums(index)

    def verify_representatives(self, index: int) -> bool:
        """Whether the representatives of record ``index`` are as they were sealed."""
        start = self.shape.layers * self.shape.layer_bytes
        return self._crc(index, start, self.shape.repr_bytes) == int(self._crcs[index, -1])

    def verify_layer(self, index: int, layer: int) -> bool:
        """Whether one layer's keys and values of record ``index`` are as they were sealed."""
        size = self.shape.layer_bytes
        return self._crc(index, layer * size, size) == int(self._crcs[index, layer])

    def _checksums(self, index: int) -> list[int]:
        size = self.shape.layer_bytes
        layers = [self._crc(index, layer * size, size) for layer in range(self.shape.layers)]
        return [*layers, self._crc(index, self.shape.layers * size, self.shape.repr_bytes)]

    def _crc(self, index: int, start: int, size: int) -> int:
        return zlib.crc32(self.bytes[index, start : start + size].numpy().data)


def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    # A strided row of bytes cannot be viewed as another type in general, but all our offsets are aligned.
    return raw.view(dtype)


def segment_path(folder: Path, segment: int) -> Path:
    return folder / f"segment-{segment:06d}.kv"


def write_blocks(folder: Path, shape: BlockShape, first: int, records: list[Tensor]) -> int:
    """Write consecutive sealed records, the first being block number ``first``, and fsync the files.

    Args:
        records: each (stride,) uint8.

    Returns:
        Bytes written. The blocks count only once the session's database says so.
    """
    written = 0
    done = 0
    while done < len(records):
        segment, place = divmod(first + done, SEGMENT_BLOCKS)
        path = segment_path(folder, segment)
        batch = records[done : done + SEGMENT_BLOCKS - place]
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            if place == 0:
                file.write(_header(shape, segment))
            file.seek(PAGE + place * shape.stride)
            for record in batch:
                written += file.write(record.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        done += len(batch)
    return written


def map_blocks(folder: Path, shape: BlockShape, count: int, *, first_segment: int = 0) -> list[Records]:
    """Memory-map the first ``count`` blocks of a session, one ``Records`` for each segment file from the given one on.

    Raises:
        CorruptSession: a file is missing, too short, of another shape, or its representatives fail their checksum.
            Keys and values are verified by the reader, block by block, when first used.
    """
    mapped = []
    for segment in range(first_segment, -(-count // SEGMENT_BLOCKS)):
        path = segment_path(folder, segment)
        in_segment = min(SEGMENT_BLOCKS, count - segment * SEGMENT_BLOCKS)
        try:
            with path.open("rb") as file:
                header = file.read(PAGE)
                if header != _header(shape, segment):
                    raise CorruptSession(f"{path}: the header is damaged or of another session's shape")
                size = os.fstat(file.fileno()).st_size
                if size < PAGE + in_segment * shape.stride:
                    raise CorruptSession(f"{path}: holds {size} bytes, fewer than its {in_segment} blocks need")
                view = mmap.mmap(file.fileno(), PAGE + in_segment * shape.stride, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CorruptSession(f"{path}: {error.strerror}") from error
        records = Records(shape, torch.from_numpy(np.frombuffer(view, dtype=np.uint8, offset=PAGE)))
        for index in range(records.count):
            if not records.verify_representatives(index):
                block = segment * SEGMENT_BLOCKS + index
                raise CorruptSession(f"{path}: block {block}: the representatives fail their checksum")
        mapped.append(records)
    return mapped


def _header(shape: BlockShape, segment: int) -> bytes:
    text = json.dumps({**asdict(shape), "segment": segment}, sort_keys=True).encode()
    body = (MAGIC + text).ljust(PAGE - 4, b"\0")
    return body + zlib.crc32(body).to_bytes(4, "little")
