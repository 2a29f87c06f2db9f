"""What the memory must know of a model's attention layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infllm_agent.blocks.layout import BlockShape
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.rotary import Rotary


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
    """Find the shape of a block over the given layers.

    Raises:
        ValueError: the layers' key heads or head sizes differ.
    """
    shapes = {(spec.kv_heads, spec.head_dim) for spec in specs.values()}
    if len(shapes) != 1:
        raise ValueError(f"layers that see everything must have one (kv_heads, head_dim), got {sorted(shapes)}")
    ((kv_heads, head_dim),) = shapes
    name = str(dtype).removeprefix("torch.")
    return BlockShape(len(specs), kv_heads, config.block_size, head_dim, name, config.block_dtype)
