"""What a retrieval task is made of: a context that grows stretch by stretch, and questions about all of it so far."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

#: Tokens of a text, as the model under test counts them.
Count = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """One question and its exact answer.

    Attributes:
        text: what follows the context; the answer is what the model writes after it.
        answer: right if it stands, as a word of its own, in the first line of what the model writes.
        depth: where in the context the answer stands, from 0 (begin) to 1 (end).
        answer_tokens: the model may write this many.
        kind: a task's own division of its questions, such as "last value"; empty if it has none.
    """

    text: str
    answer: str
    depth: float
    answer_tokens: int
    kind: str = ""


@dataclass(frozen=True)
class Stretch:
    """The next part of a context, and what is asked when it has been read.

    Attributes:
        tokens: the nominal length of the context with this stretch; the text keeps below it.
        rounds: each is asked in a fork of the session: its questions one after another, each seeing those before it
            and their answers. For most tasks a round is a single question.
    """

    tokens: int
    text: str
    rounds: tuple[tuple[Question, ...], ...]


@dataclass(frozen=True)
class Haystack:
    """One context of a task. It is read once; shorter lengths are asked about on the way to the longest."""

    task: str
    number: int
    stretches: tuple[Stretch, ...]


def is_right(question: Question, written: str) -> bool:
    """Exact match: the answer as a word of its own in the first line that was written; 3 is not in 3.5 or 1,300."""
    line = written.strip().split("\n", 1)[0]
    return re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(question.answer)}(?!\w|[.,]\d)", line) is not None
