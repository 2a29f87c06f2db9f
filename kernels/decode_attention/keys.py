"""What a decoded token attends to, as the kernels are given it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """How queries and far keys are rotated.

    Attributes:
        cos, sin: (positions, rotary_dim / 2) float32.
        interleaved: as in ``Rotary``.
        far_distance: None: sinks, blocks and window have the positions of one text, far keys from 0 on. A number: all
            far keys are at this distance ("one angle", paper, 3.2).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    far_distance: int | None


class DecodeKeys(NamedTuple):
    """What a token attends to.

    Attributes:
        sink_k, sink_v: (kv_heads, ≥ sinks, head_dim), without rotary embedding.
        cache_k, cache_v: (kv_heads, slots, block_size, head_dim), without rotary embedding.
        slots: (≥ blocks,) int64 or int32, where in the cache the looked-up blocks are, in their order.
        near_k, near_v: (kv_heads, size, head_dim): window and token; keys are rotated to their places.
        bounds: (4,) int32: sinks, blocks, and from where to where the window goes. The token itself comes last.
        angles: None: no rotary embedding.
    """

    sink_k: Tensor
    sink_v: Tensor
    cache_k: Tensor
    cache_v: Tensor
    slots: Tensor
    near_k: Tensor
    near_v: Tensor
    bounds: Tensor
    angles: Angles | None


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Copy numbers to the device, as (len(numbers),) int32; does not wait for it."""
    return _pinned(numbers, device).to(device, non_blocking=True)


def bounds(n_sinks: int, n_blocks: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Make ``DecodeKeys.bounds``; does not wait for the device."""
    return to_device([n_sinks, n_blocks, start, stop], device)


class Bounds:
    """``DecodeKeys.bounds`` at one place in memory, for all layers: they are written once for each token."""

    def __init__(self, device: torch.device) -> None:
        self._numbers: tuple[int, ...] = (0, 0, 0, 0)
        self._on_device = torch.zeros(4, dtype=torch.int32, device=device)

    def set(self, n_sinks: int, n_blocks: int, start: int, stop: int) -> Tensor:
        """Write the numbers, if they have changed; does not wait for the device.

        Returns:
            (4,) int32, for what is computed from now on.
        """
        numbers = (n_sinks, n_blocks, start, stop)
        if numbers != self._numbers:
            self._on_device.copy_(_pinned(numbers, self._on_device.device), non_blocking=True)
            self._numbers = numbers
        return self._on_device


def _pinned(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Put numbers, as int32, into host memory from which a GPU copies by itself."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda" and len(numbers) > 0)


def check(q: Tensor, keys: DecodeKeys) -> None:
    """Refuse keys that a token cannot attend to.

    Raises:
        ValueError: shapes that do not fit together.
    """
    kv_heads, _, _, dim = keys.cache_k.shape
    if q.dim() != 2 or q.shape[1] != dim or q.shape[0] % kv_heads:
        raise ValueError(f"expected q (a multiple of {kv_heads}, {dim}), got {tuple(q.shape)}")
    for name in ("sink_k", "sink_v", "near_k", "near_v"):
        x = getattr(keys, name)
        if x.dim() != 3 or x.shape[0] != kv_heads or x.shape[2] != dim:
            raise ValueError(f"expected {name} ({kv_heads}, n, {dim}), got {tuple(x.shape)}")
    if keys.cache_v.shape != keys.cache_k.shape:
        raise ValueError(f"expected cache_v {tuple(keys.cache_k.shape)}, got {tuple(keys.cache_v.shape)}")
    if keys.bounds.shape != (4,) or keys.bounds.dtype != torch.int32:
        raise ValueError(f"expected bounds (4,) int32, got {tuple(keys.bounds.shape)} {keys.bounds.dtype}")
    if dim % 2:
        raise ValueError(f"an odd head size of {dim} cannot be rotated in pairs")
