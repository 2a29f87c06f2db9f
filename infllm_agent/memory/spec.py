"""What the memory must know of a model's attention layers; and the layers that need no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infllm_agent.blocks.layout import BlockShape
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.attention import attend
from infllm_agent.kernels.rotary import Rotary
from infllm_agent.memory.window import Window


@dataclass(frozen=True)
class LayerSpec:
    """What the memory must know of one attention layer.

    Args:
        rotary: how positions rotate queries and keys; None for a layer without rotary embedding.
        sliding_window: for a layer that the model itself limits to its latest tokens, their number; such a layer
            keeps just that window and has no blocks. None for a layer that sees everything.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary | None
    sliding_window: int | None = None


def block_shape(config: MemoryConfig, specs: dict[int, LayerSpec], dtype: torch.dtype) -> BlockShape:
    """The shape of a block over the given layers.

    Raises:
        ValueError: the layers' key heads or head sizes differ.
    """
    shapes = {(spec.kv_heads, spec.head_dim) for spec in specs.values()}
    if len(shapes) != 1:
        raise ValueError(f"layers that see everything must have one (kv_heads, head_dim), got {sorted(shapes)}")
    ((kv_heads, head_dim),) = shapes
    name = str(dtype).removeprefix("torch.")
    return BlockShape(len(specs), kv_heads, config.block_size, head_dim, name, config.block_dtype)


class SlidingLayer:
    """One layer that the model limits to its latest tokens: it keeps that window and nothing else."""

    def __init__(self, spec: LayerSpec, config: MemoryConfig, dtype: torch.dtype, device: torch.device) -> None:
        assert spec.sliding_window is not None
        self.reach = spec.sliding_window  # a query sees this many tokens, its own included
        self.window = Window(
            spec.kv_heads,
            spec.head_dim,
            spec.rotary,
            capacity=self.reach + config.chunk_size,
            slack=max(config.chunk_size, self.reach // 2),
            with_queries=False,
            dtype=dtype,
            device=device,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attention of a chunk (heads, n, head_dim) to the latest ``reach`` tokens, each query its own."""
        window, n = self.window, q.shape[1]
        window.stage(k, v)
        keys = slice(window.start, window.stop + n)
        mask = None
        if n > 1:
            distance = (
                torch.arange(len(window), len(window) + n, device=q.device)[:, None]
                - torch.arange(len(window) + n, device=q.device)[None, :]
            )
            mask = (distance >= 0) & (distance < self.reach)
        part = attend(
            window.rotate_queries(q),
            window.k_rotated[:, keys],
            window.v[:, keys],
            scale=scale,
            mask=mask,
            softcap=softcap,
        )
        return part.out

    def advance(self, n: int) -> None:
        self.window.advance(n)
        self.window.drop(max(0, len(self.window) - (self.reach - 1)))

    def device_bytes(self) -> int:
        return self.window.device_bytes()
