"""The index of one layer: one key for every block, which every lookup reads. The one thing that grows."""

from __future__ import annotations

import torch
from torch import Tensor

#: Blocks there is room for at first; the room doubles when it is full.
INDEX_STEP = 2048


class BlockIndex:
    """A key (kv_heads, head_dim) for each block, in one array on the device.

    In float32, because the scores of a thousand similar blocks differ by less than bfloat16 can tell apart.
    """

    def __init__(self, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self._rows = torch.empty((INDEX_STEP, kv_heads, head_dim), device=device)
        self._shared = False
        self.count = 0

    @property
    def keys(self) -> Tensor:
        """(count, kv_heads, head_dim) float32."""
        return self._rows[: self.count]

    def growth(self, count: int) -> int:
        """Bytes more that it will take when so many blocks are appended."""
        return (self._room(self.count + count) - self._rows.shape[0]) * self._rows[0].nbytes

    def append(self, keys: Tensor) -> None:
        """Add the keys (n, kv_heads, head_dim) of the next n blocks."""
        stop = self.count + keys.shape[0]
        room = self._room(stop)
        if room > self._rows.shape[0] or self._shared:
            grown = self._rows.new_empty((room, *self._rows.shape[1:]))
            grown[: self.count] = self._rows[: self.count]
            self._rows, self._shared = grown, False
        self._rows[self.count : stop] = keys
        self.count = stop

    def _room(self, count: int) -> int:
        """For how many blocks there is room once there are ``count``."""
        room = self._rows.shape[0]
        return room if count <= room else max(2 * room, -(-count // INDEX_STEP) * INDEX_STEP)

    def fork(self, count: int) -> BlockIndex:
        """An independent index of the first ``count`` blocks: nothing is copied until it grows."""
        fork = object.__new__(BlockIndex)
        # Rows below `self.count` never change, so both may read them; only the original goes on writing behind them.
        fork._rows, fork._shared, fork.count = self._rows, True, count
        return fork

    def device_bytes(self) -> int:
        return self._rows.nbytes
