"""Choosing tokens and turning them into text, one at a time."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infllm_agent.config import SamplingConfig

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
        """The next token id, given logits (vocab,) and the tokens generated so far."""
        scores: Any = logits.float().cpu()[None]
        if self._processors:
            recent: Any = torch.tensor([before[-PENALTY_REACH:]], dtype=torch.long)
            scores = self._processors(recent, scores)
        if self.config.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


class TextPieces:
    """Generated tokens to text, piece by piece: whole characters only, and nothing of a stop sequence."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""  # could be the beginning of a stop sequence
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token; sets ``stopped`` when a stop sequence is complete."""
        self._held += self._decode.step(self._tokenizer, token) or ""
        found = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._give(min(found), drop_rest=True)
        return self._give(len(self._held) - self._could_begin_stop())

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        return "" if self.stopped else self._give(len(self._held))

    def _could_begin_stop(self) -> int:
        longest = 0
        for text in self._stop:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        return longest

    def _give(self, length: int, *, drop_rest: bool = False) -> str:
        piece, rest = self._held[:length], self._held[length:]
        self._held = "" if drop_rest else rest
        self.text += piece
        return piece
