"""The top tier: blocks of one layer in slots on the device, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infllm_agent.blocks.layout import BlockShape


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

    def fetch(self, blocks: Sequence[int], load: Callable[[list[int]], tuple[Tensor, Tensor]]) -> list[int]:
        """Find the slots of ``blocks``, loading those that are absent. None of ``blocks`` is evicted for another.

        Args:
            load: gives the keys and values of absent blocks, in their order, each (n, kv_heads, block_size, head_dim),
                on the device.

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
        if missing:
            k, v = load(missing)  # before anything is evicted: a failed load leaves the cache as it was
            slots = [self._free.pop() if self._free else self._slot_of.popitem(last=False)[1] for _ in missing]
            where = torch.tensor(slots, device=self.k.device)
            self.k.index_copy_(1, where, k.transpose(0, 1))
            self.v.index_copy_(1, where, v.transpose(0, 1))
            self._slot_of.update(zip(missing, slots, strict=True))
        return [self._slot_of[block] for block in blocks]

    def count_hits(self, blocks: int) -> None:
        """Count blocks that were there, and were read without being asked for."""
        self._hits += blocks

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
