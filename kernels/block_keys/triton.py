"""What stands for a sealed block, in Triton: the mean of its keys, or of its representatives among them.

No shared memory but what sums take. A program holds a block's keys and, for representatives, two runs of summed queries
in registers: at most three tiles of (block_size, head_dim) float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_agent.kernels.triton_common import power_of_two


def mean_keys(k: Tensor) -> Tensor:
    """Average each block's keys (kv_heads, count, block_size, head_dim) to (kv_heads, count, head_dim) float32."""
    kv_heads, count, size, dim = _checked(k)
    out = torch.empty((kv_heads, count, dim), dtype=torch.float32, device=k.device)
    if count:
        _mean[(kv_heads, count)](k, out, k.stride(0), k.stride(1), **_sizes(size, dim), num_warps=_warps(size, dim))
    return out


def representative_keys(k: Tensor, queries: Tensor, n_local: int, repr_topk: int) -> Tensor:
    """Average the ``repr_topk`` keys of each block that received the most attention from the ``n_local`` tokens after
    them.

    Args:
        k: (kv_heads, count, block_size, head_dim), the tokens m, m + 1, ...
        queries: (kv_heads, ≥ count · block_size + n_local, head_dim), the queries of m, m + 1, ...

    Returns:
        (kv_heads, count, head_dim) float32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    kv_heads, count, size, dim = _checked(k)
    needed = count * size + n_local
    if queries.shape[0] != kv_heads or queries.shape[1] < needed or queries.shape[2] != dim:
        raise ValueError(f"expected queries ({kv_heads}, ≥ {needed}, {dim}), got {tuple(queries.shape)}")
    if not 1 <= repr_topk <= size:
        raise ValueError(f"a block of {size} keys has no {repr_topk} representatives")
    out = torch.empty((kv_heads, count, dim), dtype=torch.float32, device=k.device)
    if count:
        # Σ q of the tokens before each: the sum over any run of tokens is the difference of two.
        sums = torch.zeros((kv_heads, needed + 1, dim), dtype=torch.float32, device=k.device)
        torch.cumsum(queries[:, :needed].float(), dim=1, out=sums[:, 1:])
        _representatives[(kv_heads, count)](
            k,
            sums,
            out,
            k.stride(0),
            k.stride(1),
            sums.stride(0),
            n_local,
            TOPK=repr_topk,
            **_sizes(size, dim),
            num_warps=_warps(size, dim),
        )
    return out


def _checked(k: Tensor) -> tuple[int, int, int, int]:
    if k.dim() != 4 or k.stride(3) != 1 or k.stride(2) != k.shape[3]:
        raise ValueError(
            f"expected keys (kv_heads, count, block_size, head_dim) with a block's keys one behind the other, "
            f"got {tuple(k.shape)} with strides {k.stride()}"
        )
    kv_heads, count, size, dim = k.shape
    return kv_heads, count, size, dim


def _sizes(size: int, dim: int) -> dict[str, int]:
    return {"SIZE": size, "DIM": dim, "SIZE_PADDED": power_of_two(size, 1), "DIM_PADDED": power_of_two(dim, 1)}


def _warps(size: int, dim: int) -> int:
    """Choose the number of warps such that each thread holds some 32 numbers of a tile."""
    return max(1, min(16, power_of_two(size, 1) * power_of_two(dim, 1) // 1024))


@triton.jit
def _mean(
    k, out, head_stride, block_stride,
    SIZE: tl.constexpr, DIM: tl.constexpr, SIZE_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, channel = tl.arange(0, SIZE_PADDED), tl.arange(0, DIM_PADDED)
    there = (token < SIZE)[:, None] & (channel < DIM)[None, :]
    place = head * head_stride + block * block_stride + token[:, None] * DIM + channel[None, :]
    x = tl.load(k + place, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / SIZE
    tl.store(out + (head * tl.num_programs(1) + block) * DIM + channel, mean, mask=channel < DIM)


@triton.jit
def _representatives(
    k, sums, out, head_stride, block_stride, sums_stride, n_local,
    TOPK: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, SIZE_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, channel = tl.arange(0, SIZE_PADDED), tl.arange(0, DIM_PADDED)
    there = (token < SIZE)[:, None] & (channel < DIM)[None, :]
    place = head * head_stride + block * block_stride + token[:, None] * DIM + channel[None, :]
    x = tl.load(k + place, mask=there, other=0.0).to(tl.float32)
    # Of token m: Σ_{j=1..l} q_{m+j} = S_{m+l+1} - S_{m+1}, where S_m sums the queries before m.
    begin = sums + head * sums_stride + (block * SIZE + token + 1)[:, None] * DIM + channel[None, :]
    low = tl.load(begin, mask=there, other=0.0)
    high = tl.load(begin + n_local * DIM, mask=there, other=0.0)
    score = tl.where(token < SIZE, tl.sum((high - low) * x, axis=1), -float("inf"))
    chosen = tl.zeros([DIM_PADDED], dtype=tl.float32)
    for _ in range(TOPK):
        best = tl.argmax(score, axis=0)
        chosen += tl.sum(tl.where((token == best)[:, None], x, 0.0), axis=0)
        score = tl.where(token == best, -float("inf"), score)
    tl.store(out + (head * tl.num_programs(1) + block) * DIM + channel, chosen / TOPK, mask=channel < DIM)
