"""Keys and values: kv, lines and multikey. The key is given, the value asked; all records look alike."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Sequence
from functools import partial

from infllm_agent.bench.retrieval.haystack import Question
from infllm_agent.bench.retrieval.tasks.growing import Growing, Record
from infllm_agent.bench.retrieval.tasks.words import FILLER, names


def _ask(form: str, answer_tokens: int, stated: Sequence[Record]) -> list[Question]:
    """One question for each record; ``form`` has a place for the ``key``."""
    return [Question(form.format(key=record.subject), record.value, record.depth, answer_tokens) for record in stated]


def _kv_records(rng: random.Random) -> Iterator[Record]:
    while True:
        key, value = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
        yield Record(f'"{key}": "{value}",\n', "pair", key, value)


def _lines_records(rng: random.Random) -> Iterator[Record]:
    for name in names(rng):
        value = str(rng.randint(10_000, 99_999))
        yield Record(f"line {name}: REGISTER_CONTENT is <{value}>\n", "line", name, value)


def _multikey_records(rng: random.Random) -> Iterator[Record]:
    for name in names(rng):
        value = str(rng.randint(1_000_000, 9_999_999))
        yield Record(f"{FILLER}\n")
        yield Record(f"One of the special magic numbers for {name} is: {value}.\n", "needle", name, value)


KV = Growing(
    name="kv",
    about="pairs of UUIDs, the key given, the whole value asked (∞-Bench Retrieve.KV)",
    head="Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n",
    records=_kv_records,
    ask=partial(_ask, '\nKey: "{key}"\nThe value associated with the specified key is: "', 40),
)
LINES = Growing(
    name="lines",
    about="named lines with a number each (LongChat)",
    head=(
        "Below is a record of lines I want you to remember. Each line begins with 'line <line name>' and contains a "
        "'<REGISTER_CONTENT>' as a number. I will ask you to repeat a certain line.\n\n"
    ),
    records=_lines_records,
    # Without LongChat's question, "what is the REGISTER_CONTENT in line ...?": a small model answers with another
    # line's number more often when those words stand between the lines and the answer.
    ask=partial(_ask, "\nRepeat the line of this name:\nline {key}: REGISTER_CONTENT is <", 8),
)
MULTIKEY = Growing(
    name="multikey",
    about="many magic numbers in filler, one asked (RULER NIAH multi-key)",
    head=(
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.\n\n"
    ),
    records=_multikey_records,
    ask=partial(
        _ask,
        "\nWhat is the special magic number for {key} mentioned in the text above?\n"
        "One of the special magic numbers for {key} is:",
        10,
    ),
)
