"""What a model has to compute and to read, at the least: what its speed is compared with the machine's by.

Prefill is bound by arithmetic. Counted are two operations for each weight and token, without the embedding and without
the output layer (which sees one token of each chunk), and four for each channel of each pair of query and key that meet
in the attention. The lookup is not counted: it is what this memory pays.

Decoding is bound by memory. Counted are the bytes of all weights that a token needs, and of the keys and values that it
attends to, once. What a lookup reads is not counted, for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from infllm_agent.config import MemoryConfig
from infllm_agent.memory.spec import LayerSpec
from infllm_agent.memory.state import Division
from infllm_agent.model.local_model import LocalModel


@dataclass(frozen=True)
class Weights:
    """How much of a model one token goes through.

    Attributes:
        body: weights besides the embedding and the output layer.
        bytes: of these and of the output layer.
    """

    body: float
    bytes: float

    @classmethod
    def of(cls, model: Any) -> Weights:
        """Of experts, as many are counted as a token is sent to."""
        config = model.config.get_text_config()
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        active = getattr(config, "num_experts_per_tok", None)
        share = active / experts if experts and active else 1.0
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        body = size = 0.0
        for name, parameter in model.named_parameters():
            if parameter is embedding or parameter is head:
                continue
            used = share if ".experts." in name else 1.0
            body += used * parameter.numel()
            size += used * parameter.nbytes
        return cls(body, size + head.nbytes)


@dataclass(frozen=True)
class Cost:
    """Of one model under one kind of attention.

    Attributes:
        config: of the memory; None: full attention.
    """

    weights: Weights
    specs: dict[int, LayerSpec]
    dtype: torch.dtype
    config: MemoryConfig | None

    @classmethod
    def of(cls, model: LocalModel, config: MemoryConfig | None) -> Cost:
        return cls(Weights.of(model.model), model.specs, model.dtype, config)

    def prefill_flops(self, past: int, n: int) -> float:
        """Of ``n`` tokens behind ``past``."""
        sizes = self.config.chunks(n) if self.config is not None else [n]
        attention, start = 0.0, past
        for size in sizes:
            for spec in self.specs.values():
                attention += 4 * spec.q_heads * spec.head_dim * self._pairs(spec, start, size)
            start += size
        return 2 * self.weights.body * n + attention

    def step_bytes(self, past: int) -> float:
        """Of one token behind ``past``."""
        each = (
            2 * spec.kv_heads * spec.head_dim * self._pairs(spec, past, 1) * self.dtype.itemsize
            for spec in self.specs.values()
        )
        return self.weights.bytes + sum(each)

    def _pairs(self, spec: LayerSpec, past: int, n: int) -> int:
        """Pairs of query and key that meet in one layer, when ``n`` tokens come behind ``past`` in one chunk."""
        own = n * (n + 1) // 2
        if spec.sliding_window is not None:
            reach = spec.sliding_window
            return sum(min(reach, past + i + 1) for i in range(n))
        if self.config is None:
            return n * past + own
        sinks, blocks = Division.of(past, self.config)
        window = past - sinks - blocks * self.config.block_size
        far = sinks + min(self.config.topk_for(n), blocks) * self.config.block_size
        return n * (far + window) + own


def shares(flops_s: float, bytes_s: float, ceiling: dict[str, float]) -> dict[str, float]:
    """Of the machine's ceilings."""
    return {
        "prefill_share": round(flops_s / (ceiling["matmul_gflops"] * 1e9), 3),
        "decode_share": round(bytes_s / (ceiling["copy_gb_s"] * 1e9), 3),
    }
