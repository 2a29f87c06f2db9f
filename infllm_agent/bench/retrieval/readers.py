"""Ways to read a long text and to answer questions about it: this project's memory, and what it is compared with.

A *context* takes token ids and gives logits; it can be branched, and is afterwards as before. A *reader* takes text
and answers questions with greedy decoding; it counts the tokens it computed, the seconds, and the keys it attended.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from infllm_agent.bench.retrieval.haystack import Question
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.memory.context import ContextMemory
from infllm_agent.model.local_model import LocalModel

#: Tokens that go through the model at once with its own attention: the mask and the scores stay small.
PIECE = 2048
#: A truncated history leaves room for questions and answers in steps of so many tokens, so that most questions
#: about one text can share what was computed of it.
ROOM_STEP = 128


class Context(Protocol):
    """A text that grows token by token."""

    def feed(self, ids: Sequence[int], *, question: bool = False) -> Tensor:
        """Take tokens in, at least one; the logits (vocab,) float32 after the last.

        Args:
            question: an answer is to follow.
        """

    def branch(self) -> AbstractContextManager[Context]:
        """A context that goes on from here. While it is in use this one may not be; afterwards this is as it was."""

    @property
    def attended_keys(self) -> int:
        """Keys that the latest token attended to."""


class MemoryContext:
    """This project's memory, under any configuration."""

    def __init__(self, model: LocalModel, memory: ContextMemory) -> None:
        self.model, self.memory = model, memory
        self._attended = 0

    @classmethod
    def empty(cls, model: LocalModel, config: MemoryConfig) -> MemoryContext:
        return cls(model, model.new_memory(config))

    def feed(self, ids: Sequence[int], *, question: bool = False) -> Tensor:
        memory, start = self.memory, 0
        for size in memory.config.chunks(len(ids), before_answer=question):
            chunk = ids[start : start + size]
            start += size
            near = memory.length - memory.first_window_token + len(chunk)
            sinks = memory.n_sinks
            logits = self.model.forward(chunk, memory)
            blocks = max((len(layer.selected) for layer in memory.layers.values()), default=0)
            self._attended = sinks + blocks * memory.config.block_size + near
        return logits

    @contextmanager
    def branch(self) -> Iterator[Context]:
        yield MemoryContext(self.model, self.memory.fork())

    @property
    def attended_keys(self) -> int:
        return self._attended


