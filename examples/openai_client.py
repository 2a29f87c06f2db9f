"""A stateless client of the server: the list of messages grows, what each request costs does not.

    infllm-agent serve &
    python examples/openai_client.py

It needs ``pip install openai langchain-openai``. The same with curl:

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"model": "smollm2", "messages": [{"role": "user", "content": "What is a pager?"}]}'
"""

from __future__ import annotations

import sys
from typing import Any

import openai
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

QUESTIONS = ["What is a pager?", "Who carries one?", "When does it ring?"]


def main(url: str = "http://127.0.0.1:8000/v1", model: str = "smollm2", key: str = "-") -> None:
    with_openai(url, model, key)
    with_langchain(url, model, key)


def with_openai(url: str, model: str, key: str) -> None:
    client = openai.OpenAI(base_url=url, api_key=key)
    messages: list[Any] = [{"role": "system", "content": "Answer in one sentence."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
        said = ""
        print(f"> {question}")
        for chunk in stream:
            for choice in chunk.choices:
                said += choice.delta.content or ""
                print(choice.delta.content or "", end="", flush=True)
            if (usage := chunk.usage) is not None and usage.prompt_tokens_details is not None:
                cached = usage.prompt_tokens_details.cached_tokens or 0
                print(f"\n  {usage.prompt_tokens} tokens, {usage.prompt_tokens - cached} of them read for this answer")
        messages.append({"role": "assistant", "content": said})


def with_langchain(url: str, model: str, key: str) -> None:
    llm = ChatOpenAI(model=model, base_url=url, api_key=lambda: key, max_completion_tokens=40)
    messages: list[BaseMessage] = [SystemMessage("Answer in one sentence."), HumanMessage(QUESTIONS[0])]
    answer = llm.invoke(messages)  # what was asked above: nothing but the answer is new
    print(f"> {QUESTIONS[0]}\n{answer.text}\n  {answer.usage_metadata}")


if __name__ == "__main__":
    main(*sys.argv[1:])
