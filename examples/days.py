"""A conversation of many days: a LangGraph checkpointer keeps the messages, a session what they mean to the model.

Each run is a day. The process may stop at any time; the next one goes on with the same thread, and reads nothing
again. With --forget the thread is deleted, and its session with it.

    pip install "infllm-agent[agents]"
    python examples/days.py --root ./days "My name is Ada, and I look after db-3."
    python examples/days.py --root ./days "What is my name?"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite import SqliteSaver

from infllm_agent.integrations.langchain import ChatInfLLM
from infllm_agent.integrations.langgraph import tie_sessions


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("message", nargs="?")
    parser.add_argument("--root", type=Path, required=True, help="where messages and sessions are kept")
    parser.add_argument("--thread", default="ada")
    parser.add_argument("--forget", action="store_true", help="delete the thread and its session")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    options.root.mkdir(parents=True, exist_ok=True)
    llm = ChatInfLLM(model=options.model, root=options.root, max_tokens=options.max_tokens)
    with SqliteSaver.from_conn_string(str(options.root / "threads.db")) as saver:
        checkpointer = tie_sessions(saver, llm)
        if options.forget:
            checkpointer.delete_thread(options.thread)
            print(f"thread {options.thread} and its session are deleted")
        if options.message:
            agent = create_agent(llm, system_prompt="You are a helpful assistant. Be brief.", checkpointer=checkpointer)
            thread: RunnableConfig = {"configurable": {"thread_id": options.thread}}
            # Only what is new: the checkpointer has the rest, and the model is given all of it.
            answer = agent.invoke({"messages": [HumanMessage(options.message)]}, thread)["messages"][-1]
            details = answer.usage_metadata["input_token_details"]
            print(f"{answer.text}\n[{details['cache_read']} tokens kept, {details['cache_creation']} new]")
    llm.close()


if __name__ == "__main__":
    main()
