"""Choosing tokens and turning them into text, one at a time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infllm_agent.chat.call_reader import CallReader, CodedStream
from infllm_agent.config import SamplingConfig
from infllm_agent.platform.compute import compute_thread
from infllm_agent.tools import InvalidCall, ToolCall

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
        if self.config.temperature == 0 and not self._processors:
            return int(logits.float().cpu().numpy().argmax())  # numpy's needs no threads of its own
        return compute_thread().run(lambda: self._draw(logits, before))

    def _draw(self, logits: Tensor, before: list[int]) -> int:
        recent: Any = torch.tensor([before[-PENALTY_REACH:]], dtype=torch.long)
        scores: Any = self._processors(recent, logits.float().cpu()[None])
        if self.config.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


class TextPieces:
    """Generated tokens to text, piece by piece: whole characters only, and nothing of a stop sequence or a call.

    Args:
        stop: texts that end the answer; inside a call they are part of it.
        reader: reads calls; None: there are none, whatever is written.
        names: of the tools that may be called.
        prefix: the text so far, which is no piece any more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        reader: CallReader | None = None,
        names: Collection[str] | None = None,
        prefix: str = "",
    ) -> None:
        self._stream = CodedStream(tokenizer, reader.codes if reader else {})
        self._stop = stop
        self._reader, self._names = reader, names
        self._held = ""  # could be the beginning of a stop sequence or a call, or is a call
        self._in_calls = False
        self.text = prefix
        self.stopped = False
        self.calls: tuple[ToolCall, ...] = ()
        self.invalid: tuple[InvalidCall, ...] = ()

    def add(self, token: int) -> str:
        """The text that is certain after one more token; sets ``stopped`` when a stop sequence is complete."""
        self._held += self._stream.step(token)
        opened = self._opened()
        found = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if found and (opened is None or min(found) < opened):
            self.stopped = True
            return self._give(min(found), drop_rest=True)
        if opened is None:
            return self._give(self._certain())
        self._in_calls = True
        return self._give(len(self._held[:opened].rstrip()))

    def finish(self) -> str:
        """What was held back, now that no more tokens come; finds the calls."""
        if self._in_calls and self._reader is not None:
            parsed = self._reader.parse(self._held, self._names, behind_text=bool(self.text))
            self._in_calls, self._held = False, ""
            self.text += parsed.text
            self.calls, self.invalid = parsed.calls, parsed.invalid
            return parsed.text
        return "" if self.stopped else self._give(len(self._held))

    def _opened(self) -> int | None:
        """Where in what is held the first call begins."""
        if self._in_calls:
            return 0
        if self._reader is None or (self.text and not self._reader.opener):
            return None
        return self._reader.opens_at(self._held)

    def _certain(self) -> int:
        """How much of what is held can be given: it begins no stop sequence and no call, and is not white space that
        a call may follow."""
        markers = self._stop if self._reader is None else (*self._stop, self._reader.opener)
        longest = 0
        for text in markers:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        certain = self._held[: len(self._held) - longest]
        return len(certain if self._reader is None else certain.rstrip())

    def _give(self, length: int, *, drop_rest: bool = False) -> str:
        piece, rest = self._held[:length], self._held[length:]
        self._held = "" if drop_rest else rest
        if self._reader is not None:
            piece = self._reader.plain(piece)
        self.text += piece
        return piece
