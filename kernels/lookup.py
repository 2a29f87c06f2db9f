"""Which blocks do a chunk's queries ask for? The scores of a lookup, coarse and exact, in plain torch.

Positions play no part: queries and keys come without rotary embedding. Each function is checked against
``kernels.reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def representative_scores(k: Tensor, queries: Tensor, n_local: int) -> Tensor:
    """How much attention each of some tokens received from the ``n_local`` tokens after it (InfLLM, eq. 3).

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


def similarity(q: Tensor, block_keys: Tensor) -> Tensor:
    """Every query and head summed raw (InfLLM, eq. 2): sim(X, B) = Σ_i Σ_j q_i · k_{r_j}.

    Both sums are linear: the chunk's mean query times each block's mean representative.

    Args:
        q: (q_heads, n, head_dim).
        block_keys: (blocks, kv_heads, head_dim) float32.

    Returns:
        (blocks,) float32, the sum divided by the number of its terms.
    """
    blocks, kv_heads, head_dim = block_keys.shape
    query = q.view(kv_heads, -1, head_dim).mean(dim=1, dtype=torch.float32)
    return block_keys.view(blocks, -1) @ query.reshape(-1)


def voters(q: Tensor, most: int) -> Tensor:
    """At most ``most`` queries (q_heads, ≤ most, head_dim) float32 that stand for a chunk's (q_heads, n, head_dim):
    runs of neighbours, averaged."""
    heads, n, head_dim = q.shape
    run = -(-n // most)
    q = q.float()
    if run == 1:
        return q
    whole = n - n % run
    means = q[:, :whole].reshape(heads, -1, run, head_dim).mean(dim=2)
    return means if whole == n else torch.cat([means, q[:, whole:].mean(dim=1, keepdim=True)], dim=1)


def votes(q: Tensor, block_keys: Tensor, scale: float) -> Tensor:
    """Each query of each head has one vote, which a softmax divides among the blocks.

    Summed raw, a few heads with long keys would decide alone (TokenSelect, arXiv 2411.02886).

    Args:
        q: (q_heads, n, head_dim) float32.
        block_keys: (blocks, kv_heads, head_dim) float32.
        scale: the model's factor on q·k.

    Returns:
        (blocks,) float32; the sum over blocks is q_heads · n.
    """
    kv_heads, head_dim = block_keys.shape[1:]
    logits = (q * scale).reshape(kv_heads, -1, head_dim) @ block_keys.permute(1, 2, 0)
    return logits.softmax(dim=-1).sum(dim=(0, 1))


def attention_mass(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """As ``votes``, with all keys of each block: its exact share of the attention that goes to these blocks.

    Args:
        q: (q_heads, n, head_dim) float32.
        keys: (kv_heads, blocks, block_size, head_dim).

    Returns:
        (blocks,) float32; the sum over blocks is q_heads · n.
    """
    blocks, size = keys.shape[1:3]
    every = keys.flatten(1, 2).float().transpose(0, 1)
    return votes(q, every, scale).view(blocks, size).sum(dim=-1)
