"""RULER's variable tracking: chains of assignments in filler, all alike; one variable is traced to its number."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence

from infllm_agent.bench.haystack import Question
from infllm_agent.bench.tasks.growing import Growing, Record
from infllm_agent.bench.tasks.words import FILLER

#: Assignments in a chain: the number, and two hops.
_LINKS = 3
#: As many chains grow at a time, so that the links of one stand between those of others.
_OPEN = 4


def _records(rng: random.Random) -> Iterator[Record]:
    given: set[str] = set()
    open_chains: list[list[str]] = []
    while True:
        name = "".join(rng.choices(string.ascii_uppercase, k=4))
        if name in given:
            continue
        given.add(name)
        if len(open_chains) < _OPEN:
            value = str(rng.randint(10_000, 99_999))
            open_chains.append([name])
        else:
            chain = rng.choice(open_chains)
            value = f"VAR {chain[-1]}"
            chain.append(name)
            if len(chain) == _LINKS:
                open_chains.remove(chain)
        yield Record(f"{FILLER}\n")
        yield Record(f"VAR {name} = {value}\n", "assignment", name, value)


def _ask(assignments: Sequence[Record]) -> list[Question]:
    """The number of each variable that ends a chain. Its depth is that of the number."""
    by_name = {assignment.subject: assignment for assignment in assignments}
    questions = []
    for assignment in assignments:
        links = [assignment]
        while (value := links[-1].value).startswith("VAR "):
            links.append(by_name[value.removeprefix("VAR ")])
        if len(links) == _LINKS:
            text = (
                f"\nTrace VAR {assignment.subject} back to its number, one assignment after the other.\n"
                f"VAR {assignment.subject} = VAR"
            )
            questions.append(Question(text, links[-1].value, links[-1].depth, answer_tokens=36))
    return questions


VARTRACK = Growing(
    name="vartrack",
    about="chains of assignments in filler, a variable traced to its number over two hops (RULER)",
    head=(
        "Variables are assigned in the following text. Memorize the assignments: I will ask you to trace a variable "
        "back to its number. For example, after VAR AAAA = 12345, VAR BBBB = VAR AAAA and VAR CCCC = VAR BBBB:\n"
        "VAR CCCC = VAR BBBB = VAR AAAA = 12345\n\n"
    ),
    records=_records,
    ask=_ask,
)
