"""The far keys of a layer: sinks and looked-up blocks, with the positions that the configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infllm_agent.blocks import BlockCache
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.rotary import RotaryTable
from infllm_agent.window import Window


class FarKeys:
    """Sinks, then the blocks looked up last, in their order: one contiguous set of keys.

    Attributes:
        k, v: (kv_heads, n_init + topk · block_size, head_dim), without rotary embedding.
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
        most = config.n_init + config.topk * size
        self.k = cache.k.new_empty((heads, most, dim))
        self.v = torch.empty_like(self.k)
        self.rotary: RotaryTable | None = None
        self._k_rotated = self.k
        if window.rotary is not None and config.positions == "contiguous":
            self.rotary = RotaryTable(window.rotary.rotary, most + window.size, self.k.device)
            self._k_rotated = torch.empty_like(self.k)

    @property
    def n(self) -> int:
        """Sinks and looked-up keys."""
        return self.n_sinks + len(self._blocks) * self.config.block_size

    def keep_sinks(self, k: Tensor, v: Tensor) -> None:
        """The session's first tokens, (kv_heads, n, head_dim) each."""
        self.n_sinks = k.shape[1]
        self.k[:, : self.n_sinks], self.v[:, : self.n_sinks] = k, v
        self._rotate()

    def sinks(self) -> Tensor:
        """Their keys and values (2, kv_heads, n_sinks, head_dim)."""
        return torch.stack([self.k[:, : self.n_sinks], self.v[:, : self.n_sinks]])

    def gather(self, blocks: list[int], load: Callable[[list[int]], tuple[Tensor, Tensor]]) -> None:
        """Put ``blocks`` behind the sinks, through the device cache, which may ``load`` them."""
        if blocks == self._blocks:
            return
        slots = torch.tensor(self.cache.fetch(blocks, load), device=self.k.device)
        behind = slice(self.n_sinks, self.n_sinks + len(blocks) * self.config.block_size)
        self.k[:, behind] = self.cache.k.index_select(1, slots).flatten(1, 2)
        self.v[:, behind] = self.cache.v.index_select(1, slots).flatten(1, 2)
        self._blocks = list(blocks)
        self._rotate()

    def rotated(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The queries (q_heads, n, head_dim) behind the window as the far keys see them, and these keys, rotated."""
        k = self._k_rotated[:, : self.n]
        if self.rotary is not None:
            return self.rotary.rotate(q, self.n + len(self._window)), k
        if self._window.rotary is not None:
            # Keys at position 0, which is no rotation; queries at n_local: one distance for all (paper, 3.2).
            return self._window.rotary.rotate_all_to(q, self.config.n_local), k
        return q, k

    def _rotate(self) -> None:
        """Give the keys their positions: as if they were one text, from 0 on. ``one_angle`` leaves them at 0."""
        if self.rotary is not None:
            self._k_rotated[:, : self.n] = self.rotary.rotate(self.k[:, : self.n], 0)

    def device_bytes(self) -> int:
        buffers = [self.k, self.v] + ([self._k_rotated] if self.rotary is not None else [])
        return sum(buffer.nbytes for buffer in buffers)
