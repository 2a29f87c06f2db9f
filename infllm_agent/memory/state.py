"""What a memory is besides its sealed blocks, as a value; and what it was at an earlier length.

How a session's tokens divide into sinks, blocks and window follows from their number. Sealed blocks hold keys and
values exactly as the window held them, so that an earlier window can be put together again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from infllm_agent.blocks.store import BlockStore
from infllm_agent.config import MemoryConfig


class Division(NamedTuple):
    """A session's tokens divided, oldest first: the number of sinks, and of blocks between them and the window."""

    sinks: int
    blocks: int

    @classmethod
    def of(cls, length: int, config: MemoryConfig) -> Division:
        evicted = length - config.n_init - config.n_local
        return cls(config.n_init, evicted // config.block_size) if evicted >= 0 else cls(0, 0)

    def first_window_token(self, config: MemoryConfig) -> int:
        return self.sinks + self.blocks * config.block_size


class WindowState(NamedTuple):
    """A window's tokens, each tensor (kv_heads, n, head_dim) without rotary embedding."""

    k: Tensor
    v: Tensor
    queries: Tensor | None


class LayerState(NamedTuple):
    """One layer that sees everything: keys and values of its sinks (2, kv_heads, n, head_dim), its window, and the
    blocks (n,) among which the next token chooses if it comes alone; None: it looks them up."""

    sinks: Tensor
    window: WindowState
    candidates: Tensor | None = None


@dataclass(frozen=True)
class MemoryState:
    """A memory of ``length`` tokens, between two chunks. Layers are in their order, by the model's layer numbers."""

    length: int
    layers: dict[int, LayerState]
    sliding: dict[int, WindowState]

    def can_rewind(self, length: int, config: MemoryConfig) -> bool:
        """Tell whether the state at an earlier length can be told from this one.

        Not if a layer slides by itself and has dropped what it would need. Nor if a token would have to come back to
        the window, and the window keeps queries (``block_key="representatives"``), which blocks and sinks do not, or
        blocks are rounded (``block_dtype="int8"``).
        """
        if not 0 <= length <= self.length:
            return False
        if length == self.length:
            return True
        if any(window.k.shape[1] < self.length for window in self.sliding.values()):
            return False
        with_queries = any(layer.window.queries is not None for layer in self.layers.values())
        exact = config.block_dtype == "model" and not with_queries
        return exact or Division.of(length, config) == Division.of(self.length, config)

    def rewound(self, length: int, config: MemoryConfig, blocks: BlockStore) -> MemoryState:
        """Restore the state as it was at an earlier end of a chunk. Views of this one where it can be.

        Args:
            blocks: the sealed blocks; those past the earlier length are read, as far as its window reaches.

        Raises:
            ValueError: ``can_rewind`` says no.
            CorruptSession: a stored block fails its checksum.
        """
        if not self.can_rewind(length, config):
            raise ValueError(f"a memory of {self.length} tokens cannot tell what it was at {length}; replay the log")
        if length == self.length:
            return self
        layers = {
            number: self._layer(layer, index, length, config, blocks)
            for index, (number, layer) in enumerate(self.layers.items())
        }
        sliding = {number: _cut(window, 0, length) for number, window in self.sliding.items()}
        return MemoryState(length, layers, sliding)

    def _layer(
        self, layer: LayerState, index: int, length: int, config: MemoryConfig, blocks: BlockStore
    ) -> LayerState:
        then, now = Division.of(length, config), Division.of(self.length, config)
        first = then.first_window_token(config)
        if then == now:
            return LayerState(layer.sinks, _cut(layer.window, 0, length - first))
        # What the window had then, oldest first: perhaps the sinks, blocks sealed since, and perhaps its own tokens.
        back = [layer.sinks] if then.sinks < now.sinks else []
        last = min(now.blocks, -(-(length - now.sinks) // config.block_size))
        if then.blocks < last:
            again = range(then.blocks, last)
            pairs = torch.stack([blocks.keys(again, index), blocks.values(again, index)]).to(layer.sinks.device)
            back.append(pairs.transpose(1, 2).flatten(2, 3))
        window = torch.stack([layer.window.k, layer.window.v])
        k, v = torch.cat([*back, window], dim=2)[:, :, : length - first]
        return LayerState(layer.sinks[:, :, : then.sinks], WindowState(k, v, None))


def _cut(window: WindowState, start: int, stop: int) -> WindowState:
    return WindowState(*(part[:, start:stop] if part is not None else None for part in window))  # type: ignore[arg-type]
