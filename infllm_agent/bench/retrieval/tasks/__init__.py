"""Retrieval tasks: a long context with things worth finding, questions, and their exact answers. All seeded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from infllm_agent.bench.retrieval.haystack import Count, Haystack
from infllm_agent.bench.retrieval.tasks.agentlog import AGENTLOG, MULTITURN
from infllm_agent.bench.retrieval.tasks.hidden import NUMBER, PASSKEY
from infllm_agent.bench.retrieval.tasks.lookup import KV, LINES, MULTIKEY
from infllm_agent.bench.retrieval.tasks.vartrack import VARTRACK
from infllm_agent.errors import ConfigError


class Task(Protocol):
    """``about`` is one line for people."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    def draw(self, lengths: Sequence[int], contexts: int, questions: int, seed: int, count: Count) -> list[Haystack]:
        """See ``draw`` below."""


_ALL: Sequence[Task] = (PASSKEY, NUMBER, KV, LINES, MULTIKEY, VARTRACK, AGENTLOG, MULTITURN)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def check_name(task: str) -> None:
    """Raise ConfigError unless there is a task of that name."""
    if task not in TASKS:
        raise ConfigError(f'task "{task}" is not known; there are {", ".join(TASKS)}')


def draw(task: str, lengths: Sequence[int], contexts: int, questions: int, seed: int, count: Count) -> list[Haystack]:
    """The contexts of a task and what is asked about them, the same for the same arguments.

    A growing task gives ``contexts`` haystacks, each with a stretch for every length in ascending order, and
    ``questions`` questions at each length (multiturn: that many rounds of ten). passkey and number give, for every
    length, ``contexts`` haystacks of one stretch with one question.

    Args:
        lengths: in tokens; the context, one round of questions and their answers fit into it.
        count: tokens of a text, without any that a tokenizer puts in front.

    Raises:
        ConfigError: an unknown task, nothing to draw, a length too short for the task, or more questions than facts.
    """
    check_name(task)
    for what, number in (("lengths", len(lengths)), ("contexts", contexts), ("questions", questions)):
        if number < 1:
            raise ConfigError(f"{what}: {number} makes no sense; give at least one")
    return TASKS[task].draw(lengths, contexts, questions, seed, count)
