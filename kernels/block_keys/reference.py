"""The representatives of blocks from their definition, token by token in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def representative_keys(k: Tensor, queries: Tensor, n_local: int, repr_topk: int) -> Tensor:
    """Average each block's representatives: the keys whose scores, summed up query by query, are the highest."""
    heads, count, size, _ = k.shape
    out = torch.zeros(heads, count, k.shape[3], dtype=torch.float64)
    for head in range(heads):
        for block in range(count):
            received = []
            for i in range(size):
                m = block * size + i
                after = queries[head, m + 1 : m + 1 + n_local].double()
                received.append(float((after @ k[head, block, i].double()).sum()))
            best = sorted(range(size), key=lambda i: -received[i])[:repr_topk]
            out[head, block] = k[head, block, best].double().mean(0)
    return out.float()
