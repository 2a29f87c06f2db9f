"""Attention over one set of keys, with its log-sum-exp, and the exact merge of several sets.

Attention over disjoint sets of keys can be computed apart and merged exactly: each set's output is weighted with
its share of the total softmax mass, which its log-sum-exp gives. ``attend`` chooses what computes, by device and dtype;
all of it is checked against ``reference``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention of all queries over one set of keys."""

    out: Tensor  # (q_heads, n, head_dim), normalised within the set
    lse: Tensor  # (q_heads, n) float32: log of the set's softmax denominator


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Attend with ``q`` (q_heads, n, head_dim) to ``k``, ``v`` (kv_heads, m, head_dim).

    Args:
        scale: factor on q·k.
        causal: query i sees keys 0..i; needs n == m.
        mask: (n, m) bool, True where a query may see a key; every query must see at least one.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(q, k, v, causal, mask)
    if softcap is not None or not _has_fused(q, mask):
        return _attend_plain(q, k, v, scale, causal, mask, softcap)
    return _attend_fused(q, k, v, scale, causal, mask)


def merge(parts: Sequence[Partial]) -> Partial:
    """Merge attention over several sets of keys into one softmax over their union."""
    if len(parts) == 1:
        return parts[0]
    lse = parts[0].lse
    for part in parts[1:]:
        lse = torch.logaddexp(lse, part.lse)  # far fewer operations than a log-sum-exp over all
    out = sum(part.out.float() * (part.lse - lse).exp_().unsqueeze(-1) for part in parts)
    assert isinstance(out, Tensor)
    return Partial(out.to(parts[0].out.dtype), lse)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "expected q (q_heads, n, head_dim) and k, v (kv_heads, m, head_dim), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] % k.shape[0]:
        raise ValueError(f"{q.shape[0]} query heads cannot share {k.shape[0]} key heads evenly")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal attention needs as many keys as queries, got {k.shape[1]} and {q.shape[1]}")
    if mask is not None and mask.shape != (q.shape[1], k.shape[1]):
        raise ValueError(f"expected a mask ({q.shape[1]}, {k.shape[1]}), got {tuple(mask.shape)}")


def _has_fused(q: Tensor, mask: Tensor | None) -> bool:
    if q.device.type == "cuda":
        # The CUDA flash kernel takes no mask, half precision only, and head sizes in multiples of 8 up to 256.
        half = q.dtype in (torch.float16, torch.bfloat16)
        return half and mask is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64, torch.bfloat16)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Partial:
    """Attend with PyTorch's flash kernels. Query heads that share a key head are folded, so keys are never repeated."""
    kv_heads, group = k.shape[0], q.shape[0] // k.shape[0]
    n = q.shape[1]
    if causal or mask is not None:
        # As a batch of key heads: the expanded keys have stride 0 over the group and are not copied.
        q = q.reshape(kv_heads, group, n, -1)
        k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
    else:
        # Without a mask all rows are alike: the group's queries are simply more rows.
        q = q.reshape(1, kv_heads, group * n, -1)
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    if q.device.type == "cuda":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))[None, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    return Partial(out.reshape(kv_heads * group, n, -1), lse.reshape(kv_heads * group, n).float())


def _attend_plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None, softcap: float | None
) -> Partial:
    """Attend with two matrix products and a softmax: on any device, in any dtype, with soft-capped logits."""
    kv_heads, group = k.shape[0], q.shape[0] // k.shape[0]
    n, m = q.shape[1], k.shape[1]
    logits = (q.reshape(kv_heads, group * n, -1) @ k.transpose(1, 2)).float().mul_(scale)
    if softcap is not None:
        logits = torch.tanh_(logits.div_(softcap)).mul_(softcap)
    logits = logits.view(kv_heads, group, n, m)
    if causal:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril_()
    if mask is not None:
        logits.masked_fill_(~mask, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = logits.sub_(lse.unsqueeze(-1)).exp_().to(v.dtype)
    out = weights.view(kv_heads, group * n, m) @ v
    return Partial(out.view(kv_heads * group, n, -1), lse.view(kv_heads * group, n))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend head by head in float64: the reference for ``attend``.

    Returns:
        Outputs (q_heads, n, head_dim), log-sum-exps (q_heads, n).
    """
    group = q.shape[0] // k.shape[0]
    outs, lses = [], []
    for head in range(q.shape[0]):
        logits = q[head].double() @ k[head // group].double().T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        outs.append(torch.softmax(logits, -1) @ v[head // group].double())
        lses.append(torch.logsumexp(logits, -1))
    return torch.stack(outs).to(q.dtype), torch.stack(lses).float()
