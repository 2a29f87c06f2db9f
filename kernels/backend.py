"""Which kernel computes what: Triton's for tensors on a GPU, where it is installed; plain torch otherwise.

Both take the same arguments and are tested against each other. Results differ by rounding only. With
``INFLLM_KERNELS=plain`` in the environment plain torch computes everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from infllm_agent.kernels.attention import Partial
from infllm_agent.kernels.decode_attention.plain import DecodeKeys, decode_attention_plain
from infllm_agent.kernels.votes import plain as lookup

Backend = Literal["triton", "plain"]

_forced: Backend | None = "plain" if os.environ.get("INFLLM_KERNELS") == "plain" else None


def backend(x: Tensor) -> Backend:
    """What computes for tensors like ``x``."""
    if _forced is not None:
        return _forced
    return "triton" if x.device.type == "cuda" and _has_triton() else "plain"


@contextmanager
def using(forced: Backend) -> Iterator[None]:
    """One backend for everything, for as long as the ``with`` lasts, in all threads. On a CPU, Triton works in its
    interpreter only (TRITON_INTERPRET=1)."""
    global _forced
    before, _forced = _forced, forced
    try:
        yield
    finally:
        _forced = before


def decode_attention(q: Tensor, keys: DecodeKeys, *, scale: float, softcap: float | None = None) -> Partial:
    """Attention of one token: see ``decode.decode_attention_plain``."""
    if backend(q) == "plain":
        return decode_attention_plain(q, keys, scale=scale, softcap=softcap)
    from infllm_agent.kernels.decode_attention import triton as triton_decode

    return triton_decode.decode_attention(q, keys, scale=scale, softcap=softcap)


def votes(q: Tensor, keys: Tensor, scale: float, others: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
    """How the votes of queries (q_heads, n, head_dim) float32 are divided among keys (blocks, kv_heads, head_dim): see
    ``lookup.votes``, and with ``others`` ``lookup.votes_among``.

    Args:
        chosen: (m,) int64, the keys that are voted on; None: all.
    """
    if backend(q) == "triton":
        from infllm_agent.kernels.votes import triton as triton_votes

        return triton_votes.votes(q, keys, scale, others, chosen)
    if chosen is not None:
        keys = keys.flatten(1).index_select(0, chosen).view(-1, *keys.shape[1:])  # far faster than keys[chosen]
    return lookup.votes(q, keys, scale) if others is None else lookup.votes_among(q, keys, others, scale)


def attention_mass(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """See ``lookup.attention_mass``: keys (kv_heads, blocks, block_size, head_dim); (blocks,) float32."""
    if backend(q) == "plain":
        return lookup.attention_mass(q, keys, scale)
    blocks, size = keys.shape[1:3]
    return votes(q, keys.flatten(1, 2).transpose(0, 1), scale).view(blocks, size).sum(dim=-1)


def best(scores: Tensor, count: int) -> Tensor:
    """The (min(count, blocks),) blocks with the highest of ``scores`` (blocks,), ascending. A GPU is not waited for:
    how many there are is known beforehand."""
    highest = scores.topk(min(count, len(scores)), sorted=False).indices
    if backend(scores) == "triton":
        return highest.sort().values
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[highest] = True
    return chosen.nonzero().squeeze(1)


def mean_keys(k: Tensor) -> Tensor:
    """The mean (kv_heads, count, head_dim) float32 of keys (kv_heads, count, block_size, head_dim)."""
    if backend(k) == "plain":
        return k.mean(dim=2, dtype=torch.float32)
    from infllm_agent.kernels.block_keys import triton as triton_seal

    return triton_seal.mean_keys(k)


def representative_keys(k: Tensor, queries: Tensor, n_local: int, repr_topk: int) -> Tensor:
    """The mean (kv_heads, count, head_dim) float32 of each block's representatives among its keys (kv_heads, count,
    block_size, head_dim).

    Args:
        queries: (kv_heads, ≥ count · block_size + n_local, head_dim), of the same tokens and those after them.
    """
    if backend(k) == "triton":
        from infllm_agent.kernels.block_keys import triton as triton_seal

        return triton_seal.representative_keys(k, queries, n_local, repr_topk)
    scores = lookup.representative_scores(k.flatten(1, 2), queries, n_local).view(k.shape[:3])
    chosen = scores.topk(repr_topk, dim=2).indices
    return k.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])).mean(dim=2, dtype=torch.float32)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
