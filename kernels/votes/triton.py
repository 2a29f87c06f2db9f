"""Votes in Triton, over keys where they lie.

Two passes over the keys: the first finds how large the softmax of each query is, the second divides the votes. No
array of queries times blocks is ever stored, and sums are in a fixed order, so that results repeat to the bit.

Shared memory of a program, with tiles of N keys and R = 32 queries of D channels, in float32 whatever keys are stored
in: a tile of each on its way into a product, (N + R) · D · 4 bytes at most. For D = 128 and the largest tile here,
N = 128: 80 KiB, which is what is compiled; consumer GPUs have 99.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_agent.kernels.triton_common import configs, power_of_two, precision

#: Queries of a tile.
ROWS = 32
#: Keys of one program of the first pass, in each of which the softmax is summed up.
PART = 512

CONFIGS = configs("BLOCK_N", (64, 4, 1), (32, 4, 1), (32, 4, 2), (128, 4, 1), (128, 8, 1))


def votes(q: Tensor, keys: Tensor, scale: float, others: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
    """Divide one vote of each query of each head among keys, by a softmax; never waits for the device.

    Args:
        q: (q_heads, n, head_dim) float32.
        keys: (blocks, kv_heads, head_dim), of any strides but the last.
        others: (kv_heads, queries of a key head, 1) float32, log Σ exp(scale · q·k) over further keys, which take their
            part of the votes.
        chosen: (m,) int64, the keys that are voted on; None: all.

    Returns:
        (blocks,) or (m,) float32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    blocks, kv_heads, dim = keys.shape
    q_heads, n = q.shape[:2]
    if q.dim() != 3 or q.shape[2] != dim or q_heads % kv_heads:
        raise ValueError(f"expected q (a multiple of {kv_heads}, n, {dim}), got {tuple(q.shape)}")
    if keys.stride(2) != 1:
        raise ValueError(f"the channels of a key must lie side by side, got strides {keys.stride()}")
    queries = q_heads // kv_heads * n
    if others is not None and others.shape != (kv_heads, queries, 1):
        raise ValueError(f"expected others ({kv_heads}, {queries}, 1), got {tuple(others.shape)}")
    count = blocks if chosen is None else len(chosen)
    scores = torch.empty(count, dtype=torch.float32, device=q.device)
    if not count:
        return scores
    q = q.float().contiguous()
    parts = triton.cdiv(count, PART)
    lse = torch.empty((kv_heads, parts, queries), dtype=torch.float32, device=q.device)
    common = {
        "QUERIES": queries,
        "DIM": dim,
        "DIM_PADDED": power_of_two(dim, 16),
        "ROWS": ROWS,
        "CHOSEN": chosen is not None,
        "PRECISION": precision(keys),
    }
    which = chosen if chosen is not None else keys
    strides = (keys.stride(0), keys.stride(1))
    _sizes[(kv_heads, parts, triton.cdiv(queries, ROWS))](
        q, keys, which, lse, count, scale, *strides, PART=PART, **common
    )
    sizes = lse if others is None else torch.cat([lse, others.mT], dim=1)
    total = torch.logsumexp(sizes, dim=1)
    _divide[lambda meta: (triton.cdiv(count, meta["BLOCK_N"]),)](
        q, keys, which, total, scores, count, scale, *strides, KV_HEADS=kv_heads, **common
    )
    return scores


@triton.jit
def _logits(
    q, keys, which, row, column, head, count, scale, key_stride, head_stride,
    QUERIES: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute scale · q·k of some queries and keys; -inf where there is no key."""
    channels = tl.arange(0, DIM_PADDED)[None, :]
    there = column < count
    block = tl.load(which + column, mask=there, other=0) if CHOSEN else column
    place = block.to(tl.int64)[:, None] * key_stride + head * head_stride + channels
    k = tl.load(keys + place, mask=there[:, None] & (channels < DIM), other=0.0).to(tl.float32)
    q_place = (head * QUERIES + row)[:, None] * DIM + channels
    rows = tl.load(q + q_place, mask=(row < QUERIES)[:, None] & (channels < DIM), other=0.0)
    logits = tl.dot(rows, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where(there[None, :], logits, -float("inf"))


@triton.autotune(configs=CONFIGS, key=["QUERIES", "DIM"])
@triton.jit
def _sizes(
    q, keys, which, lse, count, scale, key_stride, head_stride,
    QUERIES: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    CHOSEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute log Σ exp over one part of the keys, for some queries of one key head."""
    head, part = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    most = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    mass = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(part * PART, tl.minimum(part * PART + PART, count), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        logits = _logits(
            q, keys, which, row, column, head, count, scale, key_stride, head_stride,
            QUERIES, DIM, DIM_PADDED, CHOSEN, PRECISION,
        )  # fmt: skip
        now = tl.maximum(most, tl.max(logits, axis=1))
        mass = mass * tl.exp(most - now) + tl.sum(tl.exp(logits - now[:, None]), axis=1)
        most = now
    place = (head * tl.num_programs(1) + part) * QUERIES + row
    tl.store(lse + place, most + tl.log(mass), mask=row < QUERIES)


@triton.autotune(configs=CONFIGS, key=["QUERIES", "DIM"])
@triton.jit
def _divide(
    q, keys, which, total, scores, count, scale, key_stride, head_stride,
    KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr,
    CHOSEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum up what some keys get of all votes."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    score = tl.zeros([BLOCK_N], dtype=tl.float32)
    for head in range(KV_HEADS):
        for first in range(0, QUERIES, ROWS):
            row = first + tl.arange(0, ROWS)
            logits = _logits(
                q, keys, which, row, column, head, count, scale, key_stride, head_stride,
                QUERIES, DIM, DIM_PADDED, CHOSEN, PRECISION,
            )  # fmt: skip
            size = tl.load(total + head * QUERIES + row, mask=row < QUERIES, other=float("inf"))
            score += tl.sum(tl.exp(logits - size[:, None]), axis=0)
    tl.store(scores + column, score, mask=column < count)
