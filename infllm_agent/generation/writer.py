"""The writing of one answer: logits in, tokens and pieces of text out, until it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from infllm_agent.chat.format import ChatFormat
from infllm_agent.config import SamplingConfig
from infllm_agent.generation.constraint import Constraint
from infllm_agent.generation.sampler import Sampler
from infllm_agent.generation.text_pieces import TextPieces
from infllm_agent.tools import InvalidCall, ToolCall


class Writer:
    """Picks the tokens of one answer.

    Args:
        constraint: what the answer is held to, its beginning with ``prefix`` included; None: anything.
        names: of the tools that may be called; None: what looks like a call is text.

    Attributes:
        generated: the tokens so far; those of the prefix are not among them.
        finish_reason: as in ``Reply``; "" until the answer has ended.
    """

    def __init__(
        self,
        chat: ChatFormat,
        sampling: SamplingConfig,
        *,
        prefix: str = "",
        constraint: Constraint | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        self.generated: list[int] = []
        self.finish_reason = ""
        self._stop_ids = chat.stop_ids
        self._left = sampling.max_tokens
        self._sampler = Sampler(sampling)
        self._constraint = constraint
        # JSON under a schema has no free text that a stop sequence could end.
        stop = sampling.stop if constraint is None or constraint.optional else ()
        reader = chat.reader if names is not None else None
        self._pieces = TextPieces(chat.encoder.backend, stop, reader=reader, names=names, prefix=prefix)

    @property
    def text(self) -> str:
        return self._pieces.text

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that were made, known after ``finish``."""
        return self._pieces.calls

    @property
    def invalid_calls(self) -> tuple[InvalidCall, ...]:
        return self._pieces.invalid

    def begin(self) -> tuple[list[int], str]:
        """Take the tokens that need not be picked, because there is no choice, and the text that they make certain."""
        return self._take(self._constraint.begin(self._left)) if self._constraint else ([], "")

    def write(self, logits: Tensor) -> tuple[list[int], str]:
        """Write the next token, given the logits (vocab,) after the one before, and those that must follow it."""
        constraint = self._constraint
        if constraint is None:
            return self._take([self._sampler.pick(logits, self.generated)])
        # What a grammar wants again and again (quotation marks) is no repetition to be discouraged.
        before = self.generated if constraint.free else []
        return self._take(constraint.advance(self._sampler.pick(constraint.mask(logits), before), self._left))

    def finish(self, reason: str = "") -> str:
        """End the answer, for that reason if it has not ended by itself; returns the text that was held back."""
        self.finish_reason = self.finish_reason or reason
        piece = self._pieces.finish()
        if self.finish_reason == "stop" and self.calls:
            self.finish_reason = "tool_calls"
        return piece

    def _take(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        taken: list[int] = []
        text = ""
        for token in tokens:
            taken.append(token)
            if token in self._stop_ids:
                self.finish_reason = "stop"
                break
            text += self._pieces.add(token)
            if self._pieces.stopped:
                self.finish_reason = "stop"
                break
        self.generated += taken
        self._left -= len(taken)
        if not self.finish_reason:
            if self._constraint is not None and self._constraint.complete:
                self.finish_reason = "stop"
            elif self._left <= 0:
                whole = self._constraint is not None and self._constraint.finished and not self._constraint.free
                self.finish_reason = "stop" if whole else "length"
        return taken, text
