"""The scores of a lookup, coarse and exact, in plain torch.

Keys may be of any precision; scores are computed in float32, except where another precision is named.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Block keys that are worked on at once where there are many: few enough for all that is made of them to stay in the
#: processor's cache.
SLAB = 1024
#: With fewer queries the product with all keys is faster the other way round.
FEW = 16


def similarity(q: Tensor, block_keys: Tensor) -> Tensor:
    """Sum every query and head raw (InfLLM, eq. 2): sim(X, B) = Σ_i Σ_j q_i · k_{r_j}.

    Both sums are linear: the chunk's mean query times each block's mean representative.

    Args:
        q: (q_heads, n, head_dim).
        block_keys: (blocks, kv_heads, head_dim).

    Returns:
        (blocks,) float32, the sum divided by the number of its terms.
    """
    blocks, kv_heads, head_dim = block_keys.shape
    query = q.view(kv_heads, -1, head_dim).mean(dim=1, dtype=torch.float32)
    return block_keys.float().view(blocks, -1) @ query.reshape(-1)


def voters(q: Tensor, most: int) -> Tensor:
    """Average runs of neighbouring queries (q_heads, n, head_dim), so that at most ``most`` stand for a chunk.

    Returns:
        (q_heads, ≤ most, head_dim) float32.
    """
    heads, n, head_dim = q.shape
    run = -(-n // most)
    q = q.float()
    if run == 1:
        return q
    whole = n - n % run
    means = q[:, :whole].reshape(heads, -1, run, head_dim).mean(dim=2)
    return means if whole == n else torch.cat([means, q[:, whole:].mean(dim=1, keepdim=True)], dim=1)


def votes(q: Tensor, block_keys: Tensor, scale: float) -> Tensor:
    """Divide one vote of each query of each head among the blocks, by a softmax.

    Summed raw, a few heads with long keys would decide alone (TokenSelect, arXiv 2411.02886).

    Args:
        q: (q_heads, n, head_dim) float32.
        block_keys: (blocks, kv_heads, head_dim).
        scale: the model's factor on q·k.

    Returns:
        (blocks,) float32; the sum over blocks is q_heads · n.
    """
    queries = _by_kv_head(q, block_keys.shape[1], scale)
    converted = [block_keys] if block_keys.dtype == torch.float32 else torch.split(block_keys, 4 * SLAB)
    logits = torch.cat([queries @ keys.float().permute(1, 2, 0) for keys in converted], dim=-1)
    return logits.softmax(dim=-1).sum(dim=(0, 1))


def votes_among(q: Tensor, block_keys: Tensor, others: Tensor, scale: float) -> Tensor:
    """Divide votes among some of all blocks: the rest of each vote goes to the others, whose scores nobody wants.

    Args:
        q, block_keys, scale: as for ``votes``.
        others: (kv_heads, queries of a key head, 1) float32, log Σ exp(scale · q·k) over the other blocks.

    Returns:
        (blocks,) float32.
    """
    queries = _by_kv_head(q, block_keys.shape[1], scale)
    slabs = [queries @ keys.float().permute(1, 2, 0) for keys in torch.split(block_keys, SLAB)]
    # A softmax over what each slab gets in all, then one inside each: no array over all blocks is ever made.
    totals = torch.cat([*(logits.logsumexp(dim=-1, keepdim=True) for logits in slabs), others], dim=-1).softmax(dim=-1)
    parts = zip(torch.split(totals.mT, 1, dim=1), slabs, strict=False)
    return torch.cat([(total @ logits.softmax(dim=-1)).sum(dim=(0, 1)) for total, logits in parts])


def cell_shares(q: Tensor, centres: Tensor, sizes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Divide each query's vote among cells of blocks, as if every key lay at the centre of its cell.

    Args:
        q: (q_heads, n, head_dim) float32.
        centres: (kv_heads, cells, head_dim).
        sizes: (kv_heads, cells), how many blocks are in each cell.
        scale: the model's factor on q·k.

    Returns:
        (kv_heads, queries of a key head, cells) float32, which sum to 1 over the cells;
        (kv_heads, queries of a key head, 1) float32, log Σ exp(scale · q·k) over all blocks.
    """
    queries = _by_kv_head(q, len(centres), scale)
    logits = torch.baddbmm(sizes.log().unsqueeze(1), queries, centres.float().transpose(1, 2))
    shares = logits.softmax(dim=-1)
    return shares, logits.amax(dim=-1, keepdim=True) - shares.amax(dim=-1, keepdim=True).log()


def cell_sizes(cells: Tensor, count: int) -> Tensor:
    """Count the blocks in each of ``count`` cells: (kv_heads, count), from the cells (kv_heads, blocks) int64."""
    return torch.stack([torch.bincount(head, minlength=count) for head in cells])


def attention_mass(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Divide votes among blocks by all their keys: each block's share of the attention that goes to these blocks.

    Logits are computed in the keys' precision, as the model computes them: in bfloat16 in half the time of float32, and
    the blocks that are then chosen have the same attention mass to four digits.

    Args:
        q: (q_heads, n, head_dim) float32.
        keys: (kv_heads, blocks, block_size, head_dim).

    Returns:
        (blocks,) float32; the sum over blocks is q_heads · n.
    """
    kv_heads, blocks, size = keys.shape[:3]
    queries = _by_kv_head(q, kv_heads, scale).to(keys.dtype)
    mass = torch.zeros(blocks * size, device=q.device)
    if queries.shape[1] < FEW:
        logits = (keys.flatten(1, 2) @ queries.transpose(1, 2)).transpose(1, 2)
        mass += logits.float().softmax(dim=-1).sum(dim=(0, 1))
    else:
        for asking, asked in zip(queries, keys.flatten(1, 2), strict=True):  # one array over all heads is too large
            mass += (asking @ asked.T).float().softmax(dim=-1).sum(dim=0)
    return mass.view(blocks, size).sum(dim=-1)


def _by_kv_head(q: Tensor, kv_heads: int, scale: float) -> Tensor:
    """Scale queries and sort them by key head: (kv_heads, queries of all heads that share a key head, head_dim)."""
    return (q * scale).reshape(kv_heads, -1, q.shape[-1])
