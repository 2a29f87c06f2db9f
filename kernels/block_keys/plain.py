"""What stands for a sealed block, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_keys(k: Tensor) -> Tensor:
    """Average each block's keys (kv_heads, count, block_size, head_dim) to (kv_heads, count, head_dim) float32."""
    return k.mean(dim=2, dtype=torch.float32)


def representative_keys(k: Tensor, queries: Tensor, n_local: int, repr_topk: int) -> Tensor:
    """Average the ``repr_topk`` keys of each block that received the most attention (``representative_scores``).

    Args:
        k: (kv_heads, count, block_size, head_dim), of consecutive tokens.
        queries: (kv_heads, ≥ count · block_size + n_local, head_dim), of the same tokens and those after them.

    Returns:
        (kv_heads, count, head_dim) float32.
    """
    scores = representative_scores(k.flatten(1, 2), queries, n_local).view(k.shape[:3])
    chosen = scores.topk(repr_topk, dim=2).indices
    return k.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])).mean(dim=2, dtype=torch.float32)


def representative_scores(k: Tensor, queries: Tensor, n_local: int) -> Tensor:
    """Compute how much attention each of some tokens received from the ``n_local`` tokens after it (InfLLM, eq. 3).

        r_m = 1/l Σ_{j=1..l} q_{m+j} · k_m

    A running sum over the queries gives every r_m with one dot product.

    Args:
        k: (kv_heads, size, head_dim), the tokens m, m + 1, ...
        queries: (kv_heads, ≥ size + n_local, head_dim), the queries of m, m + 1, ... averaged over the heads
            that share a key head.

    Returns:
        (kv_heads, size) float32.
    """
    size = k.shape[1]
    queries = queries[:, : size + n_local].float()
    running = queries[:, n_local:] - queries[:, :size]  # as m moves on, one query enters the sum and one leaves
    first_sum = queries[:, :n_local].sum(dim=1, keepdim=True)
    # Σ_{j=1..l} q_{m+j} for m = 0, 1, ...: entering q_{m+l}, leaving q_m.
    sums = first_sum + running.cumsum(dim=1)
    return (sums * k.float()).sum(dim=-1) / n_local
