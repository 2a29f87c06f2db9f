"""An agent's log of many days: outputs of the same few tools, and five kinds of questions about them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from infllm_agent.bench.retrieval.haystack import Question
from infllm_agent.bench.retrieval.tasks.growing import Growing, Record
from infllm_agent.bench.retrieval.tasks.words import listed, names

_BEGIN = datetime(2026, 3, 2, 8, 0)  # a Monday morning
_EVENING = 18
_PEOPLE = listed(
    "Alice Boris Carla David Elena Felix Grace Henry Irene Jacob Karen Louis Maria Nadia Oscar Paula Quentin Rachel "
    "Simon Tanya Ulrich Vera Walter Xenia Yusuf Zoe Anton Bella Conrad Diana Edgar Flora Gustav Helen Igor Julia"
)
_PARTS = listed("battery cable camera display engine fan filter keyboard memory pump router sensor switch valve")
_OPTIONS = listed("batch_size cache_mb max_retries pool_size queue_limit timeout_ms workers")
#: A thing that fails does so this often at most, in the whole log: rare enough to be counted.
_MOST_FAILURES = 4


class _Writer:
    """Writes one tool output after another; the clock only moves on, and no subject names two things."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names = names(rng)
        self._clock = _BEGIN
        self._services = [next(self._names) for _ in range(4)]
        self._given: set[str] = set()  # deployments, tickets, their numbers, settings
        self._settings: dict[str, list[str]] = {}
        self._failing: list[tuple[str, int]] = []  # backups, and how often each still has to fail

    def records(self) -> Iterator[Record]:
        outputs = [self._deployment, self._ticket, self._setting, self._backup, self._health]
        while True:
            yield self._rng.choices(outputs, [3, 3, 5, 3, 2])[0]()
            self._clock += timedelta(minutes=self._rng.randint(2, 25))
            if self._clock.hour >= _EVENING:
                self._clock = self._clock.replace(hour=8, minute=0) + timedelta(days=1)

    def _record(self, text: str, kind: str = "", subject: str = "", value: str = "") -> Record:
        return Record(f"[{self._clock:%Y-%m-%d %H:%M}] {text}\n", kind, subject, value, self._clock)

    def _new(self, draw: Callable[[], str]) -> str:
        """Something drawn that was not given before."""
        while (drawn := draw()) in self._given:
            pass
        self._given.add(drawn)
        return drawn

    def _service(self) -> str:
        """A known one, now and then a new one: subjects are alike, and yet never run out."""
        if self._rng.random() < 0.2:
            self._services.append(next(self._names))
        return self._rng.choice(self._services)

    def _deployment(self) -> Record:
        rng = self._rng
        subject = self._new(lambda: f"{self._service()} version {rng.randint(1, 9)}.{rng.randint(0, 30)}")
        person = rng.choice(_PEOPLE)
        return self._record(f"deploy: {subject} was deployed by {person}.", "deployment", subject, person)

    def _ticket(self) -> Record:
        subject = self._new(lambda: f"replace the {self._rng.choice(_PARTS)} of {self._service()}")
        number = self._new(lambda: f"OPS-{self._rng.randint(10_000, 99_999)}")
        return self._record(f"tickets: The ticket to {subject} is {number}.", "ticket", subject, number)

    def _setting(self) -> Record:
        """A new setting or, as often, another value for any known one, however old."""
        rng = self._rng
        if not self._settings or rng.random() < 0.5:
            subject = self._new(lambda: f"{self._service()}.{rng.choice(_OPTIONS)}")
            self._settings[subject] = []
        else:
            subject = rng.choice(list(self._settings))
        values = self._settings[subject]
        while (value := str(rng.randint(100, 9999))) in values:
            pass
        values.append(value)
        return self._record(f"config: {subject}={value}", "setting", subject, value)

    def _backup(self) -> Record:
        rng = self._rng
        if rng.random() < 0.3:
            return self._record(f"backup: The backup of {self._service()} succeeded.")
        if len(self._failing) < 4:
            self._failing.append((self._new(lambda: next(self._names)), rng.randint(1, _MOST_FAILURES)))
        place = rng.randrange(len(self._failing))
        subject, left = self._failing.pop(place)
        if left > 1:
            self._failing.append((subject, left - 1))
        return self._record(f"backup: The backup of {subject} failed.", "failure", subject)

    def _health(self) -> Record:
        cpu, memory, requests = (self._rng.randint(3, 97) for _ in range(3))
        return self._record(
            f"health: {self._service()} uses {cpu} % cpu and {memory} % memory, {requests} requests are open."
        )


def records(rng: random.Random) -> Iterator[Record]:
    return _Writer(rng).records()


def ask(stated: Sequence[Record]) -> list[Question]:
    by_subject: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in stated:
        by_subject[record.kind, record.subject].append(record)
    questions = []
    for (kind, _), about in by_subject.items():
        if kind == "deployment":
            questions.append(_who(about[0]))
        elif kind == "ticket":
            questions.append(_which_id(about[0]))
        elif kind == "failure":
            questions.append(_how_many(about))
        elif len(about) > 1:  # a setting that was changed
            questions.append(_last_value(about[-1]))
            questions += [_value_as_of(change) for change in about[:-1]]
    return questions


def _question(asked: str, said: str, answer: str, depth: float, answer_tokens: int, kind: str) -> Question:
    return Question(f"\nQuestion: {asked}\nAnswer: {said}", answer, depth, answer_tokens, kind)


def _who(deployed: Record) -> Question:
    what = deployed.subject
    return _question(f"Who deployed {what}?", f"{what} was deployed by", deployed.value, deployed.depth, 6, "who")


def _which_id(opened: Record) -> Question:
    what = opened.subject
    return _question(
        f"Which ticket was opened to {what}?", f"The ticket to {what} is", opened.value, opened.depth, 12, "which id"
    )


def _last_value(last: Record) -> Question:
    what = last.subject
    return _question(f"What is {what} now, after all changes?", f"{what}=", last.value, last.depth, 8, "last value")


def _value_as_of(change: Record) -> Question:
    """As of the minute in which it was set; it has another value since."""
    what, moment = change.subject, f"{change.time:%Y-%m-%d %H:%M}"
    return _question(
        f"What was {what} set to at {moment}?",
        f"[{moment}] config: {what}=",
        change.value,
        change.depth,
        8,
        "value as of a time",
    )


def _how_many(failures: Sequence[Record]) -> Question:
    """Its depth is that of the first failure."""
    what, times = failures[0].subject, str(len(failures))
    return _question(
        f"How many times did the backup of {what} fail?",
        f"The number of times that the backup of {what} failed is",
        times,
        failures[0].depth,
        4,
        "how many",
    )


AGENTLOG = Growing(
    name="agentlog",
    about="days of an agent's tool outputs: who, which id, last value, value as of a time, how many",
    head="This is the log of an operations agent. Each line is the output of a tool. Questions about it follow.\n\n",
    records=records,
    ask=ask,
)
MULTITURN = replace(
    AGENTLOG,
    name="multiturn",
    about="one session asked ten things in turn, in orders that put each question at every turn",
    turns=10,
)
