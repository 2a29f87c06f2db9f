"""Where a block's bytes live: device slots (LRU) over host memory, which may be a map of files on disk."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infllm_agent.blockfile import SEGMENT_BLOCKS, BlockShape, Records, map_blocks, segment_path, write_blocks
from infllm_agent.errors import CorruptSession

#: Blocks that host memory is taken for at a time.
HOST_BLOCKS = 64
#: Written blocks stay in pinned memory until there are so many bytes of them.
PINNED_BYTES = 1 << 28


class BlockStore:
    """All sealed blocks of a session, below the device. Blocks are numbered from 0 and never change.

    New blocks lie in host memory; once they are in the session's files they are memory-mapped from there, verified
    when first read.
    """

    def __init__(self, shape: BlockShape, *, pin: bool = False) -> None:
        self.shape = shape
        self._pin = pin
        self._segments: list[Records] = []
        self._bases: list[int] = []  # number of the first block of each segment
        self.folder: Path | None = None  # of the mapped files, for errors that name them
        self._unverified = np.zeros((0, shape.layers), dtype=np.bool_)  # of the mapped blocks, what is not checked yet
        self.mapped = 0  # blocks that lie in mapped files
        self.mapped_reads = 0  # how often ``get`` found one there
        self.count = 0

    def add(self, count: int) -> int:
        """Room for ``count`` more blocks, to be filled with ``put`` for every layer; returns the first one's number."""
        first = self.count
        self.count += count
        while not self._segments or self.count > self._bases[-1] + self._segments[-1].count:
            base = self._bases[-1] + self._segments[-1].count if self._segments else 0
            self._segments.append(Records.empty(self.shape, HOST_BLOCKS, pin=self._pin))
            self._bases.append(base)
        return first

    def put(self, first: int, layer: int, k: Tensor, v: Tensor, representatives: Tensor) -> None:
        """Store one layer of consecutive blocks: ``k``, ``v`` (count, kv_heads, block_size, head_dim) and the
        representative keys (count, kv_heads, head_dim)."""
        done = 0
        while done < len(k):
            records, index = self._locate(first + done)
            here = min(len(k) - done, records.count - index)
            into, part = slice(index, index + here), slice(done, done + here)
            records.kv[into, layer, 0] = k[part].to("cpu")
            records.kv[into, layer, 1] = v[part].to("cpu")
            records.representatives[into, layer] = representatives[part].to("cpu")
            done += here

    def get(self, block: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (kv_heads, block_size, head_dim) of one layer, as views of host memory.

        Raises:
            CorruptSession: the stored bytes fail their checksum.
        """
        records, index = self._locate(block)
        self._verify(records, index, block, layer)
        self.mapped_reads += block < self.mapped
        return records.kv[index, layer, 0], records.kv[index, layer, 1]

    def keys(self, blocks: Sequence[int], layer: int) -> Tensor:
        """Keys (kv_heads, len(blocks), block_size, head_dim) of one layer's ``blocks``, ascending, copied together on
        the CPU.

        Raises:
            CorruptSession: the stored bytes fail their checksum.
        """
        shape = self.shape
        size = (len(blocks), shape.kv_heads, shape.block_size, shape.head_dim)
        keys = torch.empty(size, dtype=shape.torch_dtype, pin_memory=self._pin)
        mapped = np.array(blocks[: bisect_left(blocks, self.mapped)], dtype=np.int64)
        for block in mapped[self._unverified[mapped, layer]].tolist():
            self._verify(*self._locate(block), block, layer)
        wanted = torch.tensor(blocks)
        edges = np.searchsorted(blocks, [*self._bases, self.count]).tolist()
        for records, base, (start, stop) in zip(self._segments, self._bases, pairwise(edges), strict=True):
            if start < stop:
                torch.index_select(records.kv[:, layer, 0], 0, wanted[start:stop] - base, out=keys[start:stop])
        return keys.transpose(0, 1)

    def _verify(self, records: Records, index: int, block: int, layer: int) -> None:
        if block >= self.mapped or not self._unverified[block, layer]:
            return
        if not records.verify_layer(index, layer):
            assert self.folder is not None
            path = segment_path(self.folder, block // SEGMENT_BLOCKS)
            raise CorruptSession(f"{path}: block {block}, layer {layer}: keys and values fail their checksum")
        self._unverified[block, layer] = False

    def representatives(self, first: int, stop: int) -> Tensor:
        """Representatives of blocks ``first .. stop - 1``: (stop - first, layers, kv_heads, head_dim)."""
        shape = self.shape
        rows = torch.empty((stop - first, shape.layers, shape.kv_heads, shape.head_dim), dtype=shape.torch_dtype)
        for row, block in zip(rows, range(first, stop), strict=True):
            records, index = self._locate(block)
            row.copy_(records.representatives[index])
        return rows

    def write_new(self, folder: Path, first: int) -> int:
        """Write blocks ``first .. count - 1`` to the session's files and fsync them. Returns bytes written."""
        rows = []
        for block in range(first, self.count):
            records, index = self._locate(block)
            if block >= self.mapped:  # those keep the checksums they came with: damage must not be sealed in
                records.seal(index)
            rows.append(records.bytes[index])
        return write_blocks(folder, self.shape, first, rows)

    def host_bytes_with(self, unwritten: int) -> int:
        """Most bytes of host memory held when never more than so many blocks wait to be written."""
        segments = -(-unwritten // HOST_BLOCKS) + 1
        return segments * HOST_BLOCKS * self.shape.stride + (PINNED_BYTES if self._pin else 0)

    def release_written(self, folder: Path) -> None:
        """All blocks are in the session's files: give host memory back, and read them from there. Pinned memory, from
        which a GPU loads faster, is kept up to ``PINNED_BYTES``."""
        if self.host_bytes() > (PINNED_BYTES if self._pin else 0):
            self.map(folder, self.count)

    def map(self, folder: Path, count: int) -> None:
        """Take ``count`` blocks, those already mapped among them, from a session's files instead of host memory. In an
        empty store they are those of an earlier process.

        Raises:
            CorruptSession: a file is missing or damaged.
        """
        if self.count not in (0, count):
            raise ValueError(f"this store holds {self.count} blocks; {count} of a file cannot take their place")
        whole = self.mapped // SEGMENT_BLOCKS if folder == self.folder else 0
        known = self._unverified[: whole * SEGMENT_BLOCKS]
        self._segments = [*self._segments[:whole], *map_blocks(folder, self.shape, count, first_segment=whole)]
        self._bases = [i * SEGMENT_BLOCKS for i in range(len(self._segments))]
        self.folder = folder
        self._unverified = np.concatenate([known, np.ones((count - len(known), self.shape.layers), dtype=np.bool_)])
        self.count = self.mapped = count

    def fork(self, count: int) -> BlockStore:
        """An independent store of the first ``count`` blocks. Nothing is copied; its own go to new segments."""
        fork = BlockStore(self.shape, pin=self._pin)
        fork.folder, fork.mapped, fork.count = self.folder, min(self.mapped, count), count
        fork._unverified = self._unverified[:count]  # shared: both read the same map
        for base, records in zip(self._bases, self._segments, strict=True):
            if base >= count:
                break
            if count - base < records.count:  # what room there is behind is the original's
                records = Records(self.shape, records.bytes[: count - base].view(-1))
            fork._segments.append(records)
            fork._bases.append(base)
        return fork

    def host_bytes(self) -> int:
        """Bytes of host memory held, mapped files not counted. May be asked while another thread adds blocks."""
        held = zip(self._bases, self._segments, strict=False)
        return sum(records.bytes.numel() for base, records in held if base >= self.mapped)

    def _locate(self, block: int) -> tuple[Records, int]:
        if not 0 <= block < self.count:
            raise ValueError(f"block {block} is not stored; there are {self.count}")
        segment = bisect_right(self._bases, block) - 1
        return self._segments[segment], block - self._bases[segment]


class CacheCounters(NamedTuple):
    hits: int
    misses: int


class BlockCache:
    """The blocks of one layer that lie on the device: a fixed number of slots, least recently used out first.

    Slots are preallocated: (kv_heads, slots, block_size, head_dim) for keys and for values.
    """

    def __init__(self, slots: int, shape: BlockShape, device: torch.device) -> None:
        size = (shape.kv_heads, slots, shape.block_size, shape.head_dim)
        self.k = torch.empty(size, dtype=shape.torch_dtype, device=device)
        self.v = torch.empty(size, dtype=shape.torch_dtype, device=device)
        self.slots = slots
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # block -> slot, least recently used first
        self._free = list(reversed(range(slots)))
        self._hits = 0
        self._misses = 0

    def fetch(self, blocks: Sequence[int], load: Callable[[int], tuple[Tensor, Tensor]]) -> list[int]:
        """The slots of ``blocks``, loading those that are absent. None of ``blocks`` is evicted for another of them.

        Args:
            load: gives a block's keys and values, each (kv_heads, block_size, head_dim), on any device.

        Raises:
            ValueError: more blocks than slots.
        """
        if len(blocks) > self.slots:
            raise ValueError(f"{len(blocks)} blocks asked for at once, but the cache has {self.slots} slots")
        missing = [block for block in blocks if block not in self._slot_of]
        for block in blocks:
            if block in self._slot_of:
                self._slot_of.move_to_end(block)
        self._hits += len(blocks) - len(missing)
        self._misses += len(missing)
        for block in missing:
            k, v = load(block)  # before anything is evicted: a failed load leaves the cache as it was
            slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
            self.k[:, slot].copy_(k, non_blocking=True)
            self.v[:, slot].copy_(v, non_blocking=True)
            self._slot_of[block] = slot
        return [self._slot_of[block] for block in blocks]

    def __contains__(self, block: int) -> bool:
        return block in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def counters(self) -> CacheCounters:
        """Hits and misses so far, in blocks."""
        return CacheCounters(self._hits, self._misses)

    def device_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free and used slots together are all slots, each once."""
        used = list(self._slot_of.values())
        if sorted(used + self._free) != list(range(self.slots)):
            raise RuntimeError(f"slots are lost or shared: used {used}, free {self._free}, of {self.slots}")
