"""What stands for a sealed block: the mean of its keys, or of its representatives among them (InfLLM, 3.2)."""

from __future__ import annotations

from torch import Tensor

from infllm_agent.kernels import backend
from infllm_agent.kernels.block_keys import plain


def mean_keys(k: Tensor) -> Tensor:
    """Average each block's keys (kv_heads, count, block_size, head_dim) to (kv_heads, count, head_dim) float32."""
    if backend.chosen(k) == "plain":
        return plain.mean_keys(k)
    from infllm_agent.kernels.block_keys import triton

    return triton.mean_keys(k)


def representative_keys(k: Tensor, queries: Tensor, n_local: int, repr_topk: int) -> Tensor:
    """Average the ``repr_topk`` keys of each block that received the most attention from the ``n_local`` tokens after
    them.

    Args:
        k: (kv_heads, count, block_size, head_dim), of consecutive tokens.
        queries: (kv_heads, ≥ count · block_size + n_local, head_dim), of the same tokens and those after them.

    Returns:
        (kv_heads, count, head_dim) float32.
    """
    if backend.chosen(k) == "plain":
        return plain.representative_keys(k, queries, n_local, repr_topk)
    from infllm_agent.kernels.block_keys import triton

    return triton.representative_keys(k, queries, n_local, repr_topk)
