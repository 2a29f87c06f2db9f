"""Attention of one decoded token over sinks, looked-up blocks where they lie in the device cache, and the window.

Nothing is copied together first: blocks are found through a table of their slots. How many sinks, blocks and window
tokens there are lies on the device as well, so that the same launch serves every step.
"""

from __future__ import annotations

from torch import Tensor

from infllm_agent.kernels import backend
from infllm_agent.kernels.attention import Partial
from infllm_agent.kernels.decode_attention import plain
from infllm_agent.kernels.decode_attention.keys import DecodeKeys


def decode_attention(q: Tensor, keys: DecodeKeys, *, scale: float, softcap: float | None = None) -> Partial:
    """Attend with one token.

    Args:
        q: (q_heads, head_dim) without rotary embedding.
        scale: factor on q·k.
        softcap: logits become ``softcap * tanh(logits / softcap)``.

    Returns:
        Output (q_heads, 1, head_dim) and log-sum-exp (q_heads, 1).

    Raises:
        ValueError: shapes that do not fit together.
    """
    if backend.chosen(q) == "plain":
        return plain.decode_attention(q, keys, scale=scale, softcap=softcap)
    from infllm_agent.kernels.decode_attention import triton

    return triton.decode_attention(q, keys, scale=scale, softcap=softcap)
