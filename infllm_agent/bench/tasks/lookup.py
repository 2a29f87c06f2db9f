"""Keys and values: kv, lines and multikey. The key is given, the value asked; all records look alike."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Sequence

from infllm_agent.bench.haystack import Question
from infllm_agent.bench.tasks.growing import Growing, Record
from infllm_agent.bench.tasks.words import FILLER, names


def _kv_records(rng: random.Random) -> Iterator[Record]:
    while True:
        key, value = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
        yield Record(f'"{key}": "{value}",\n', "pair", key, value)


def _kv_ask(pairs: Sequence[Record]) -> list[Question]:
    return [
        Question(
            f'\nKey: "{pair.subject}"\nThe value associated with the specified key is: "',
            pair.value,
            pair.depth,
            answer_tokens=40,
        )
        for pair in pairs
    ]


def _lines_records(rng: random.Random) -> Iterator[Record]:
    for name in names(rng):
        value = str(rng.randint(10_000, 99_999))
        yield Record(f"line {name}: REGISTER_CONTENT is <{value}>\n", "line", name, value)


def _lines_ask(lines: Sequence[Record]) -> list[Question]:
    """Without LongChat's question, "what is the REGISTER_CONTENT in line ...?": a small model answers with another
    line's number more often when those words stand between the lines and the answer."""
    return [
        Question(
            f"\nRepeat the line of this name:\nline {line.subject}: REGISTER_CONTENT is <",
            line.value,
            line.depth,
            answer_tokens=8,
        )
        for line in lines
    ]


def _multikey_records(rng: random.Random) -> Iterator[Record]:
    for name in names(rng):
        value = str(rng.randint(1_000_000, 9_999_999))
        yield Record(f"{FILLER}\n")
        yield Record(f"One of the special magic numbers for {name} is: {value}.\n", "needle", name, value)


def _multikey_ask(needles: Sequence[Record]) -> list[Question]:
    return [
        Question(
            f"\nWhat is the special magic number for {needle.subject} mentioned in the text above?\n"
            f"One of the special magic numbers for {needle.subject} is:",
            needle.value,
            needle.depth,
            answer_tokens=10,
        )
        for needle in needles
    ]


KV = Growing(
    name="kv",
    about="pairs of UUIDs, the key given, the whole value asked (∞-Bench Retrieve.KV)",
    head="Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n",
    records=_kv_records,
    ask=_kv_ask,
)
LINES = Growing(
    name="lines",
    about="named lines with a number each (LongChat)",
    head=(
        "Below is a record of lines I want you to remember. Each line begins with 'line <line name>' and contains a "
        "'<REGISTER_CONTENT>' as a number. I will ask you to repeat a certain line.\n\n"
    ),
    records=_lines_records,
    ask=_lines_ask,
)
MULTIKEY = Growing(
    name="multikey",
    about="many magic numbers in filler, one asked (RULER NIAH multi-key)",
    head=(
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.\n\n"
    ),
    records=_multikey_records,
    ask=_multikey_ask,
)
