"""Retrieval tasks: a long context with a few things worth finding, a question, and its exact answer. All seeded."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from infllm_agent.errors import ConfigError

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class Sample:
    """One context and one question about it.

    Attributes:
        context: about as many tokens as asked for.
        question: what follows the context; the answer is what the model writes after it.
        answer: right if it appears in what the model writes, not within a longer number.
        depth: where in the context the answer stands, from 0 (begin) to 1 (end).
    """

    context: str
    question: str
    answer: str
    depth: float
    answer_tokens: int


def is_right(sample: Sample, written: str) -> bool:
    """Exact match: the answer as a word of its own in what was written."""
    place = written.find(sample.answer)
    if place < 0:
        return False
    around = written[max(0, place - 1) : place] + written[place + len(sample.answer) :][:1]
    return not any(character.isalnum() for character in around)


def passkey(generator: random.Random, tokens: int, count: Callable[[str], int], depth: float) -> Sample:
    """∞-Bench's R.PassKey: five digits in repeated filler."""
    return _hidden_number(generator.randint(10_000, 99_999), tokens, count, depth)


def number(generator: random.Random, tokens: int, count: Callable[[str], int], depth: float) -> Sample:
    """∞-Bench's R.Number: ten digits."""
    return _hidden_number(generator.randint(10**9, 10**10 - 1), tokens, count, depth)


def _hidden_number(key: int, tokens: int, count: Callable[[str], int], depth: float) -> Sample:
    head = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n"
    )
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    question = "\nWhat is the pass key? The pass key is"
    spare = tokens - count(head + needle + question)
    if spare < count(FILLER):
        raise ConfigError(f"{tokens} tokens are too few for this task: its text without filler needs {tokens - spare}")
    repeats = spare // count(FILLER)
    before = round(depth * repeats)
    context = head + FILLER * before + needle + FILLER * (repeats - before)
    return Sample(context, question, str(key), depth, answer_tokens=2 * len(str(key)))


TASKS: dict[str, Callable[[random.Random, int, Callable[[str], int], float], Sample]] = {
    "passkey": passkey,
    "number": number,
}


def samples(task: str, tokens: int, number_of: int, seed: int, count: Callable[[str], int]) -> list[Sample]:
    """Samples of one task, their answers at depths spread evenly over the context.

    Raises:
        ConfigError: an unknown task, no samples, or a context too short for the task.
    """
    if task not in TASKS:
        raise ConfigError(f'task "{task}" is not known; there are {", ".join(TASKS)}')
    if number_of < 1:
        raise ConfigError(f"--samples {number_of}: at least one is needed")
    generator = random.Random(f"{task}/{tokens}/{seed}")
    return [TASKS[task](generator, tokens, count, (i + 0.5) / number_of) for i in range(number_of)]
