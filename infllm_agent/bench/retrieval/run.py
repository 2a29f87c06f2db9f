"""Does the model find it? Retrieval tasks past the window, by this memory and by what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infllm_agent.bench.machine import peak_rss_mb, reset_peak_rss
from infllm_agent.bench.retrieval import tasks
from infllm_agent.bench.retrieval.answers import Answered, Answers, digest_of
from infllm_agent.bench.retrieval.haystack import Haystack, Question, is_right
from infllm_agent.bench.retrieval.methods import Method, Needs, check_name, prepare
from infllm_agent.bench.retrieval.readers import Rate
from infllm_agent.bench.retrieval.scores import Pair, rows
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.model.local_model import LocalModel

#: Told of rounds answered, rounds in all, and what happened.
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RetrievalPlan:
    """What to measure. Each context is read once by each method and asked about at each of its lengths.

    Attributes:
        contexts: of each task (of passkey and number: of each length).
        questions: for each context and length, where a task has more than one.
        truncate_to: tokens that method truncate keeps; None: as many as the memory attends to.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    contexts: int = 5
    questions: int = 10
    seed: int = 0
    truncate_to: int | None = None

    def __post_init__(self) -> None:
        for what, values in (("task", self.tasks), ("length", self.lengths), ("method", self.methods)):
            if not values:
                raise ConfigError(f"at least one {what} is needed")
            if len(set(values)) < len(values):
                raise ConfigError(f"a {what} is named twice: {', '.join(map(str, values))}")
        for task in self.tasks:
            tasks.check_name(task)
        for method in self.methods:
            check_name(method)
        for length in self.lengths:
            if length < 1:
                raise ConfigError(f"a context of {length} tokens cannot be measured")
        for option, value in (("--samples", self.contexts), ("--questions", self.questions)):
            if value < 1:
                raise ConfigError(f"{option} {value}: at least one is needed")
        if self.truncate_to is not None and self.truncate_to < 1:
            raise ConfigError(f"--truncate-to {self.truncate_to}: at least one token is needed")


def run(
    model: LocalModel,
    config: MemoryConfig,
    plan: RetrievalPlan,
    answers: Path | None = None,
    report: Report = lambda done, total, line: None,
) -> list[dict[str, Any]]:
    """Rows for each task, length and method, in the form of ``bench retrieval --json``.

    Args:
        answers: a file that answers are kept in as they come; those of an earlier run of this plan are used.

    Raises:
        ConfigError: a length that is too short for a task, or a method that cannot do it. Nothing is measured then.
        StorageError: the file of answers cannot be used.
    """

    def count(text: str) -> int:
        return len(model.tokenizer(text, add_special_tokens=False).input_ids)

    haystacks = [
        haystack
        for task in plan.tasks
        for haystack in tasks.draw(task, sorted(plan.lengths), plan.contexts, plan.questions, plan.seed, count)
    ]
    rounds = [one for haystack in haystacks for stretch in haystack.stretches for one in stretch.rounds]
    longest_round = max(sum(count(question.text) + question.answer_tokens for question in one) for one in rounds)
    needs = Needs(max(plan.lengths) + longest_round, longest_round, plan.truncate_to)
    methods = [prepare(name, model, config, needs) for name in plan.methods]
    return [{**row, "seed": plan.seed} for row in measure(model, methods, haystacks, answers, report)]


def measure(
    model: LocalModel,
    methods: Sequence[Method],
    haystacks: Sequence[Haystack],
    answers: Path | None = None,
    report: Report = lambda done, total, line: None,
) -> list[dict[str, Any]]:
    """As ``run``, for haystacks and methods that are there already."""
    with Answers.open(answers) as kept:
        pairs = [
            Pair(method, haystack, digest_of(model, method, haystack)) for haystack in haystacks for method in methods
        ]
        total = sum(len(stretch.rounds) for pair in pairs for stretch in pair.haystack.stretches)
        done = sum(len(kept.of(pair.digest)) for pair in pairs)
        if done:
            report(done, total, f"{done} of {total} rounds of questions are answered already")
        for pair in pairs:
            reset_peak_rss()
            for answered, line in _ask(pair, kept):
                done += answered
                report(done, total, line)
        return rows(model, pairs, kept)


def _ask(pair: Pair, kept: Answers) -> Iterator[tuple[int, str]]:
    """Read and ask what has no answer yet; yields rounds answered (0 or 1) and a line about it."""
    method, haystack, earlier = pair.method, pair.haystack, kept.of(pair.digest)
    missing = {
        (stretch.tokens, number)
        for stretch in haystack.stretches
        for number in range(len(stretch.rounds))
        if (stretch.tokens, number) not in earlier
    }
    if not missing:
        return
    reader = method.new_reader()
    longest = max(tokens for tokens, _ in missing)
    prefill, decode = Rate(), Rate()
    for stretch in haystack.stretches:
        if stretch.tokens > longest:
            return
        name = f"{haystack.task} {stretch.tokens} {method.name} context {haystack.number + 1}"
        yield 0, f"{name}: reading"
        reader.read(stretch.text)
        for number, questions in enumerate(stretch.rounds):
            if (stretch.tokens, number) not in missing:
                continue
            reader.attended_keys = 0
            written = reader.ask(questions)
            right = [is_right(question, text) for question, text in zip(questions, written, strict=True)]
            kept.add(
                Answered(
                    digest=pair.digest,
                    task=haystack.task,
                    context=haystack.number,
                    method=method.name,
                    tokens=stretch.tokens,
                    round=number,
                    written=written,
                    right=right,
                    attended_keys=reader.attended_keys,
                    prefill=reader.prefill - prefill,
                    decode=reader.decode - decode,
                    peak_rss_mb=peak_rss_mb(),
                )
            )
            prefill, decode = reader.prefill, reader.decode
            told = "; ".join(map(_line, questions, written, right))
            yield 1, f"{name} round {number + 1}/{len(stretch.rounds)}: {told}"
        kept.sync()


def _line(question: Question, written: str, right: bool) -> str:
    verdict = "right" if right else "wrong"
    return f"depth {question.depth:.2f}, {verdict}: {question.answer} / {written.strip()!r}"
