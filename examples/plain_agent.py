"""An agent without a framework: a plain function is a tool, and the model reads its output while it runs.

A small model seldom thinks of calling a tool by itself, so the first step must call one and the second must answer.
Stop it when you like and start it with another question: the session goes on, and calls that were cut off are answered.

    python examples/plain_agent.py "What is wrong with db-3?" --root ./sessions
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Literal

from infllm_agent.agent.events import AgentRun, CallMade, OutputPiece, TextPiece
from infllm_agent.runtime import AgentRuntime

LOGS = {
    "db-3": "02:10 checkpoint slow\n02:14 disk full: /var/lib/data 100 %\n02:15 writes refused\n",
    "web-1": "02:14 upstream db-3 refused a write\n02:15 returning 503\n",
}


def read_log(host: Literal["db-3", "web-1"]) -> Iterator[str]:
    """The latest lines of a host's log.

    Args:
        host: whose log.
    """
    yield from LOGS[host].splitlines(keepends=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default="What is wrong with db-3?")
    parser.add_argument("--root", default="sessions", help="where sessions are kept")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    with AgentRuntime.open(options.root, options.model) as runtime:
        print(f"> {options.question}")
        events = runtime.stream_agent(
            "night-shift",
            options.question,
            tools=[read_log],
            system="You keep servers running. Read the logs. Be brief.",
            tool_choice=["any", "none"],
            max_tokens=options.max_tokens,
        )
        for event in events:
            match event:
                case CallMade(call):
                    print(f"  {call.name}({call.arguments})")
                case OutputPiece(_, text):
                    print("".join(f"    {line}\n" for line in text.splitlines()), end="")
                case TextPiece(text):
                    print(text, end="", flush=True)
                case AgentRun(usage=usage):
                    print(f"\n  [{usage.prefilled_tokens} tokens read, {usage.output_tokens} written]")


if __name__ == "__main__":
    main()
