"""Attention of one decoded token in Triton: keys are read once, where they are, and far ones rotated on the way.

One program takes one key head, with all query heads that share it, and a share of the keys (split-K); a second launch
merges the shares by their log-sum-exps.

Shared memory of a program, with tiles of N keys, of D channels of b bytes, in S stages: tiles of keys, values, cosines
and sines under way, (S - 1) · N · D · (2 · b + 4), and weights and output on their way into and out of a product,
16 · (N · b + D · 4). For D = 128 in half precision the largest tiles here, 64 keys in two stages, make 64 KiB + 10 KiB,
and that is what is compiled; consumer GPUs have 99. What would take more (float32, larger heads) is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_agent.kernels.attention import Partial
from infllm_agent.kernels.decode_attention.keys import DecodeKeys, check
from infllm_agent.kernels.triton_common import SHARED_BYTES, configs, interpreted, power_of_two, precision

#: Most shares of the keys.
MOST_SPLITS = 64
#: Keys of the smallest tile: no share is smaller.
LEAST_KEYS = 32

CONFIGS = configs("BLOCK_N", (32, 4, 1), (32, 2, 2), (32, 4, 2), (32, 4, 3), (64, 4, 2), (64, 8, 2))

NONE, ONE_ANGLE, CONTIGUOUS = 0, 1, 2


def decode_attention(
    q: Tensor, keys: DecodeKeys, *, scale: float, softcap: float | None = None, splits: int | None = None
) -> Partial:
    """Attend with one token; never waits for the device.

    Args:
        splits: shares of the keys; None: enough for all of the device to work.
    """
    check(q, keys)
    q_heads, dim = q.shape
    kv_heads, _, block_size, _ = keys.cache_k.shape
    for name in ("sink_k", "sink_v", "near_k", "near_v", "cache_k", "cache_v"):
        x = getattr(keys, name)
        if x.stride(-1) != 1 or x.stride(-2) != dim or (x.dim() == 4 and x.stride(1) != block_size * dim):
            raise ValueError(f"{name} must have its rows one behind the other, got strides {x.stride()}")
    for k, v in ((keys.sink_k, keys.sink_v), (keys.near_k, keys.near_v), (keys.cache_k, keys.cache_v)):
        if k.stride(0) != v.stride(0):
            raise ValueError(f"keys and values must have the same strides, got {k.stride()} and {v.stride()}")
    group, angles = q_heads // kv_heads, keys.angles
    if splits is None:
        room = keys.sink_k.shape[1] + keys.slots.shape[0] * block_size + keys.near_k.shape[1]
        splits = _splits(kv_heads, room, q.device)
    q = q.contiguous()
    shares = torch.empty((q_heads, splits, dim), dtype=torch.float32, device=q.device)
    share_lse = torch.empty((q_heads, splits), dtype=torch.float32, device=q.device)
    out, lse = torch.empty_like(q), torch.empty(q_heads, dtype=torch.float32, device=q.device)
    _attend_shares[(kv_heads, splits)](
        q,
        keys.sink_k,
        keys.sink_v,
        keys.cache_k,
        keys.cache_v,
        keys.slots,
        keys.near_k,
        keys.near_v,
        angles.cos if angles is not None else q,
        angles.sin if angles is not None else q,
        keys.bounds,
        shares,
        share_lse,
        scale,
        softcap or 0.0,
        keys.sink_k.stride(0),
        keys.cache_k.stride(0),
        keys.near_k.stride(0),
        GROUP=group,
        GROUP_PADDED=power_of_two(group, 16),
        DIM=dim,
        HALF_PADDED=power_of_two(dim // 2, 16),
        DIM_PADDED=power_of_two(dim, 16),
        BLOCK_SIZE=block_size,
        ROTARY=angles.cos.shape[1] if angles is not None else 0,
        INTERLEAVED=angles.interleaved if angles is not None else False,
        POSITIONS=NONE if angles is None else CONTIGUOUS if angles.far_distance is None else ONE_ANGLE,
        FAR_DISTANCE=(angles.far_distance or 0) if angles is not None else 0,
        SOFTCAP=softcap is not None,
        SPLITS=splits,
        PRECISION=precision(q),
        WIDEN=interpreted(),  # its products do not know bfloat16
    )
    _merge_shares[(q_heads,)](
        shares,
        share_lse,
        out,
        lse,
        DIM=dim,
        DIM_PADDED=power_of_two(dim, 16),
        SPLITS=splits,
        SPLITS_PADDED=power_of_two(splits, 1),
        num_warps=4,
    )
    return Partial(out.unsqueeze(1), lse.unsqueeze(1))


def _splits(kv_heads: int, keys: int, device: torch.device) -> int:
    """Choose the number of shares: each processor of the device gets two programs, and each program some keys."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(MOST_SPLITS, -(-2 * processors // kv_heads), -(-keys // LEAST_KEYS)))


