"""Attention of one decoded token from its definition, key by key in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_agent.kernels.decode_attention.keys import DecodeKeys


def decode_attention(
    q: Tensor, keys: DecodeKeys, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return output (q_heads, 1, head_dim) and log-sum-exp (q_heads, 1); keys are rotated pair of channels by pair."""
    n_sinks, n_blocks, start, stop = keys.bounds.tolist()
    kv_heads, _, block_size, _ = keys.cache_k.shape
    far = [(keys.sink_k[:, i], keys.sink_v[:, i]) for i in range(n_sinks)]
    for slot in keys.slots[:n_blocks].tolist():
        far += [(keys.cache_k[:, slot, i], keys.cache_v[:, slot, i]) for i in range(block_size)]
    near = [(keys.near_k[:, i], keys.near_v[:, i]) for i in range(start, stop)]
    end = len(far) + len(near) - 1
    far_position, contiguous = end, True
    if keys.angles is not None and keys.angles.far_distance is not None:
        far_position, contiguous = keys.angles.far_distance, False
    outs, lses = [], []
    for head in range(len(q)):
        shared = head * kv_heads // len(q)
        q_far, q_near = _turned(q[head], far_position, keys), _turned(q[head], stop - 1, keys)
        logits = [
            q_far @ _turned(k[shared], position if contiguous else 0, keys) for position, (k, _) in enumerate(far)
        ] + [q_near @ k[shared].double() for k, _ in near]
        each = torch.stack(logits) * scale
        if softcap is not None:
            each = softcap * torch.tanh(each / softcap)
        outs.append(torch.softmax(each, 0) @ torch.stack([v[shared].double() for _, v in far + near]))
        lses.append(torch.logsumexp(each, 0))
    return torch.stack(outs).unsqueeze(1).to(q.dtype), torch.stack(lses).unsqueeze(1).float()


def _turned(x: Tensor, position: int, keys: DecodeKeys) -> Tensor:
    """Rotate a query or key (head_dim,) to a position, in float64."""
    out = x.double().clone()
    if keys.angles is None or position == 0:
        return out
    cos, sin, half = keys.angles.cos[position].double(), keys.angles.sin[position].double(), keys.angles.cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if keys.angles.interleaved else (i, i + half)
        first, second = out[a].clone(), out[b].clone()
        out[a], out[b] = first * cos[i] - second * sin[i], second * cos[i] + first * sin[i]
    return out
