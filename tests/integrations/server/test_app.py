"""The OpenAI-compatible server, as its clients see it: openai's own, LangChain's, and plain HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from serving import Served, serving

from infllm_agent.model.local_model import LocalModel

pytestmark = pytest.mark.usefixtures("one_thread")

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"up": {"type": "boolean"}},
    "required": ["up"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), tiny_model) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.v1, api_key="none is asked for", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(served: Served, client: openai.OpenAI) -> Any:
    """Ask with OpenAI's client."""

    def ask(*messages: Any, **options: Any) -> Any:
        given = [{"role": "user", "content": text} if isinstance(text, str) else text for text in messages]
        return client.chat.completions.create(**{"model": served.model, "messages": given, "max_tokens": 8, **options})

    return ask


def prefilled(usage: Any) -> int:
    return usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens


def test_the_model_is_listed(client, served):
    assert [model.id for model in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).id == served.model
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5' here"):
        client.models.retrieve("gpt-5")


def test_a_stateless_client_with_a_growing_list_pays_for_what_is_new(ask, served):
    """The bar: 30 messages, one request for each of the user's; nobody names a session."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You look after servers."}]
    for number in range(30):
        question = {"role": "user", "content": f"event {number}: error 404"}
        messages.append(question)
        answer = ask(*messages)
        said = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": said})
        session = served.runtime.session(answer.session_id)
        new = session.messages(-2)  # what was asked, and the answer
        # The question, the way to the answer, and at most the last token of the answer before, which was never read.
        assert new[0].text == question["content"]
        if number:
            assert prefilled(answer.usage) <= new[0].end - new[0].start + 16
        assert answer.usage.prompt_tokens == new[1].start + len(session.chat.generation_prompt())
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(session.messages()) == 61


def test_a_stream_says_what_the_whole_answer_says(ask):
    whole = ask("say something", extra_body={"session_id": "whole"})
    chunks = list(
        ask(
            "say something",
            extra_body={"session_id": "streamed"},
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.session_id for chunk in chunks} == {"streamed"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_repeats_an_answer_and_another_does_not(ask):
    said = [
        ask("dice", seed=seed, temperature=1.5, max_tokens=12).choices[0].message.content for seed in (-7, -7, 8, 9)
    ]
    assert said[0] == said[1]
    assert len(set(said)) > 1


def test_a_stop_sequence_ends_the_answer_before_it(ask):
    said = ask("count", max_tokens=12).choices[0].message.content
    assert len(said) > 3
    stop = said[2]
    answer = ask("count", max_tokens=12, stop=[stop])
    assert answer.choices[0].message.content == said[: said.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert ask("count", max_tokens=12, stop=stop).choices[0].message.content == said[: said.index(stop)]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_and_their_results(ask, choice):
    answer = ask("Oslo?", tools=[WEATHER], tool_choice=choice, max_tokens=150)
    assert answer.choices[0].finish_reason == "tool_calls"
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    history = ["Oslo?", message.model_dump(exclude_none=True)]
    more = ask(
        *history, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}, tools=[WEATHER], tool_choice="none"
    )
    assert more.session_id == answer.session_id
    assert prefilled(more.usage) < 60
    assert more.choices[0].message.tool_calls is None


def test_streamed_calls_are_those_of_the_whole_answer(ask):
    options = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 150}
    (whole,) = ask("Rome?", **options).choices[0].message.tool_calls
    deltas = [
        call
        for chunk in ask("Rome?", **options, stream=True)
        for call in (chunk.choices[0].delta.tool_calls or [] if chunk.choices else [])
    ]
    assert deltas[0].index == 0
    assert deltas[0].function.name == "weather"
    assert "".join(delta.function.arguments for delta in deltas) == whole.function.arguments


def test_an_answer_is_held_to_a_schema(ask):
    response_format = {"type": "json_schema", "json_schema": {"name": "state", "schema": SCHEMA, "strict": True}}
    said = ask("is it up?", response_format=response_format, max_tokens=40).choices[0].message.content
    jsonschema.validate(json.loads(said), SCHEMA)
    said = ask("is it up?", response_format={"type": "json_object"}, max_tokens=200).choices[0].message.content
    assert isinstance(json.loads(said), dict)


def test_openais_client_parses_into_a_class(client, served):
    class State(BaseModel):
        up: bool

    parsed = client.chat.completions.parse(
        model=served.model,
        messages=[{"role": "user", "content": "is it up?"}],
        response_format=State,
        max_tokens=40,
    )
    assert isinstance(parsed.choices[0].message.parsed, State)


def test_another_end_of_a_history_is_a_branch_that_shares_what_came_before(ask):
    said = ask({"role": "system", "content": "You look after servers. " * 8}, "who?", extra_body={"session_id": "b"})
    other = ask({"role": "system", "content": "You look after servers. " * 8}, "when?", extra_body={"session_id": "b"})
    assert (said.session_id, other.session_id) == ("b", "b.b2")
    assert prefilled(other.usage) < 0.4 * other.usage.prompt_tokens
    # A branch's name, sent back as the session, means its family.
    answer = {"role": "assistant", "content": other.choices[0].message.content}
    history = [{"role": "system", "content": "You look after servers. " * 8}, "when?", answer, "and then?"]
    again = ask(*history, extra_headers={"X-Session-Id": "b.b2"})
    assert again.session_id == "b.b2"
    assert prefilled(again.usage) < 40


def test_any_text_names_a_session(ask, served):
    answer = ask("hello", extra_body={"session_id": "ada@example.com/ops 1"})
    more = ask(
        "hello",
        {"role": "assistant", "content": answer.choices[0].message.content},
        "again",
        extra_headers={"X-Session-Id": "ada@example.com/ops 1"},
    )
    assert answer.session_id == more.session_id
    assert httpx.get(f"{served.v1}/sessions/{more.session_id}").json()["messages"] == 4


def test_what_is_appended_follows_the_session_as_it_stands(ask, served):
    events = [{"role": "observation", "name": "pager", "text": "disk full on db-3"}]
    assert httpx.post(f"{served.v1}/sessions/watch/events", json={"events": events}).status_code == 201
    answer = ask("which?", extra_body={"append": True, "session_id": "watch"})
    assert answer.session_id == "watch"
    stored = served.runtime.session("watch").messages()
    assert [(message.role, message.text) for message in stored[:2]] == [
        ("observation", "disk full on db-3"),
        ("user", "which?"),
    ]
    with pytest.raises(openai.BadRequestError, match="to which session"):
        ask("which?", extra_body={"append": True})


def test_calls_on_one_session_queue_and_all_are_answered(ask):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: ask(f"q{n}", extra_body={"append": True, "session_id": "queue"}), range(6)))
    assert all(answer.session_id == "queue" for answer in answers)
    sizes = sorted(answer.usage.prompt_tokens for answer in answers)
    assert len(set(sizes)) == 6


def test_async_clients_at_once(served):
    import asyncio

    async def main() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=served.v1, api_key="-", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=served.model, messages=[{"role": "user", "content": f"n{n}"}], max_tokens=4
                    )
                    for n in range(8)
                )
            )

    answers = asyncio.run(main())
    assert len({answer.session_id for answer in answers}) == 8


# -- LangChain's client ------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(served: Served) -> ChatOpenAI:
    return ChatOpenAI(
        model=served.model, base_url=served.v1, api_key="-", max_tokens=150, max_retries=0, stream_usage=True
    )


def test_langchain_goes_on_in_one_session(llm):
    messages: list[BaseMessage] = [SystemMessage("You look after servers."), HumanMessage("who?")]
    answer = llm.invoke(messages)
    more = llm.invoke([*messages, answer, HumanMessage("and when?")])
    usage = more.usage_metadata
    assert usage["input_token_details"]["cache_read"] >= answer.usage_metadata["total_tokens"] - 1


def test_langchain_tools_and_results(llm):
    def weather(city: str) -> str:
        """The weather of a city."""
        return city

    bound = llm.bind_tools([weather], tool_choice="weather")
    answer = bound.invoke("Oslo?")
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    chunks = list(bound.stream("Rome?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert whole.tool_calls[0]["name"] == "weather"
    assert whole.usage_metadata["output_tokens"] > 0
    done = llm.bind_tools([weather]).invoke(
        [HumanMessage("Oslo?"), answer, ToolMessage("sunny", tool_call_id=call["id"])]
    )
    assert isinstance(done, AIMessage)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(llm, method):
    class State(BaseModel):
        """The state of a host."""

        up: bool

    if method == "json_mode":  # any object
        said = llm.with_structured_output(method=method).bind(max_tokens=200).invoke("state as JSON")
        assert isinstance(said, dict)
    else:
        assert isinstance(llm.with_structured_output(State, method=method).invoke("state"), State)


def test_langchain_through_the_responses_api(served):
    llm = ChatOpenAI(
        model=served.model,
        base_url=served.v1,
        api_key="-",
        max_tokens=8,
        use_responses_api=True,
        use_previous_response_id=True,
        max_retries=0,
    )
    first = llm.invoke("remember 42")
    assert first.response_metadata["id"].startswith("resp_")
    more = llm.invoke([HumanMessage("remember 42"), first, HumanMessage("what?")])
    assert more.usage_metadata["input_token_details"]["cache_read"] >= first.usage_metadata["total_tokens"] - 1
    streamed = list(llm.stream("remember 42"))
    assert "".join(chunk.text for chunk in streamed) == first.text


def test_threads_of_clients_do_not_meet(served):
    """Histories that begin alike, at the same time: each answer belongs to its own."""
    failures: list[BaseException] = []

    def converse(number: int) -> None:
        try:
            with openai.OpenAI(base_url=served.v1, api_key="-", max_retries=0) as client:
                messages: list[Any] = [{"role": "system", "content": "You look after servers."}]
                for turn in range(3):
                    messages.append({"role": "user", "content": f"client {number} turn {turn}"})
                    answer = client.chat.completions.create(model=served.model, messages=messages, max_tokens=4)
                    messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
                stored = httpx.get(f"{served.v1}/sessions/{answer.session_id}/messages").json()["data"]  # type: ignore[attr-defined]
                assert [(m["role"], m["text"]) for m in stored] == [(m["role"], m["content"]) for m in messages]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=converse, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
