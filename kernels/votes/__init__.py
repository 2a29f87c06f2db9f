"""Which blocks do a chunk's queries ask for? The scores of a lookup, and the best of them.

Positions play no part: queries and keys come without rotary embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_agent.kernels import backend
from infllm_agent.kernels.votes import plain


def votes(q: Tensor, keys: Tensor, scale: float, others: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
    """Divide one vote of each query of each head among keys, by a softmax.

    Args:
        q: (q_heads, n, head_dim) float32.
        keys: (blocks, kv_heads, head_dim).
        scale: the model's factor on q·k.
        others: (kv_heads, queries of a key head, 1) float32, log Σ exp(scale · q·k) over further keys, which take their
            part of the votes; None: there are no further keys.
        chosen: (m,) int64, the keys that are voted on; None: all.

    Returns:
        (blocks,) or (m,) float32.
    """
    if backend.chosen(q) == "triton":
        from infllm_agent.kernels.votes import triton

        return triton.votes(q, keys, scale, others, chosen)
    if chosen is not None:
        keys = keys.flatten(1).index_select(0, chosen).view(-1, *keys.shape[1:])  # far faster than keys[chosen]
    return plain.votes(q, keys, scale) if others is None else plain.votes_among(q, keys, others, scale)


def best(scores: Tensor, count: int) -> Tensor:
    """Find the (min(count, blocks),) blocks with the highest of ``scores`` (blocks,), ascending. A GPU is not waited
    for: the number of the blocks found is known beforehand."""
    highest = scores.topk(min(count, len(scores)), sorted=False).indices
    if backend.chosen(scores) == "triton":
        return highest.sort().values
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[highest] = True
    return chosen.nonzero().squeeze(1)
