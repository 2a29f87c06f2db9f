"""An agent with tools, whose history is never cut: each step computes what is new, however long the thread is.

A small model seldom thinks of calling a tool by itself, so a middleware has it look something up before it answers.

    pip install "infllm-agent[agents]"
    python examples/agent.py --root ./sessions
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool

from infllm_agent.integrations.langchain import ChatInfLLM
from infllm_agent.integrations.langgraph import history_tool

LOGS = {
    "db-3": "02:10 checkpoint slow\n02:14 disk full: /var/lib/data 100 %\n02:15 writes refused",
    "web-1": "02:14 upstream db-3 refused a write\n02:15 returning 503",
}


@tool
def read_log(host: str) -> str:
    """The latest lines of a host's log. Hosts: db-3, web-1."""
    return LOGS.get(host, f"no host {host!r}; there are {', '.join(LOGS)}")


@wrap_model_call
def look_first(request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
    """After a person's message, call a tool; after a tool's result, answer."""
    asked = isinstance(request.messages[-1], HumanMessage)
    return handler(request.override(tool_choice="any" if asked else "none"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=None, help="where sessions are kept")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    where = {"root": options.root} if options.root else {}
    llm = ChatInfLLM(model=options.model, max_tokens=options.max_tokens, **where)
    agent = create_agent(
        llm,
        tools=[read_log, history_tool(llm)],  # the second searches what was said, word for word
        system_prompt="You keep servers running. Read the logs. Be brief.",
        middleware=[look_first],
    )
    thread: RunnableConfig = {"configurable": {"thread_id": "night-shift"}}
    messages: list[Any] = []
    for question in ["What is wrong with db-3?", "And with web-1?"]:
        messages.append(HumanMessage(question))
        print(f"> {question}")
        known = len(messages)
        messages = agent.invoke({"messages": messages}, thread)["messages"]
        for message in messages[known:]:
            print(_line(message) if isinstance(message, AIMessage) else f"  {message.name}: {message.text!r}")
    llm.close()


def _line(message: AIMessage) -> str:
    details = message.usage_metadata["input_token_details"]
    said = message.text or ", ".join(f"{call['name']}({call['args']})" for call in message.tool_calls)
    return f"  {said}  [{details['cache_read']} tokens kept, {details['cache_creation']} new]"


if __name__ == "__main__":
    main()