class FullContext:
    """transformers' own attention over everything, with its ordinary cache.

    Args:
        piece: tokens that go through the model at once. All at once is faster, and takes memory without bound.
    """

    def __init__(self, model: LocalModel, piece: int = PIECE) -> None:
        self.model, self.piece = model, piece
        self._cache = DynamicCache()

    @torch.inference_mode()
    def feed(self, ids: Sequence[int], *, question: bool = False) -> Tensor:
        with self.model.detached("sdpa") as plain:
            for start in range(0, len(ids), self.piece):
                rows = torch.tensor([list(ids[start : start + self.piece])], device=self.model.device)
                out = plain(input_ids=rows, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float()  # type: ignore[no-any-return]

    @contextmanager
    def branch(self) -> Iterator[Context]:
        length = self.attended_keys
        try:
            yield self
        finally:
            self._cache.crop(length - self.attended_keys)  # negative: so many tokens are removed

    @property
    def attended_keys(self) -> int:
        return int(self._cache.get_seq_length())


@dataclass
class Rate:
    """Tokens that were computed, and the time it took."""

    tokens: int = 0
    seconds: float = 0.0

    def __sub__(self, before: Rate) -> Rate:
        return Rate(self.tokens - before.tokens, self.seconds - before.seconds)

    def __add__(self, other: Rate) -> Rate:
        return Rate(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def per_second(self) -> float:
        return round(self.tokens / self.seconds, 1) if self.seconds else 0.0


class Reader(ABC):
    """Reads a text stretch by stretch and answers rounds of questions about all of it so far.

    Attributes:
        prefill: the text; questions count neither here nor there.
        decode: answers.
        attended_keys: the most keys that a token of a question or an answer attended to.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.prefill, self.decode = Rate(), Rate()
        self.attended_keys = 0
        self._begun = False

    @abstractmethod
    def read(self, text: str) -> None:
        """Take the next stretch in."""

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> list[str]:
        """What is answered to each question, after those before it and their answers. Changes nothing of the text."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """The ids of a stretch; the first one begins as the model's texts do."""
        begin: list[int] = []
        if not self._begun:
            self._begun = True
            bos = self.model.tokenizer.bos_token_id
            begin = [token for token in self.model.tokenizer("").input_ids if token == bos]
        return begin + self.encode(text)

    def _take_in(self, context: Context, ids: Sequence[int]) -> None:
        began = time.perf_counter()
        context.feed(ids)
        _wait_for(self.model)
        self.prefill += Rate(len(ids), time.perf_counter() - began)

    def _converse(self, context: Context, questions: Sequence[Question]) -> list[str]:
        answers: list[str] = []
        pending: list[int] = []
        for question in questions:
            written, pending = self._answer(context, pending + self.encode(question.text), question.answer_tokens)
            answers.append(self.model.tokenizer.decode(written))
        return answers

    def _answer(self, context: Context, ids: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
        """Feed the question and decode greedily to the end of a line, of the text, or ``limit`` tokens.

        Returns:
            What was written, and the part of it that is not in the context yet.
        """
        logits = context.feed(ids, question=True)
        self.attended_keys = max(self.attended_keys, context.attended_keys)
        written: list[int] = []
        pending: list[int] = []  # an end of a line is not fed: the next question begins a line of its own
        began, steps = time.perf_counter(), 0
        while True:
            token = int(logits.argmax())
            if token in self.model.eos_ids:
                break
            written.append(token)
            if "\n" in self.model.tokenizer.decode(written).lstrip():
                break
            if len(written) >= limit:
                pending = [token]
                break
            logits = context.feed([token])
            self.attended_keys = max(self.attended_keys, context.attended_keys)
            steps += 1
        self.decode += Rate(steps, time.perf_counter() - began)
        return written, pending


class WholeReader(Reader):
    """Keeps one context that everything goes into."""

    def __init__(self, model: LocalModel, context: Context) -> None:
        super().__init__(model)
        self.context = context

    def read(self, text: str) -> None:
        self._take_in(self.context, self._encode_text(text))

    def ask(self, questions: Sequence[Question]) -> list[str]:
        with self.context.branch() as branch:
            return self._converse(branch, questions)


class TruncatedReader(Reader):
    """What a model behind an ordinary chat wrapper sees: the latest ``limit`` tokens, questions and answers
    included, in the model's own attention."""

    def __init__(self, model: LocalModel, limit: int) -> None:
        super().__init__(model)
        self.limit = limit
        self._latest: deque[int] = deque(maxlen=limit)
        self._contexts: dict[int, Context] = {}

    def read(self, text: str) -> None:
        self._latest.extend(self._encode_text(text))
        self._contexts.clear()

    def ask(self, questions: Sequence[Question]) -> list[str]:
        needed = sum(len(self.encode(question.text)) + question.answer_tokens for question in questions)
        with self._context(-(-needed // ROOM_STEP) * ROOM_STEP).branch() as branch:
            return self._converse(branch, questions)

    def _context(self, room: int) -> Context:
        """The latest tokens with so much room left; computed once for each room."""
        if room not in self._contexts:
            self._contexts.clear()  # one at a time in memory
            context = FullContext(self.model)
            self._take_in(context, last(self._latest, self.limit - room))
            self._contexts[room] = context
        return self._contexts[room]


def last(ids: Sequence[int] | deque[int], count: int) -> list[int]:
    """The last ``count`` ids.

    Raises:
        ConfigError: none would be left.
    """
    if count < 1:
        raise ConfigError(f"question and answer leave no room for the text: raise the budget by {1 - count} tokens")
    return list(ids)[-count:]


def _wait_for(model: LocalModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
