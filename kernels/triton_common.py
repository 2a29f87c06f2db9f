"""What the Triton kernels have in common."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

#: Shared memory that a program may use, in bytes: what consumer GPUs have (compute capability 8.6, 8.9, 12.0).
SHARED_BYTES = 99 * 1024


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def configs(tile: str, *choices: tuple[int, int, int]) -> list[triton.Config]:
    """List what the autotuner tries: sizes of the tile of that name, with warps and stages. The interpreter, which
    measures nothing, gets the first."""
    found = [triton.Config({tile: size}, num_warps=warps, num_stages=stages) for size, warps, stages in choices]
    return found[:1] if interpreted() else found


def power_of_two(size: int, least: int) -> int:
    """Round ``size`` up to the size of a tile. Matrix products need at least 16 of everything."""
    return max(least, 1 << (size - 1).bit_length())


def precision(x: Tensor) -> str:
    """Choose the precision of matrix products: float32 stays float32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
