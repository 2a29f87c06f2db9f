"""Eight-bit storage of a block's keys or values: one scale for each head, rounded to the nearest."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each head's numbers by their largest magnitude, as 127 steps.

    Args:
        x: (n, heads, size, head_dim) of any float type.

    Returns:
        int8 (n, heads, size, head_dim), and the float32 scales (n, heads): their product is ``x`` to half a scale.
    """
    x = x.float()
    scales = x.abs().amax(dim=(2, 3)) / 127
    steps = torch.where(scales > 0, scales, 1.0)[:, :, None, None]
    return (x / steps).round_().to(torch.int8), scales


def dequantize(q: Tensor, scales: Tensor) -> Tensor:
    """Restore what ``quantize`` was given, to half a scale: float32 (n, heads, size, head_dim)."""
    return q.float() * scales[:, :, None, None]


def rounded(x: Tensor) -> Tensor:
    """Round each number to the nearest multiple of the 127th part of its head's largest, as quantizing and back
    does."""
    out = torch.empty_like(x, dtype=torch.float32)
    for block in range(x.shape[0]):
        for head in range(x.shape[1]):
            numbers = x[block, head].float()
            step = numbers.abs().max() / 127
            out[block, head] = torch.round(numbers / step) * step if step > 0 else 0.0
    return out
