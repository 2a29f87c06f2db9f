"""From answers to figures: one row for each task, length and method."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from infllm_agent.bench.retrieval.answers import Answered, Answers
from infllm_agent.bench.retrieval.haystack import Haystack, Question, Stretch, is_right
from infllm_agent.bench.retrieval.methods import Method
from infllm_agent.bench.retrieval.readers import Rate
from infllm_agent.model.local_model import LocalModel

#: Parts that a context is divided into to tell answers by their depth.
BINS = 10


@dataclass(frozen=True)
class Pair:
    """A haystack to be read by a method; ``digest`` names its answers."""

    method: Method
    haystack: Haystack
    digest: str


@dataclass(frozen=True)
class _Scored:
    """One question that was asked. ``turn``: its number in a round of several, from 1 on; else 0."""

    question: Question
    turn: int
    right: bool


def rows(model: LocalModel, pairs: Sequence[Pair], answers: Answers) -> list[dict[str, Any]]:
    """The JSON rows, in the order in which the pairs name tasks, then by length, then by method."""
    keys = {
        (pair.haystack.task, stretch.tokens, pair.method.name): pair.method
        for pair in pairs
        for stretch in pair.haystack.stretches
    }
    tasks = list(dict.fromkeys(task for task, _, _ in keys))
    ordered = sorted(keys, key=lambda key: (tasks.index(key[0]), key[1]))  # stable: methods stay in their order
    return [_row(model, task, tokens, keys[task, tokens, name], pairs, answers) for task, tokens, name in ordered]


def _row(
    model: LocalModel, task: str, tokens: int, method: Method, pairs: Sequence[Pair], answers: Answers
) -> dict[str, Any]:
    scored: list[_Scored] = []
    at_length: list[Answered] = []
    up_to_length: list[Answered] = []
    contexts = 0
    for pair in pairs:
        stretches = {stretch.tokens: stretch for stretch in pair.haystack.stretches}
        if pair.haystack.task != task or pair.method is not method or tokens not in stretches:
            continue
        contexts += 1
        rounds = answers.of(pair.digest)
        up_to_length += [one for one in rounds.values() if one.tokens <= tokens]
        here = [one for one in rounds.values() if one.tokens == tokens]
        at_length += here
        for one in here:
            scored += _scores(stretches[tokens], one)
    correct = sum(one.right for one in scored)
    attended = max(one.attended_keys for one in at_length)
    return {
        "task": task,
        "tokens": tokens,
        "method": method.name,
        "model": model.name,
        "samples": len(scored),
        "correct": correct,
        "accuracy": correct / len(scored),
        "attended_keys": attended,
        "prefill_tok_s": sum((one.prefill for one in up_to_length), Rate()).per_second,
        "decode_tok_s": sum((one.decode for one in at_length), Rate()).per_second,
        "peak_rss_mb": max(one.peak_rss_mb for one in up_to_length),
        "contexts": contexts,
        "by_depth": _grouped(scored, lambda one: (min(int(one.question.depth * BINS), BINS - 1) + 0.5) / BINS),
        "by_kind": _grouped(scored, lambda one: one.question.kind or None),
        "by_turn": _grouped(scored, lambda one: one.turn or None),
        "beyond_window": attended > model.window,
        "settings": method.shown,
    }


def _scores(stretch: Stretch, answered: Answered) -> Iterator[_Scored]:
    questions = stretch.rounds[answered.round]
    for turn, (question, written) in enumerate(zip(questions, answered.written, strict=True), 1):
        yield _Scored(question, turn if len(questions) > 1 else 0, is_right(question, written))


def _grouped(scored: Sequence[_Scored], group: Callable[[_Scored], Hashable]) -> list[list[Any]]:
    """``[[group, correct, asked], ...]`` in ascending order; questions of the group None are left out."""
    counts: dict[Any, list[int]] = {}
    for one in scored:
        if (name := group(one)) is not None:
            count = counts.setdefault(name, [0, 0])
            count[0] += one.right
            count[1] += 1
    return [[name, *counts[name]] for name in sorted(counts)]
