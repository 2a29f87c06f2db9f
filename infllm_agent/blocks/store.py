"""Three tiers for the blocks of a session: device slots (LRU) over host memory (LRU) over files.

``BlockCache`` is the first, of one layer. ``BlockStore`` is what lies below: sealed blocks wait in host memory to be
written; those in files are read, a plane at a time, through the cache that all sessions share (``Tiers``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infllm_agent.blocks.budgets import Tiers
from infllm_agent.blocks.host_cache import Blocks, SlotTable
from infllm_agent.blocks.layout import CRC_BYTES, BlockShape, checksum, decode, encode, is_keys
from infllm_agent.blocks.segments import READ_TOGETHER, SEGMENT_BLOCKS, BlockFiles
from infllm_agent.errors import BudgetExceeded

#: Blocks that host memory is taken for at a time.
HOST_BLOCKS = 32
#: Most parts in which a store's blocks are in the host cache; forks of forks begin anew there.
MOST_TABLES = 8


@dataclass(frozen=True)
class _Room:
    """Host memory for ``size`` sealed blocks that are in no file yet, from block ``first`` on."""

    first: int
    size: int
    records: Tensor  # (≥ size, stride) uint8, as they will be written
    keys: Tensor  # (≥ size, layers, key_bytes) uint8

    @classmethod
    def new(cls, shape: BlockShape, first: int, *, pin: bool) -> _Room:
        records = torch.zeros((HOST_BLOCKS, shape.stride), dtype=torch.uint8, pin_memory=pin)
        return cls(
            first, HOST_BLOCKS, records, torch.zeros((HOST_BLOCKS, shape.layers, shape.key_bytes), dtype=torch.uint8)
        )

    @property
    def stop(self) -> int:
        return self.first + self.size

    @property
    def nbytes(self) -> int:
        return self.records.nbytes + self.keys.nbytes


class StoreCounters(NamedTuple):
    """Planes found in host memory, and read from files."""

    host: int
    disk: int


class BlockStore:
    """All sealed blocks of a session, below the device. Blocks are numbered from 0 and never change.

    Attributes:
        count: of all blocks.
        stored: how many, the first ones, are in files.
        counters: what was asked for so far.
    """

    def __init__(self, shape: BlockShape, tiers: Tiers | None = None) -> None:
        self.shape = shape
        self.tiers = tiers or Tiers()
        self.count = 0
        self.stored = 0
        self.counters = StoreCounters(0, 0)
        self._files: BlockFiles | None = None
        self._own = False  # whether the files are its own to write to
        self._rooms: list[_Room] = []  # of blocks from ``stored`` on
        self._cache = self.tiers.cache(shape)
        self._tables = [(0, SlotTable(shape.planes))]  # of the host cache, each for blocks from a number on
        self.tiers.hold(self)

    @property
    def files(self) -> BlockFiles:
        """The files of the stored blocks."""
        if self._files is None:
            raise ValueError("this memory belongs to no session: its blocks are in no files")
        return self._files

    def least_host_bytes(self) -> int:
        """Compute a budget under which a session can work: a quarter of it takes what a few chunks seal."""
        return 4 * 4 * self._room_bytes

    @property
    def _room_bytes(self) -> int:
        return HOST_BLOCKS * (self.shape.stride + self.shape.layers * self.shape.key_bytes)

    # -- what comes in ----------------------------------------------------------------------------------------------

    def reserve(self, blocks: int) -> None:
        """Make sure of host memory for ``blocks`` more: write what waits if there is not enough.

        Raises:
            BudgetExceeded: they do not fit, and there is no file to write to.
            OSError: nothing was lost.
        """
        lack = blocks - (self._rooms[-1].stop - self.count if self._rooms else 0)
        if lack <= 0:
            return
        more = -(-lack // HOST_BLOCKS) * self._room_bytes
        try:
            self.tiers.reserve_host(more)
        except BudgetExceeded:
            if not self._own:
                raise
            self.write()

    def add(self, count: int) -> int:
        """Make room for ``count`` more blocks, to be filled with ``put`` for every layer; returns the first number."""
        first = self.count
        self.count += count
        while not self._rooms or self.count > self._rooms[-1].stop:
            stop = self._rooms[-1].stop if self._rooms else first
            self._rooms.append(_Room.new(self.shape, stop, pin=self.tiers.pin))
        return first

    def put(self, first: int, layer: int, k: Tensor, v: Tensor, keys: Tensor) -> None:
        """Store one layer of consecutive blocks.

        Args:
            k, v: (count, kv_heads, block_size, head_dim).
            keys: (count, kv_heads, head_dim), what stands for each block, in the model's dtype.
        """
        shape, count = self.shape, k.shape[0]
        rows = [encode(x, plane, shape) for plane, x in ((2 * layer, k), (2 * layer + 1, v))]
        names = keys.to("cpu", shape.torch_dtype).contiguous().view(count, -1).view(torch.uint8)
        for room, into in self._waiting(first, first + count):
            part = slice(room.first + into.start - first, room.first + into.stop - first)
            for plane, row in zip((2 * layer, 2 * layer + 1), rows, strict=True):
                start = shape.place(plane)
                room.records[into, start : start + shape.plane_bytes(plane)] = row[part]
            room.keys[into, layer] = names[part]

    # -- what goes out ----------------------------------------------------------------------------------------------

    def keys(self, blocks: Sequence[int], layer: int, device: torch.device | None = None) -> Tensor:
        """Give the keys (len(blocks), kv_heads, block_size, head_dim) of one layer's ``blocks``, ascending.

        Raises:
            CorruptSession: the stored bytes fail their checksum.
        """
        return self._planes(blocks, 2 * layer, device)

    def values(self, blocks: Sequence[int], layer: int, device: torch.device | None = None) -> Tensor:
        """Give the values, as ``keys`` does the keys."""
        return self._planes(blocks, 2 * layer + 1, device)

    def _planes(self, blocks: Sequence[int], plane: int, device: torch.device | None) -> Tensor:
        if blocks and not 0 <= blocks[0] <= blocks[-1] < self.count:
            raise ValueError(f"blocks {blocks[0]} to {blocks[-1]} are not all stored; there are {self.count}")
        shape, stored = self.shape, bisect_left(blocks, self.stored)
        size = shape.plane_bytes(plane)
        raw = torch.empty((len(blocks), self._cache.slot_bytes), dtype=torch.uint8, pin_memory=self.tiers.pin)
        read = sum(
            self._cache.gather(
                table, plane, np.array(blocks[part], dtype=np.int64), raw[part], partial(self._read, table, plane)
            )
            for table, part in self._cached(blocks, stored)
        )
        self.counters = StoreCounters(self.counters.host + len(blocks) - read, self.counters.disk + read)
        place, wanted = shape.place(plane), torch.tensor(blocks)
        for room in self._rooms if stored < len(blocks) else ():
            here = slice(bisect_left(blocks, room.first), bisect_left(blocks, room.stop))
            if here.start < here.stop:
                raw[here, :size] = room.records[:, place : place + size].index_select(0, wanted[here] - room.first)
        if device is not None and device.type != "cpu":
            raw = raw.to(device, non_blocking=True)
        return decode(raw, plane, shape)

    def _cached(self, blocks: Sequence[int], stored: int) -> Iterator[tuple[SlotTable, slice]]:
        """Find the table of the host cache that each of the first ``stored`` of some blocks is in."""
        starts = [bisect_left(blocks, first, hi=stored) for first, _ in self._tables]
        for (_, table), start, stop in zip(self._tables, starts, [*starts[1:], stored], strict=True):
            if start < stop:
                yield table, slice(start, stop)

    def _read(self, table: SlotTable, plane: int, wanted: Blocks, into: Tensor) -> None:
        """Read planes that are not in host memory. What one layer has to read, the next one often has to: the system is
        told, and can fetch it while this layer computes."""
        following = plane + 2
        if is_keys(plane) and following < self.shape.planes and len(wanted) >= READ_TOGETHER:
            absent = wanted[table.slots[following, wanted] < 0]
            self.files.expect(absent.tolist(), following)
        self.files.read(wanted.tolist(), plane, into.numpy())

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, files: BlockFiles) -> BlockStore:
        """Make a store of what is in some files."""
        store = cls(files.shape)
        store.attach(files)
        return store

    def attach(self, files: BlockFiles) -> None:
        """Give an empty store the blocks of some files; new ones will be written there."""
        if self.count:
            raise ValueError(f"this store holds {self.count} blocks already")
        self._files, self._own = files, True
        self.count = self.stored = files.count

    def write(self) -> None:
        """Put all blocks that wait on stable storage, and give their host memory back.

        Raises:
            OSError, BudgetExceeded: nothing is lost, and what was in the files is whole.
        """
        if not self._own:
            raise ValueError("the files of these blocks belong to another session")
        records: list[Tensor] = []
        keys: list[Tensor] = []
        for room, part in self._waiting(self.stored, self.count):
            for index in range(part.start, part.stop):
                self._seal(room.records[index], room.first + index)
            records += room.records[part].unbind()
            keys += room.keys[part].flatten(1).unbind()
        if records:
            self.tiers.reserve_disk(sum(part.nbytes for part in [*records, *keys]))
            self.files.append(records, keys)
        self.stored, self._rooms = self.count, []

    def move(self, folder: Path, shared: int) -> None:
        """Take files of its own in a new folder, with all blocks.

        Args:
            shared: how many of the first blocks will never change in the files they are in. Those are not copied, as
                far as they fill segments.

        Raises:
            OSError, CorruptSession, BudgetExceeded.
        """
        if self._files is None:
            self._files = BlockFiles(folder, self.shape)
        else:
            copied = self.stored - min(self.stored, shared) // SEGMENT_BLOCKS * SEGMENT_BLOCKS
            self.tiers.reserve_disk(copied * self.shape.stride)
            self._files = self._files.fork(folder, self.stored, shared)
        self._own = True
        self.write()

    def fork(self, count: int) -> BlockStore:
        """Make an independent store of the first ``count`` blocks. Nothing is copied. It reads this one's files until
        it is moved to its own; of what both have there, what one of them read is in host memory for both."""
        fork = BlockStore(self.shape, self.tiers)
        fork.count, fork.stored, fork._files = count, min(count, self.stored), self._files
        if len(self._tables) < MOST_TABLES:
            own = (fork.stored, fork._tables[0][1])
            fork._tables = [*(pair for pair in self._tables if pair[0] < fork.stored), own]
        # What room there is behind is the original's.
        fork._rooms = [replace(r, size=min(r.size, count - r.first)) for r in self._rooms if r.first < count]
        return fork

    def _waiting(self, first: int, stop: int) -> Iterator[tuple[_Room, slice]]:
        """Find where the waiting blocks ``first`` to ``stop - 1`` lie: in each room, their places."""
        for room in self._rooms:
            here = slice(max(first, room.first) - room.first, min(stop, room.stop) - room.first)
            if here.start < here.stop:
                yield room, here

    def _seal(self, record: Tensor, block: int) -> None:
        """Put the checksums behind a record's planes."""
        data = record.numpy()
        for plane in range(self.shape.planes):
            start = self.shape.place(plane)
            stop = start + self.shape.plane_bytes(plane)
            data[stop : stop + CRC_BYTES] = np.frombuffer(checksum(data[start:stop].data, block, plane), dtype=np.uint8)

    def unwritten(self) -> dict[int, int]:
        """Count bytes of host memory by the address of what holds them, which forks share. Any thread may ask."""
        return {room.records.data_ptr(): room.nbytes for room in list(self._rooms)}

    def host_bytes(self) -> int:
        """Count the bytes of blocks that wait in host memory to be written. The cache is the runtime's and not
        counted."""
        return sum(self.unwritten().values())