@triton.jit
def _pairs(DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HALF_PADDED: tl.constexpr):
    """Pair the channels: those that rotate together make a pair; the others are paired in their order."""
    i = tl.arange(0, HALF_PADDED)
    if INTERLEAVED:
        first = tl.where(i < ROTARY, 2 * i, i + ROTARY)
        second = tl.where(i < ROTARY, 2 * i + 1, i + DIM // 2)
    else:
        first = tl.where(i < ROTARY, i, i + ROTARY)
        second = tl.where(i < ROTARY, i + ROTARY, i + DIM // 2)
    return first, second


@triton.jit
def _rotate(first, second, cos_of, sin_of, positions, there, ROTARY: tl.constexpr, HALF_PADDED: tl.constexpr):
    """Rotate rows, of which the two channels of each pair are given, to their positions."""
    i = tl.arange(0, HALF_PADDED)[None, :]
    where = positions[:, None] * ROTARY + i
    rotates = there[:, None] & (i < ROTARY)
    cos = tl.load(cos_of + where, mask=rotates, other=1.0)
    sin = tl.load(sin_of + where, mask=rotates, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def _take(
    q_first, q_second, k_first, k_second, v, there, most, mass, out, scale, softcap,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the softmax so far, which is its largest logit, its mass and its output."""
    if WIDEN:
        q_first, q_second = q_first.to(tl.float32), q_second.to(tl.float32)
        k_first, k_second = k_first.to(tl.float32), k_second.to(tl.float32)
    logits = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
    logits = tl.dot(q_second, tl.trans(k_second), logits, input_precision=PRECISION) * scale
    if SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)  # tanh
    logits = tl.where(there[None, :], logits, -float("inf"))
    now = tl.maximum(most, tl.max(logits, axis=1))
    weights = tl.exp(logits - now[:, None])
    shrink = tl.exp(most - now)
    mass = mass * shrink + tl.sum(weights, axis=1)
    weights = weights.to(v.dtype)
    if WIDEN:
        weights, v = weights.to(tl.float32), v.to(tl.float32)
    out = tl.dot(weights, v, out * shrink[:, None], input_precision=PRECISION)
    return now, mass, out


def shared_bytes(keys: int, dim: int, itemsize: int, stages: int) -> int:
    """Compute the bytes of shared memory that a program takes, as described above."""
    return (stages - 1) * keys * dim * (2 * itemsize + 4) + 16 * (keys * itemsize + dim * 4)


def fitting(candidates: list[triton.Config], given: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Keep those of the autotuner's candidates that fit consumer GPUs; the smallest at least."""
    dim, itemsize = constants["DIM_PADDED"], given["q"].element_size()
    sizes = {
        candidate: shared_bytes(candidate.kwargs["BLOCK_N"], dim, itemsize, candidate.num_stages)
        for candidate in candidates
    }
    return [one for one, size in sizes.items() if size <= SHARED_BYTES] or [min(sizes, key=lambda one: sizes[one])]


@triton.autotune(
    configs=CONFIGS,
    key=["GROUP", "DIM", "BLOCK_SIZE", "POSITIONS"],
    prune_configs_by={"early_config_prune": fitting},
)
@triton.jit
def _attend_shares(
    q, sink_k, sink_v, cache_k, cache_v, slots, near_k, near_v, cos, sin, bounds, shares, share_lse, scale, softcap,
    sink_stride, cache_stride, near_stride,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DIM: tl.constexpr, HALF_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    POSITIONS: tl.constexpr, FAR_DISTANCE: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to one share of the keys of one key head."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    n_sinks, n_blocks = tl.load(bounds), tl.load(bounds + 1)
    start, stop = tl.load(bounds + 2), tl.load(bounds + 3)
    looked_up = n_blocks * BLOCK_SIZE

    # Tiles of sinks, then of blocks, then of the window; this share has some of them.
    sinks_end = tl.cdiv(n_sinks, BLOCK_N)
    blocks_end = sinks_end + tl.cdiv(looked_up, BLOCK_N)
    tiles = blocks_end + tl.cdiv(stop - start, BLOCK_N)
    share = tl.cdiv(tiles, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, tiles)

    first, second = _pairs(DIM, ROTARY, INTERLEAVED, HALF_PADDED)
    paired = tl.arange(0, HALF_PADDED) < DIM // 2
    members = tl.arange(0, GROUP_PADDED)
    is_member = members < GROUP
    q_rows = q + (head * GROUP + members)[:, None] * DIM
    q_there = is_member[:, None] & paired[None, :]
    q_first = tl.load(q_rows + first[None, :], mask=q_there, other=0.0)
    q_second = tl.load(q_rows + second[None, :], mask=q_there, other=0.0)
    near_first, near_second = q_first, q_second
    far_first, far_second = q_first, q_second
    if POSITIONS != 0:
        at = tl.zeros([GROUP_PADDED], dtype=tl.int32)
        near_first, near_second = _rotate(q_first, q_second, cos, sin, at + stop - 1, is_member, ROTARY, HALF_PADDED)
        # Contiguous: behind all sinks, blocks and the window.
        far = at + FAR_DISTANCE if POSITIONS == 1 else at + n_sinks + looked_up + stop - start - 1
        far_first, far_second = _rotate(q_first, q_second, cos, sin, far, is_member, ROTARY, HALF_PADDED)

    channels = tl.arange(0, DIM_PADDED)[None, :]
    rows = tl.arange(0, BLOCK_N)
    most = tl.full([GROUP_PADDED], -float("inf"), dtype=tl.float32)
    mass = tl.zeros([GROUP_PADDED], dtype=tl.float32)
    out = tl.zeros([GROUP_PADDED, DIM_PADDED], dtype=tl.float32)

    for tile in range(begin, tl.minimum(end, sinks_end)):
        row = tile * BLOCK_N + rows
        there = row < n_sinks
        place = head * sink_stride + row[:, None] * DIM
        k_there = there[:, None] & paired[None, :]
        k_first = tl.load(sink_k + place + first[None, :], mask=k_there, other=0.0)
        k_second = tl.load(sink_k + place + second[None, :], mask=k_there, other=0.0)
        v = tl.load(sink_v + place + channels, mask=there[:, None] & (channels < DIM), other=0.0)
        if POSITIONS == 2:
            k_first, k_second = _rotate(k_first, k_second, cos, sin, row, there, ROTARY, HALF_PADDED)
        most, mass, out = _take(
            far_first,
            far_second,
            k_first,
            k_second,
            v,
            there,
            most,
            mass,
            out,
            scale,
            softcap,
            SOFTCAP,
            PRECISION,
            WIDEN,
        )

    for tile in range(tl.maximum(begin, sinks_end), tl.minimum(end, blocks_end)):
        row = (tile - sinks_end) * BLOCK_N + rows
        there = row < looked_up
        slot = tl.load(slots + row // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        place = head * cache_stride + (slot * BLOCK_SIZE + row % BLOCK_SIZE)[:, None] * DIM
        k_there = there[:, None] & paired[None, :]
        k_first = tl.load(cache_k + place + first[None, :], mask=k_there, other=0.0)
        k_second = tl.load(cache_k + place + second[None, :], mask=k_there, other=0.0)
        v = tl.load(cache_v + place + channels, mask=there[:, None] & (channels < DIM), other=0.0)
        if POSITIONS == 2:
            k_first, k_second = _rotate(k_first, k_second, cos, sin, n_sinks + row, there, ROTARY, HALF_PADDED)
        most, mass, out = _take(
            far_first,
            far_second,
            k_first,
            k_second,
            v,
            there,
            most,
            mass,
            out,
            scale,
            softcap,
            SOFTCAP,
            PRECISION,
            WIDEN,
        )

    for tile in range(tl.maximum(begin, blocks_end), end):
        row = start + (tile - blocks_end) * BLOCK_N + rows
        there = row < stop
        place = head * near_stride + row[:, None] * DIM
        k_there = there[:, None] & paired[None, :]
        k_first = tl.load(near_k + place + first[None, :], mask=k_there, other=0.0)
        k_second = tl.load(near_k + place + second[None, :], mask=k_there, other=0.0)
        v = tl.load(near_v + place + channels, mask=there[:, None] & (channels < DIM), other=0.0)
        most, mass, out = _take(
            near_first,
            near_second,
            k_first,
            k_second,
            v,
            there,
            most,
            mass,
            out,
            scale,
            softcap,
            SOFTCAP,
            PRECISION,
            WIDEN,
        )

    # A share without keys has no mass: its log-sum-exp is -inf, and its output counts for nothing.
    at = (head * GROUP + members) * SPLITS + split
    tl.store(share_lse + at, most + tl.log(mass), mask=is_member)
    out = out / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(shares + at[:, None] * DIM + channels, out, mask=is_member[:, None] & (channels < DIM))


@triton.jit
def _merge_shares(
    shares, share_lse, out, lse,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    """Merge all shares of one query head into one softmax."""
    head = tl.program_id(0)
    split = tl.arange(0, SPLITS_PADDED)
    channels = tl.arange(0, DIM_PADDED)[None, :]
    each = tl.load(share_lse + head * SPLITS + split, mask=split < SPLITS, other=-float("inf"))
    most = tl.max(each, axis=0)
    weights = tl.exp(each - most)
    total = tl.sum(weights, axis=0)
    there = (split < SPLITS)[:, None] & (channels < DIM)
    parts = tl.load(shares + (head * SPLITS + split)[:, None] * DIM + channels, mask=there, other=0.0)
    merged = tl.sum(parts * (weights / total)[:, None], axis=0)
    channel = tl.arange(0, DIM_PADDED)
    tl.store(out + head * DIM + channel, merged.to(out.dtype.element_ty), mask=channel < DIM)
    tl.store(lse + head, most + tl.log(total))
