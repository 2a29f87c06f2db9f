"""The layers that a model limits to their latest tokens: they need no memory beyond those."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.attention import attend
from infllm_agent.memory.spec import LayerSpec
from infllm_agent.memory.window import Window


class SlidingLayer:
    """One layer that the model limits to its latest tokens: it keeps that window and nothing else."""

    def __init__(self, spec: LayerSpec, config: MemoryConfig, dtype: torch.dtype, device: torch.device) -> None:
        assert spec.sliding_window is not None
        self.reach = spec.sliding_window  # a query sees this many tokens, its own included
        self.window = Window(
            spec.kv_heads,
            spec.head_dim,
            spec.rotary,
            capacity=self.reach + config.chunk_size,
            slack=max(config.chunk_size, self.reach // 2),
            with_queries=False,
            dtype=dtype,
            device=device,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attend with a chunk (heads, n, head_dim), each query to the latest ``reach`` tokens before it and itself."""
        window, n = self.window, q.shape[1]
        window.stage(k, v)
        keys = slice(window.start, window.stop + n)
        mask = None
        if n > 1:
            distance = (
                torch.arange(len(window), len(window) + n, device=q.device)[:, None]
                - torch.arange(len(window) + n, device=q.device)[None, :]
            )
            mask = (distance >= 0) & (distance < self.reach)
        part = attend(
            window.rotate_queries(q),
            window.k_rotated[:, keys],
            window.v[:, keys],
            scale=scale,
            mask=mask,
            softcap=softcap,
        )
        return part.out

    def advance(self, n: int) -> None:
        self.window.advance(n)
        self.window.drop(max(0, len(self.window) - (self.reach - 1)))

    def device_bytes(self) -> int:
        return self.window.device_bytes()
