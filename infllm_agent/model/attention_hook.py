"""The meeting point with transformers: the attention functions that a model can be switched to.

Every attention layer of a transformers model calls a function that can be registered by name; keyword arguments
given to the model's forward reach it, so the memory travels as one. No class is patched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

ATTENTION = "infllm"


class Memory(Protocol):
    """What the attention function needs of a memory (``ContextMemory`` or a reference)."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None
    ) -> Tensor: ...

    def reserve(self, n: int) -> None: ...

    def advance(self, n: int) -> None: ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    memories: Sequence[Memory] = (),
    between_layers: Callable[[], None] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers' attention interface asks: query (rows, q_heads, n, head_dim) in, (rows, n, q_heads,
    head_dim) out.

    Each row is of another session, and has its memory.
    """
    if len(memories) != len(query):
        raise ValueError('attn_implementation="infllm" needs a forward with memories=...; use LocalModel.forward')
    if between_layers is not None:
        between_layers()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = cast(Any, module).layer_idx
    rows = [
        memory.attend(layer, q.contiguous(), k, v, scale=scale, softcap=softcap)
        for memory, q, k, v in zip(memories, query, key, value, strict=True)
    ]
    out = rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
    return out.transpose(1, 2), None


def set_attention(model: Any, implementation: str) -> bool:
    """Switch the model's attention; False if it would not be switched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.set_attn_implementation(implementation)
        except ValueError:
            return False
    return bool(model.config._attn_implementation == implementation)


def register(name: str, function: Any) -> None:
    """Make an attention function known to transformers, without a mask: what may be seen is its own affair."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


register(ATTENTION, _attention)
