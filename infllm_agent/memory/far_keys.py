"""The far keys of a layer: sinks and looked-up blocks, with the positions that the configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infllm_agent.blocks.device_cache import BlockCache
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.rotary import RotaryTable
from infllm_agent.memory.window import Window


class FarKeys:
    """Sinks, then the blocks looked up last, in their order: one contiguous set of keys.

    Attributes:
        k, v: (kv_heads, n_init + most_topk · block_size, head_dim), without rotary embedding.
        rotary: of their positions, if they are those of one text; None: they have none, or one for all.
        n_sinks: how many of the first ones are there.
    """

    def __init__(self, config: MemoryConfig, cache: BlockCache, window: Window) -> None:
        self.config = config
        self.cache = cache
        self.n_sinks = 0
        self._window = window
        self._blocks: list[int] = []
        heads, _, size, dim = cache.k.shape
        most = config.n_init + config.most_topk * size
        self.k = cache.k.new_empty((heads, most, dim))
        self.v = torch.empty_like(self.k)
        self.rotary: RotaryTable | None = None
        self._k_rotated = self.k
        if window.rotary is not None and config.positions == "contiguous":
            self.rotary = RotaryTable(window.rotary.rotary, most + window.size, self.k.device)
            self._k_rotated = torch.empty_like(self.k)

    @property
    def n(self) -> int:
        """Number of sinks and looked-up keys."""
        return self.n_sinks + len(self._blocks) * self.config.block_size

    def keep_sinks(self, k: Tensor, v: Tensor) -> None:
        """Keep the session's first tokens, (kv_heads, n, head_dim) each, as sinks."""
        self.n_sinks = k.shape[1]
        self.k[:, : self.n_sinks], self.v[:, : self.n_sinks] = k, v
        self._blocks = []  # those gathered before had other places
        self._rotate(slice(0, self.n_sinks))

    def sinks(self) -> Tensor:
        """Give the sinks' keys and values (2, kv_heads, n_sinks, head_dim)."""
        return torch.stack([self.k[:, : self.n_sinks], self.v[:, : self.n_sinks]])

    def gather(self, blocks: list[int], load: Callable[[list[int]], tuple[Tensor, Tensor]]) -> None:
        """Put ``blocks`` behind the sinks, through the device cache, which may ``load`` them. What lies at its place
        already is not touched."""
        if blocks == self._blocks:
            return
        slots = self.cache.fetch(blocks, load)
        changed, self._blocks = _changed(self._blocks, blocks), []  # unknown until all is done
        where = torch.tensor(slots[changed], dtype=torch.int64, device=self.k.device)
        size, (heads, _, dim) = self.config.block_size, self.k.shape
        places = slice(self.n_sinks + changed.start * size, self.n_sinks + changed.stop * size)
        for into, cached in ((self.k, self.cache.k), (self.v, self.cache.v)):
            # Whole blocks as rows: several times as fast as token by token.
            rows = into[:, places].view(heads, len(where), size * dim)
            torch.index_select(cached.flatten(2), 1, where, out=rows)
        self._blocks = list(blocks)
        self._rotate(places)

    def rotated(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the queries (q_heads, n, head_dim) behind the window as the far keys see them, and these keys."""
        k = self._k_rotated[:, : self.n]
        if self.rotary is not None:
            return self.rotary.rotate(q, self.n + len(self._window)), k
        if self._window.rotary is not None:
            # Keys at position 0, which is no rotation; queries at n_local: one distance for all (paper, 3.2).
            return self._window.rotary.rotate_all_to(q, self.config.n_local), k
        return q, k

    def _rotate(self, places: slice) -> None:
        """Give keys their positions: as if they were one text, from 0 on. ``one_angle`` leaves them at 0."""
        if self.rotary is not None:
            self.rotary.rotate(self.k[:, places], places.start, out=self._k_rotated[:, places])

    def device_bytes(self) -> int:
        buffers = [self.k, self.v] + ([self._k_rotated] if self.rotary is not None else [])
        return sum(buffer.nbytes for buffer in buffers)


def _changed(before: list[int], now: list[int]) -> slice:
    """Find the places of ``now``, from the first to the last, where ``before`` has something else or nothing."""
    start, stop = 0, len(now)
    while start < min(len(before), len(now)) and before[start] == now[start]:
        start += 1
    if len(before) == len(now):
        while stop > start and before[stop - 1] == now[stop - 1]:
            stop -= 1
    return slice(start, stop)
