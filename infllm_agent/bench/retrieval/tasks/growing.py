"""Contexts that grow: record after record, and at each length questions about everything read so far."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice

from infllm_agent.bench.retrieval.haystack import Count, Haystack, Question, Stretch
from infllm_agent.errors import ConfigError

#: Records read once to see how long a task's questions become, and tokens added to the longest of them.
_PROBE, _SLACK = 300, 8


@dataclass(frozen=True)
class Record:
    """A piece of a context, and what it states.

    Attributes:
        text: ends with a newline, so that no token reaches into the next record.
        kind: the task's name for what is stated; empty for filler.
        subject: what it is about, such as a key.
        value: what is said of it.
        time: when it happened, for a log.
        depth: where in the context it begins, from 0 to 1; known when questions are asked.
    """

    text: str
    kind: str = ""
    subject: str = ""
    value: str = ""
    time: datetime = datetime.min
    depth: float = 0.0


@dataclass(frozen=True)
class Growing:
    """A task of growing contexts.

    Attributes:
        head: the first lines, which say what the context is.
        records: an endless stream of records, the same for the same generator, whatever the tokenizer.
        ask: every question that has one answer in the records given to it (those that state something).
        turns: with more than one, a round is that many questions, and ``questions`` is the number of rounds. From
            round to round the questions move up by one turn, so that ten rounds of ten ask each one once at each turn.
    """

    name: str
    about: str
    head: str
    records: Callable[[random.Random], Iterator[Record]]
    ask: Callable[[Sequence[Record]], list[Question]]
    turns: int = 1

    def draw(self, lengths: Sequence[int], contexts: int, questions: int, seed: int, count: Count) -> list[Haystack]:
        room = self._room(count)
        return [self._haystack(lengths, number, questions, seed, count, room) for number in range(contexts)]

    def _room(self, count: Count) -> int:
        """Tokens to keep free for the questions of a round and their answers."""
        probe = list(islice(self.records(random.Random(self.name)), _PROBE))
        asked = self.ask([record for record in probe if record.kind])
        return self.turns * (max(count(question.text) + question.answer_tokens for question in asked) + _SLACK)

    def _haystack(
        self, lengths: Sequence[int], number: int, questions: int, seed: int, count: Count, room: int
    ) -> Haystack:
        records = self.records(random.Random(f"{self.name}/{seed}/{number}"))
        record = next(records)
        text, used = [self.head], count(self.head)
        stated: list[tuple[Record, int]] = []
        stretches: list[Stretch] = []
        for tokens in sorted(set(lengths)):
            if used + count(record.text) > tokens - room and not stated:
                raise ConfigError(
                    f"{tokens} tokens are too few for {self.name}: its head, one record, a question and its answer "
                    f"need {used + count(record.text) + room}"
                )
            while used + (size := count(record.text)) <= tokens - room:
                if record.kind:
                    stated.append((record, used))
                text.append(record.text)
                used += size
                record = next(records)
            if not text:
                raise ConfigError(
                    f"{stretches[-1].tokens} and {tokens} tokens are too close for {self.name}: "
                    "nothing fits between them"
                )
            rng = random.Random(f"{self.name}/{seed}/{number}/{tokens}")
            asked = self.ask([replace(record, depth=place / used) for record, place in stated])
            rounds = self._rounds(asked, number, questions, rng, tokens)
            stretches.append(Stretch(tokens, "".join(text), rounds))
            text = []
        return Haystack(self.name, number, tuple(stretches))

    def _rounds(
        self, asked: list[Question], number: int, questions: int, rng: random.Random, tokens: int
    ) -> tuple[tuple[Question, ...], ...]:
        needed = questions if self.turns == 1 else self.turns
        if len(asked) < needed:
            raise ConfigError(
                f"{self.name} at {tokens} tokens: {needed} questions wanted, but its text answers only {len(asked)}; "
                "ask fewer or give it more tokens"
            )
        if self.turns == 1:
            return tuple((question,) for question in spread(asked, questions, rng))
        rounds = []
        for i in range(questions):
            if i % self.turns == 0:
                turns = spread(asked, self.turns, rng)
                rng.shuffle(turns)
            first = (number * questions + i) % self.turns
            rounds.append((*turns[first:], *turns[:first]))
        return tuple(rounds)


def spread(asked: Sequence[Question], number: int, rng: random.Random) -> list[Question]:
    """That many different questions: one from each of ``number`` equal parts of the context, all kinds as often.

    Where a part has no question of the kind that is due, the nearest one is taken. Answers that many questions share
    are drawn less often, so that no answer is a good guess.
    """
    kinds = sorted({question.kind for question in asked})
    due = [kinds[i % len(kinds)] for i in range(number)]
    rng.shuffle(due)
    left = {kind: [question for question in asked if question.kind == kind] for kind in kinds}
    drawn = []
    for part, kind in enumerate(due):
        stock = left[kind] or max(left.values(), key=len)
        middle = (part + 0.5) / number
        near = [question for question in stock if abs(question.depth - middle) <= 0.5 / number]
        if not near:
            near = [min(stock, key=lambda question: abs(question.depth - middle))]
        shared = Counter(question.answer for question in near)
        question = rng.choices(near, [1 / shared[question.answer] for question in near])[0]
        stock.remove(question)
        drawn.append(question)
    return drawn
