"""A conversation that outlives its process, and events that arrive without one.

Run it twice: the second time, the model remembers what the first run told it, and computes only what is new.

    pip install "infllm-agent[langchain]"
    python examples/langchain_chat.py --root ./sessions
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from infllm_agent.integrations.langchain import ChatInfLLM, SessionRunnable


def took(answer: AIMessage) -> str:
    """How much of the input was there already, and how much had to be computed."""
    usage = answer.usage_metadata
    if usage is None:
        return ""
    details = usage["input_token_details"]
    return f"[{details['cache_read']} tokens kept, {details['cache_creation']} new]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=None, help="where sessions are kept")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    where = {"root": options.root} if options.root else {}
    llm = ChatInfLLM(model=options.model, max_tokens=options.max_tokens, **where)

    # 1. An ordinary chat model: the caller keeps the list of messages, the session keeps what they mean to the model.
    messages: list[BaseMessage] = [SystemMessage("You are a helpful assistant. Be brief.")]
    for question in ["What is a pager?", "Who would carry one?"]:
        messages.append(HumanMessage(question))
        answer = llm.invoke(messages, session_id="tutorial")
        messages.append(answer)
        print(f"> {question}\n{answer.text}\n{took(answer)}\n")

    # 2. A session as the only memory: events go in when they happen, and nobody carries a list.
    operator = SessionRunnable(llm=llm, session_id="operator")
    operator.invoke({"role": "observation", "name": "pager", "text": "02:14 disk full on db-3"}, reply=False)
    print("> Which machine needs attention?")
    for piece in operator.stream("Which machine needs attention?"):
        print(piece.text, end="", flush=True)
        if piece.usage_metadata:
            print(f"\n{took(piece)}")

    llm.close()


if __name__ == "__main__":
    main()
