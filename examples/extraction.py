"""Objects out of a long session: what was said in it becomes a pydantic instance, valid whatever the model.

The grammar holds the answer to the schema, and the session's history stays as it is: asking for an object costs what
any question costs.

    pip install "infllm-agent[langchain]"
    python examples/extraction.py --root ./sessions
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from pydantic import BaseModel, Field

from infllm_agent.integrations.langchain import ChatInfLLM

REPORT = (
    "At 02:14 db-3 ran out of disk. web-1 returned errors until 02:41, when Maria had moved the logs away. "
    "Nothing was lost."
)


class Incident(BaseModel):
    """What went wrong."""

    host: Literal["db-3", "web-1"] = Field(description="where it began")
    cause: str = Field(max_length=60)
    severity: Literal["low", "medium", "high"]
    minutes: int = Field(ge=0, le=600, description="how long it lasted")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=None, help="where sessions are kept")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    where = {"root": options.root} if options.root else {}
    llm = ChatInfLLM(model=options.model, max_tokens=options.max_tokens, session_id="incidents", **where)
    messages = [
        SystemMessage("You keep the log of incidents."),
        HumanMessage(f"A report came in: {REPORT}"),
        AIMessage("Noted."),
        HumanMessage("Describe the incident as an object with host, cause, severity and minutes."),
    ]
    incident = llm.with_structured_output(Incident).invoke(messages)
    print(repr(incident))
    llm.close()


if __name__ == "__main__":
    main()
