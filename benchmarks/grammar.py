"""What holding a reply to a form costs: decode speed with and without, alternating in one process.

    python benchmarks/grammar.py [--model smollm2] [--tokens 64] [--rounds 4] [--json OUT]

Forced tokens go through the model several at once, which makes a held reply faster; they are left out here. For each
token that was picked: the step from forward to forward, and what of it went into the constraint (masks, and the search
for the shortest way to the end). The overhead is that part, relative to the step of a free reply.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from infllm_agent import AgentRuntime
from infllm_agent.generation.constraint import Constraint
from infllm_agent.tools import ToolSpec

STORY = {
    "type": "object",
    "properties": {"story": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["story", "tags"],
}
TOOLS = [
    ToolSpec("get_weather", "Current weather", {"properties": {"city": {"type": "string"}}, "required": ["city"]}),
    ToolSpec("note", "Keeps a note", {"properties": {"text": {"type": "string"}}, "required": ["text"]}),
]


class Clock:
    """Processor time between forwards of a single token, and in the constraint's methods meanwhile."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.constraint: list[float] = []

    @contextmanager
    def on(self, owner: Any, name: str) -> Iterator[None]:
        method = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            began = time.process_time()
            if name == "forward" and len(arguments[0]) == 1:
                self.began.append(began)
                self.constraint.append(0.0)
            result = method(*arguments)
            if name != "forward" and self.constraint:
                self.constraint[-1] += time.process_time() - began
            return result

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, method)

    def per_step(self) -> tuple[float, float]:
        """Median seconds of a step, and mean seconds of it in the constraint."""
        steps = [after - before for before, after in pairwise(self.began)]
        return statistics.median(steps), statistics.mean(self.constraint)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kinds: dict[str, dict[str, Any]] = {
        "free": {"tools": []},
        "auto": {"tools": TOOLS},
        "schema": {"schema": STORY},
        "forced": {"tools": TOOLS, "tool_choice": "note"},
    }
    steps: dict[str, list[float]] = {kind: [] for kind in kinds}
    held: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as root, AgentRuntime.open(root, options.model) as runtime:
        session = runtime.session("grammar")
        session.append_user("Tell a long story of a lighthouse.")
        session.commit()
        for round_number in range(options.rounds + 1):  # the first warms up
            for kind, how in kinds.items():
                clock = Clock()
                with clock.on(session.model, "forward"), clock.on(Constraint, "mask"), clock.on(Constraint, "advance"):
                    session.reply(max_tokens=options.tokens, temperature=1.0, seed=round_number, **how)
                session.rollback()
                if round_number:
                    step, constraint = clock.per_step()
                    steps[kind].append(step)
                    held[kind].append(constraint)
    free = statistics.median(steps["free"])
    result = {
        kind: {
            "ms_per_token": round(statistics.median(steps[kind]) * 1000, 2),
            "constraint_ms": round(statistics.median(held[kind]) * 1000, 2),
            "overhead": round(statistics.median(held[kind]) / free, 4),
        }
        for kind in kinds
    }
    text = json.dumps({"model": options.model, "tokens": options.tokens, "kinds": result}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
