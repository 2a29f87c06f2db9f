"""The meeting point with transformers: the attention functions that a model can be switched to.

Every attention layer of a transformers model calls a function that can be registered by name; keyword arguments
given to the model's forward reach it, so the memory travels as one. No class is patched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol, cast

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
    memory: Memory | None = None,
    between_layers: Callable[[], None] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, q_heads, n, head_dim) in, (1, n, q_heads, head_dim) out."""
    if memory is None:
        raise ValueError('attn_implementation="infllm" needs a forward with memory=...; use LocalModel.forward')
    if between_layers is not None:
        between_layers()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = cast(Any, module).layer_idx
    out = memory.attend(layer, query[0].contiguous(), key[0], value[0], scale=scale, softcap=softcap)
    return out.transpose(0, 1).unsqueeze(0), None


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
