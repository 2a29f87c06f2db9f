"""The scores of a lookup from their definitions, query by query in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def votes_among(q: Tensor, block_keys: Tensor, others: Tensor, scale: float) -> Tensor:
    """Divide one vote of each query among blocks and ``others``: (blocks,) float32."""
    votes = torch.zeros(len(block_keys), dtype=torch.float64)
    for query, shared, row in _by_query(q, block_keys.shape[1]):
        logits = [float(query @ key[shared].double()) * scale for key in block_keys] + [float(others[shared, row])]
        votes += torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)[:-1]
    return votes.float()


def cell_shares(q: Tensor, centres: Tensor, sizes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Divide one vote of each query among cells, and sum up exp(scale · q·k) over all blocks, as its logarithm."""
    kv_heads, cells = sizes.shape
    shares = torch.zeros(kv_heads, q[..., 0].numel() // kv_heads, cells)
    totals = torch.zeros(*shares.shape[:2], 1)
    for query, shared, row in _by_query(q, kv_heads):
        weights = [
            int(size) * math.exp(float(query @ centre.double()) * scale)
            for size, centre in zip(sizes[shared], centres[shared], strict=True)
        ]
        shares[shared, row] = torch.tensor(weights) / sum(weights)
        totals[shared, row] = math.log(sum(weights))
    return shares, totals


def _by_query(q: Tensor, kv_heads: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield every query of every head, with the key head that it asks and its number among those that ask it."""
    group = q.shape[0] // kv_heads
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            yield q[head, i].double(), head // group, head % group * q.shape[1] + i
