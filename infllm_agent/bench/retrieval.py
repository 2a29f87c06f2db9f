"""Does the model find it? Retrieval tasks past the window, by this memory and by what it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from infllm_agent.bench.machine import peak_rss_mb
from infllm_agent.bench.tasks import Sample, is_right, samples
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.model import LocalModel

#: Keys and values of full attention may take this much memory; more would not be a comparison but a swap storm.
FULL_LIMIT = 8 << 30


class Context(Protocol):
    """A method that is being measured: it reads a context, then answers."""

    def read(self, ids: Sequence[int]) -> Tensor:
        """Take tokens in; the logits (vocab,) after the last."""

    @property
    def attended_keys(self) -> int:
        """Most keys that a decoding step attends to."""


class MemoryContext:
    """This project's memory, under any configuration."""

    def __init__(self, model: LocalModel, config: MemoryConfig) -> None:
        self.model, self.config = model, config
        self.memory = model.new_memory(config)

    def read(self, ids: Sequence[int]) -> Tensor:
        size = self.config.chunk_size
        logits = torch.empty(0)
        for start in range(0, len(ids), size):
            logits = self.model.forward(ids[start : start + size], self.memory)
        return logits

    @property
    def attended_keys(self) -> int:
        return min(self.config.attended_keys, self.memory.length)


class FullContext:
    """transformers' own full attention with its ordinary cache; ``keep``: the latest tokens only, as a chat wrapper
    that drops the front would."""

    def __init__(self, model: LocalModel, keep: int | None = None) -> None:
        self.model, self.keep = model, keep
        self._cache = DynamicCache()

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Tensor:
        if self.keep is not None and not self._cache.get_seq_length():
            ids = ids[-self.keep :]
        with self.model.detached("sdpa") as plain:
            rows = torch.tensor([list(ids)], device=self.model.device)
            out = plain(input_ids=rows, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float()  # type: ignore[no-any-return]

    @property
    def attended_keys(self) -> int:
        return int(self._cache.get_seq_length())


def _full(model: LocalModel, config: MemoryConfig, tokens: int) -> Context:
    needed = tokens * model.kv_bytes_per_token
    if needed > FULL_LIMIT:
        raise ConfigError(
            f"full attention over {tokens} tokens needs {needed / 1e9:.1f} GB of cache; ask for fewer tokens"
        )
    return FullContext(model)


def _paper(model: LocalModel, config: MemoryConfig, tokens: int) -> Context:
    paper = MemoryConfig.paper()
    return MemoryContext(model, paper if paper.attended_keys <= model.window else config)


def _streaming(model: LocalModel, config: MemoryConfig, tokens: int) -> Context:
    # Sinks and window only (StreamingLLM), at the same number of attended keys.
    window = config.n_local + config.topk * config.block_size
    return MemoryContext(model, config.changed(topk=0, n_local=window))


#: Room that a wrapper leaves in the window for the question and the answer.
ANSWER_ROOM = 256

METHODS: dict[str, Callable[[LocalModel, MemoryConfig, int], Context]] = {
    "infllm": lambda model, config, tokens: MemoryContext(model, config),
    "infllm-paper": _paper,
    "full": _full,
    "streaming": _streaming,
    "truncate": lambda model, config, tokens: FullContext(model, keep=min(model.window, 2**20) - ANSWER_ROOM),
}


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    task: str
    tokens: int
    samples: int
    methods: tuple[str, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(f'method "{method}" is not known; there are {", ".join(METHODS)}')


def run(
    model: LocalModel, config: MemoryConfig, plan: Plan, report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """One row for each method, in the form of ``bench retrieval --json``.

    Raises:
        ConfigError: a task, method or length that makes no sense.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    drawn = samples(plan.task, plan.tokens, plan.samples, plan.seed, lambda text: len(encode(text)))
    return [_measure(model, config, plan, method, drawn, encode, report) for method in plan.methods]


def _measure(
    model: LocalModel,
    config: MemoryConfig,
    plan: Plan,
    method: str,
    drawn: Sequence[Sample],
    encode: Callable[[str], list[int]],
    report: Callable[[str], None],
) -> dict[str, Any]:
    correct = read_tokens = written_tokens = attended = 0
    read_s = write_s = 0.0
    for place, sample in enumerate(drawn, 1):
        context = METHODS[method](model, config, plan.tokens)
        ids = encode(sample.context)
        began = time.perf_counter()
        context.read(ids)
        read_s += time.perf_counter() - began
        read_tokens += len(ids)
        logits = context.read(encode(sample.question))
        answer: list[int] = []
        began = time.perf_counter()
        while len(answer) < sample.answer_tokens:
            answer.append(int(logits.argmax()))
            logits = context.read(answer[-1:])
        write_s += time.perf_counter() - began
        written_tokens += len(answer)
        written = model.tokenizer.decode(answer)
        right = is_right(sample, written)
        correct += right
        attended = max(attended, context.attended_keys)
        report(
            f"{plan.task} {plan.tokens} {method} {place}/{len(drawn)}: depth {sample.depth:.2f}, "
            f"{'right' if right else 'wrong'}: {sample.answer} / {written.strip()!r}"
        )
    return {
        "task": plan.task,
        "tokens": plan.tokens,
        "method": method,
        "model": model.name,
        "samples": len(drawn),
        "correct": correct,
        "accuracy": correct / len(drawn),
        "attended_keys": attended,
        "prefill_tok_s": round(read_tokens / read_s, 1),
        "decode_tok_s": round(written_tokens / write_s, 1),
        "peak_rss_mb": peak_rss_mb(),
    }
