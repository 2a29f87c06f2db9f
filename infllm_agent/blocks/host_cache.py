"""The middle tier: planes of stored blocks in host memory, least recently used out first."""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Blocks = NDArray[np.int64]


MAP_NORESERVE = 0x4000  # Linux; Python's mmap does not name it


def _reserved(size: int, *, pin: bool) -> Tensor:
    """Reserve (size,) bytes. Unless they are page-locked, memory is taken as they are first written, and the kernel
    promises none before: it would refuse to start processes from one whose promises exceed the machine's memory."""
    if pin or sys.platform != "linux":
        return torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    return torch.frombuffer(
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=torch.uint8
    )


class SlotTable:
    """The places of one session's planes in a ``HostCache``: a slot for each (plane, block), or -1."""

    _numbers = count(1)

    def __init__(self, planes: int) -> None:
        self.number = next(SlotTable._numbers)
        self.slots = np.full((planes, 0), -1, dtype=np.int32)

    def reach(self, blocks: int) -> None:
        """Make room for ``blocks`` blocks."""
        if blocks > self.slots.shape[1]:
            grown = np.full((self.slots.shape[0], max(blocks, 2 * self.slots.shape[1])), -1, dtype=np.int32)
            grown[:, : self.slots.shape[1]] = self.slots
            self.slots = grown


class HostCache:
    """Equal slots for planes of blocks that were read from files; least recently used out first.

    Memory is taken as slots are first used. When all are full, a sixteenth is emptied at once.
    """

    def __init__(self, slots: int, slot_bytes: int, *, pin: bool = False) -> None:
        self.slot_bytes = slot_bytes
        self.pin = pin
        self.hits = 0
        self.reads = 0
        self._lock = threading.RLock()
        self._tables: weakref.WeakValueDictionary[int, SlotTable] = weakref.WeakValueDictionary()
        self._gone: deque[int] = deque()  # tables that were collected, perhaps while this thread was in here
        self.resize(slots)

    def resize(self, slots: int) -> None:
        """Forget everything, and have ``slots`` slots, two at least."""
        with self._lock:
            for table in self._tables.values():
                table.slots[:] = -1
            self.slots = max(2, slots)
            self._rows = _reserved(self.slots * self.slot_bytes, pin=self.pin).view(self.slots, self.slot_bytes)
            self._owner = np.zeros(self.slots, dtype=np.int64)  # number of its table, or 0
            self._plane = np.zeros(self.slots, dtype=np.int32)
            self._block = np.zeros(self.slots, dtype=np.int64)
            self._used = np.zeros(self.slots, dtype=np.int64)
            self._clock = 0
            self._untouched = 0  # slots from this one on were never used
            self._free: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._untouched - len(self._free)

    def bytes(self) -> int:
        """Count the bytes of the slots that were ever used; of all if memory is page-locked."""
        return (self.slots if self.pin else self._untouched) * self.slot_bytes

    def gather(
        self, table: SlotTable, plane: int, blocks: Blocks, out: Tensor, read: Callable[[Blocks, Tensor], None]
    ) -> int:
        """Copy one plane of some blocks to ``out``, through the cache.

        Args:
            blocks: ascending.
            out: (len(blocks), slot_bytes) uint8.
            read: reads that plane of the blocks it is given into (n, slot_bytes). If it fails, nothing is changed.

        Returns:
            How many of them had to be read.
        """
        before = self.reads
        for at in range(0, len(blocks), self.slots // 2):
            part = slice(at, at + self.slots // 2)
            with self._lock:
                slots = self._fetch(table, plane, blocks[part], read)
                torch.index_select(self._rows, 0, torch.from_numpy(slots), out=out[part])
        return self.reads - before

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every slot is either free or in use, and the tables agree."""
        with self._lock:
            self._collect()
            used = np.nonzero(self._owner)[0]
            if len(used) + len(self._free) != self._untouched or np.intersect1d(used, self._free).size:
                raise RuntimeError(f"slots are lost or shared: {len(used)} used, {len(self._free)} free")
            for slot in used.tolist():
                table = self._tables[int(self._owner[slot])]
                if table.slots[self._plane[slot], self._block[slot]] != slot:
                    raise RuntimeError(f"slot {slot} is not where its table says")

    def _fetch(
        self, table: SlotTable, plane: int, blocks: Blocks, read: Callable[[Blocks, Tensor], None]
    ) -> NDArray[np.int64]:
        self._collect()
        if table.number not in self._tables:
            self._tables[table.number] = table
            weakref.finalize(table, self._gone.append, table.number)
        table.reach(int(blocks[-1]) + 1 if len(blocks) else 0)
        slots: NDArray[np.int64] = table.slots[plane, blocks].astype(np.int64)
        self._clock += 1
        missing = slots < 0
        self._used[slots[~missing]] = self._clock
        lack = int(missing.sum())
        self.hits += len(blocks) - lack
        if lack:
            new = self._take(lack)
            wanted = blocks[missing]
            rows = torch.empty((lack, self.slot_bytes), dtype=torch.uint8)
            try:
                read(wanted, rows)
            except BaseException:
                self._free = np.concatenate([self._free, new])
                raise
            self._rows.numpy()[new] = rows.numpy()
            self.reads += lack
            self._owner[new], self._plane[new], self._block[new], self._used[new] = (
                table.number,
                plane,
                wanted,
                self._clock,
            )
            table.slots[plane, wanted] = new
            slots[missing] = new
        return slots

    def _collect(self) -> None:
        while self._gone:
            self._release(np.nonzero(self._owner == self._gone.popleft())[0])

    def _take(self, count: int) -> NDArray[np.int64]:
        """Take ``count`` free slots, emptying those used least recently for it, but none of the running call."""
        fresh = np.arange(self._untouched, min(self.slots, self._untouched + count - len(self._free)), dtype=np.int64)
        if len(fresh):
            self._untouched += len(fresh)
            self._free = np.concatenate([self._free, fresh])
        if (lack := count - len(self._free)) > 0:
            many = max(lack, min(self.slots // 16, self.slots // 2))
            used = np.where(self._owner != 0, self._used, np.iinfo(np.int64).max)
            oldest = np.argpartition(used, many - 1)[:many]
            self._release(oldest)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _release(self, slots: NDArray[np.int64]) -> None:
        for owner in np.unique(self._owner[slots]).tolist():
            mine = slots[self._owner[slots] == owner]
            if (table := self._tables.get(owner)) is not None:
                table.slots[self._plane[mine], self._block[mine]] = -1
        self._owner[slots] = 0
        self._free = np.concatenate([self._free, slots])
