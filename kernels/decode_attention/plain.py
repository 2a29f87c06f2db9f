"""Attention of one decoded token in plain torch: far keys are copied together, rotated, and attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_agent.kernels.attention import Partial, attend, merge
from infllm_agent.kernels.decode_attention.keys import DecodeKeys, check
from infllm_agent.kernels.rotary import Rotary


def decode_attention(q: Tensor, keys: DecodeKeys, *, scale: float, softcap: float | None = None) -> Partial:
    """Attend with one token; waits for the device.

    Args:
        q: (q_heads, head_dim) without rotary embedding.

    Returns:
        Output (q_heads, 1, head_dim) and log-sum-exp (q_heads, 1).
    """
    check(q, keys)
    n_sinks, n_blocks, start, stop = keys.bounds.tolist()
    row = q.unsqueeze(1)
    slots = keys.slots[:n_blocks]
    far_k = torch.cat([keys.sink_k[:, :n_sinks], keys.cache_k[:, slots].flatten(1, 2)], dim=1)
    far_v = torch.cat([keys.sink_v[:, :n_sinks], keys.cache_v[:, slots].flatten(1, 2)], dim=1)
    q_far = q_near = row
    n_far, angles = far_k.shape[1], keys.angles
    if angles is not None:
        rotary = Rotary(angles.cos, angles.interleaved)  # only its layout is asked for

        def rotated(x: Tensor, first: int) -> Tensor:
            rows = slice(first, first + x.shape[1])
            return rotary.rotate(x, (angles.cos[rows], angles.sin[rows]))

        q_near = rotated(row, stop - 1)
        if angles.far_distance is None:
            q_far, far_k = rotated(row, n_far + stop - start - 1), rotated(far_k, 0)
        else:
            q_far = rotated(row, angles.far_distance)
    parts = [attend(q_near, keys.near_k[:, start:stop], keys.near_v[:, start:stop], scale=scale, softcap=softcap)]
    if n_far:
        parts.append(attend(q_far, far_k, far_v, scale=scale, softcap=softcap))
    return merge(parts)
