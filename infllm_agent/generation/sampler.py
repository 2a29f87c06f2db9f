"""Choosing the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infllm_agent.config import SamplingConfig
from infllm_agent.platform.compute import compute_thread

#: The repetition penalty looks back this far: it is there to break loops, not to forbid words of last week.
PENALTY_REACH = 512


class Sampler:
    """Picks the next token from logits, by the rules of a ``SamplingConfig``."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._generator = torch.Generator()
        if config.seed is not None:
            self._generator.manual_seed(config.seed)
        else:
            self._generator.seed()
        self._processors = LogitsProcessorList()
        if config.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if config.temperature > 0:
            self._processors.append(TemperatureLogitsWarper(config.temperature))
            if config.top_k:
                self._processors.append(TopKLogitsWarper(config.top_k))
            if config.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(config.top_p))

    def pick(self, logits: Tensor, before: list[int]) -> int:
        """Pick the next token id, given logits (vocab,) and the tokens generated so far."""
        if self.config.temperature == 0 and not self._processors:
            return int(logits.float().cpu().numpy().argmax())  # numpy's needs no threads of its own
        return compute_thread().run(lambda: self._draw(logits, before))

    def _draw(self, logits: Tensor, before: list[int]) -> int:
        recent: Any = torch.tensor([before[-PENALTY_REACH:]], dtype=torch.long)
        scores: Any = self._processors(recent, logits.float().cpu()[None])
        if self.config.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
