"""RULER's variable tracking: chains of assignments in filler, all alike; one variable is traced to its number.

The model writes the chain down, so that each step is one look-up: a small model cannot take two in its head. It also
writes a number where a second name would be due, which is why a chain here has one hop, not RULER's four.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from infllm_agent.bench.retrieval.haystack import Question
from infllm_agent.bench.retrieval.tasks.growing import Growing, Record
from infllm_agent.bench.retrieval.tasks.words import FILLER, names

#: Assignments in a chain: the number, and one hop.
_LINKS = 2
#: As many chains grow at a time, so that the links of one stand between those of others.
_OPEN = 4
#: Of names and numbers that no context has: no noun here is in words.py, and no number drawn begins with 0.
_EXAMPLES = (
    "\nTrace VAR oak-door back to its number:\nVAR oak-door = tin-cup, VAR tin-cup = 04821"
    "\nTrace VAR big-pen back to its number:\nVAR big-pen = wet-sock, VAR wet-sock = 07736"
)


def _records(rng: random.Random) -> Iterator[Record]:
    open_chains: list[list[str]] = []
    for name in names(rng):
        if len(open_chains) < _OPEN:
            value = str(rng.randint(10_000, 99_999))
            open_chains.append([name])
        else:
            chain = rng.choice(open_chains)
            value = chain[-1]
            chain.append(name)
            if len(chain) == _LINKS:
                open_chains.remove(chain)
        yield Record(f"{FILLER}\n")
        yield Record(f"VAR {name} = {value}\n", "assignment", name, value)


def _ask(assignments: Sequence[Record]) -> list[Question]:
    """The number of each variable that ends a chain. Its depth is that of the number."""
    by_name = {assignment.subject: assignment for assignment in assignments}
    questions = []
    for last in assignments:
        links = [last]
        while links[-1].value in by_name:
            links.append(by_name[links[-1].value])
        if len(links) == _LINKS:
            text = f"{_EXAMPLES}\nTrace VAR {last.subject} back to its number:\nVAR {last.subject} ="
            questions.append(Question(text, links[-1].value, links[-1].depth, answer_tokens=36))
    return questions


VARTRACK = Growing(
    name="vartrack",
    about="chains of assignments in filler, a variable traced to its number over one hop (RULER)",
    head=(
        "Variables are assigned in the following text. Memorize the assignments: I will ask you to trace a variable "
        "back to its number.\n\n"
    ),
    records=_records,
    ask=_ask,
)
