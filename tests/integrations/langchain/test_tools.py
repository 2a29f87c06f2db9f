"""Tools and structured output through LangChain, on a model of random weights: the worst writer there is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import UnsupportedSchema
from infllm_agent.integrations.langchain import ChatInfLLM
from infllm_agent.model.local_model import LocalModel
from infllm_agent.routing.requests import tool_choice
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session

MEMORY = MemoryConfig(n_local=256, topk=8, candidates=16, max_cached_block=16)


class Page(BaseModel):
    """Page a person."""

    who: Literal["ada", "ben"]
    urgent: bool


class Walk(TypedDict):
    """A walk."""

    steps: Annotated[int, ..., "how many"]
    where: Annotated[Literal["park", "town"], ..., "where to"]


class Note(BaseModel):
    """A note."""

    text: str


@tool
def read_log(host: Literal["db-3", "web-1"], lines: int = 10) -> str:
    """The latest lines of a host's log."""
    return "02:14 disk full"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tmp_path: Path, tiny_model: LocalModel) -> Iterator[Callable[..., ChatInfLLM]]:
    with AgentRuntime(tmp_path, tiny_model, MEMORY) as runtime:
        yield lambda **fields: ChatInfLLM(**{"runtime": runtime, "max_tokens": 120, **fields})


ANY_TOOL: list[Any] = [
    read_log,
    Page,
    {"name": "plain", "description": "does it", "parameters": {"type": "object", "properties": {}}},
    {"type": "function", "function": {"name": "openai", "description": "", "parameters": {"type": "object"}}},
    {"name": "claude", "description": "", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
]


@pytest.mark.parametrize("choice", ["any", "required", True])
def test_a_call_is_made_of_any_tool(make, choice):
    answer = make().bind_tools(ANY_TOOL, tool_choice=choice).invoke("go")
    (call,) = answer.tool_calls
    assert call["name"] in ("read_log", "Page", "plain", "openai", "claude")
    assert (answer.text, answer.invalid_tool_calls) == ("", [])
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert [block["type"] for block in answer.content_blocks] == ["tool_call"]


@pytest.mark.parametrize(
    "choice",
    ["Page", {"type": "function", "function": {"name": "Page"}}, {"type": "tool", "name": "Page"}],
)
def test_a_call_is_made_of_the_tool_named(make, choice):
    llm = make().bind_tools(ANY_TOOL, tool_choice=choice)
    answer = llm.invoke("go")
    (call,) = answer.tool_calls
    assert call["name"] == "Page"
    Page.model_validate(call["args"])
    full: Any = None
    for chunk in llm.stream("go again"):
        assert isinstance(chunk, AIMessageChunk)
        full = chunk if full is None else full + chunk
    (streamed,) = full.tool_calls
    assert streamed["name"] == "Page"
    (later,) = asyncio.run(llm.ainvoke("and again")).tool_calls
    assert later["name"] == "Page"


def test_several_calls_and_none(make):
    several = make(max_tokens=300, temperature=1.5, seed=2).bind_tools(ANY_TOOL, tool_choice="any")
    many = several.bind(parallel_tool_calls=True).invoke("go")
    assert many.tool_calls
    assert len({call["id"] for call in many.tool_calls}) == len(many.tool_calls)
    none = make(max_tokens=8).bind_tools([read_log], tool_choice="none").invoke("go")
    assert none.tool_calls == []
    assert none.text


def test_text_before_calls_stays_apart_from_them(make, monkeypatch):
    """In content made of blocks, what has the same index is merged."""
    self_reply = Session.stream_reply

    def reply(self: Session, **options: Any) -> Iterator[str]:
        yield "I look."
        yield from self_reply(self, **options)

    monkeypatch.setattr(Session, "stream_reply", reply)
    llm = make(output_version="v1").bind_tools([read_log], tool_choice="any")
    full: Any = None
    for chunk in llm.stream("go"):
        full = chunk if full is None else full + chunk
    assert [block["type"] for block in full.content_blocks] == ["text", "tool_call"]
    assert full.content_blocks[0]["text"] == "I look."
    assert [call["name"] for call in full.tool_calls] == ["read_log"]


def test_a_history_with_calls_goes_on_warm_and_is_read_cold(make):
    llm = make(session_id="ops").bind_tools([read_log])
    asked = [SystemMessage("Be brief."), HumanMessage("What is wrong?")]
    called = llm.invoke(asked, tool_choice="any")
    results = [ToolMessage("disk full", tool_call_id=call["id"]) for call in called.tool_calls]
    history = [*asked, called, *results]
    answer = llm.invoke(history, max_tokens=4)
    assert answer.response_metadata["session_id"] == "ops"
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 100
    cold = llm.invoke(history, max_tokens=4, session_id="cold")
    assert cold.usage_metadata["input_token_details"]["cache_read"] == 0
    messages = make().runtime.session("cold").messages()
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [spec.name for spec in messages[0].tools] == ["read_log"]
    assert messages[2].calls[0].name == "read_log"
    assert messages[3].name == "read_log"


def test_other_tools_are_another_history(make):
    llm = make(session_id="ops", max_tokens=2)
    llm.invoke([HumanMessage("hello")])
    assert llm.bind_tools([read_log]).invoke("hello").response_metadata["session_id"] == "ops.b2"


def test_tokens_are_counted_with_tools(make):
    llm = make(max_tokens=1)
    messages = [
        SystemMessage("Be brief."),
        HumanMessage("go"),
        AIMessage("", tool_calls=[{"name": "read_log", "args": {"host": "db-3"}, "id": "call00001"}]),
        ToolMessage("disk full", tool_call_id="call00001"),
    ]
    answer = llm.bind_tools([read_log]).invoke(messages)
    assert llm.get_num_tokens_from_messages(messages, tools=[read_log]) == answer.usage_metadata["input_tokens"]
    assert llm.get_num_tokens_from_messages([]) > 0


# -- structured output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("schema", [Page, Walk, Page.model_json_schema()], ids=["pydantic", "TypedDict", "JSON"])
def test_structured_output(make, method, schema):
    llm = make(max_tokens=200).with_structured_output(schema, method=method)
    for answer in (llm.invoke("go"), list(llm.stream("go on"))[-1], asyncio.run(llm.ainvoke("and on"))):
        if schema is Page:
            assert isinstance(answer, Page)
        elif schema is Walk:
            assert set(answer) == {"steps", "where"}
            assert isinstance(answer["steps"], int)
        else:
            Page.model_validate(answer)


def test_structured_output_leaves_the_history_as_it_is(make):
    llm = make(session_id="ops", max_tokens=60)
    messages = [HumanMessage("hello"), llm.invoke("hello", max_tokens=3), HumanMessage("who?")]
    raw = llm.with_structured_output(Page, include_raw=True).invoke(messages)["raw"]
    assert raw.response_metadata["session_id"] == "ops"
    assert raw.usage_metadata["input_token_details"]["cache_read"] > 0
    assert make(session_id="ops").invoke([*messages, raw, HumanMessage("why?")], max_tokens=2)


def test_json_mode_without_a_schema_gives_any_object(make):
    answer = make(max_tokens=60).with_structured_output(None, method="json_mode").invoke("go")
    assert isinstance(answer, dict)


def test_include_raw_has_the_answer_and_what_was_wrong_with_it(make):
    class Never(BaseModel):
        number: int = Field(ge=0, le=9)

        @field_validator("number")
        @classmethod
        def _refuse(cls, number: int) -> int:
            raise ValueError("no number is good enough")

    llm = make(max_tokens=60)
    result = llm.with_structured_output(Never, include_raw=True).invoke("go")
    assert isinstance(result["raw"], AIMessage)
    assert result["parsed"] is None
    assert "no number is good enough" in str(result["parsing_error"])
    with pytest.raises(OutputParserException, match="no number is good enough"):
        llm.with_structured_output(Never).invoke("go")
    good = llm.with_structured_output(Page, include_raw=True).invoke("go")
    assert isinstance(good["parsed"], Page)
    assert good["parsing_error"] is None


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("schema", [Page, Note, Walk, Note.model_json_schema()], ids=["Page", "Note", "Walk", "JSON"])
def test_an_answer_cut_short_is_no_object(make, method, schema):
    """Parsers would complete it, and make up what was never said."""
    for limit in (3, 8):
        llm = make(max_tokens=limit)
        raw = llm.with_structured_output(schema, method=method, include_raw=True).invoke("go")
        assert raw["raw"].response_metadata["finish_reason"] == "length"
        assert raw["parsed"] is None
        assert isinstance(raw["parsing_error"], OutputParserException)
        with pytest.raises(OutputParserException, match="does not fit into max_tokens"):
            llm.with_structured_output(schema, method=method).invoke("go")


def test_agents_end_with_an_object(make):
    """The model may call tools first, and its answer is an object in the end."""
    agent = create_agent(make(max_tokens=200, temperature=1.0), [read_log], response_format=Page)
    state = agent.invoke({"messages": [HumanMessage("Who?")]}, {"recursion_limit": 500})
    assert isinstance(state["structured_response"], Page)
    agent = create_agent(make(max_tokens=200), response_format=ToolStrategy(Page))
    assert isinstance(agent.invoke({"messages": [HumanMessage("Who?")]})["structured_response"], Page)


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ([7], None, "not a tool: 7"),
        ([{"name": "f", "parameters": 3}], None, "f"),
        ([read_log], "write_log", "'write_log' is neither auto, none, any nor one of the tools: read_log"),
        ([], "any", "needs tools"),
        ([{"type": "web_search_preview"}], None, "its provider's own"),
        ([{"name": "a b", "description": "", "parameters": {}}], None, "not allowed"),
    ],
)
def test_tools_that_are_none(make, tools, choice, said):
    llm = make(session_id="ops")
    with pytest.raises(ValueError, match=said):
        llm.bind_tools(tools, tool_choice=choice).invoke("go")
    assert list(llm.runtime.sessions()) == []


def test_schemas_that_are_none(make):
    llm = make(session_id="ops")
    for refused in ("thing", 7, None):
        with pytest.raises(ValueError, match="schema"):
            llm.with_structured_output(refused)
    with pytest.raises(ValueError, match="method"):
        llm.with_structured_output(Page, method="magic")
    with pytest.raises(ValueError, match="without a schema"):
        llm.invoke("go", response_format={"type": "json_schema"})
    bad = {"title": "x", "type": "object", "properties": {"a": {"type": "sometimes"}}, "required": ["a"]}
    with pytest.raises(UnsupportedSchema, match="a"):
        llm.with_structured_output(bad).invoke("go")
    assert [info.messages for info in llm.runtime.sessions()] in ([], [0])


def test_results_that_no_call_asked_for(make):
    llm = make(session_id="ops")
    with pytest.raises(ValueError, match=r"message 2 of 2 .* 'call-7' that no AIMessage before it made"):
        llm.invoke([HumanMessage("go"), ToolMessage("done", tool_call_id="call-7")])
    assert list(llm.runtime.sessions()) == []


def test_choices_in_other_words():
    names = ["f", "g"]
    for choice, expected in [(None, None), ("auto", "auto"), (False, "none"), ({"type": "any"}, "any"), ("g", "g")]:
        assert tool_choice(choice, names) == expected


def test_what_frameworks_are_told(make):
    profile = make().profile
    assert profile["max_input_tokens"] > 10_000_000
    assert (profile["tool_calling"], profile["structured_output"], profile["image_inputs"]) == (True, True, False)
    bound = make().with_structured_output(Page).first
    assert json.loads(json.dumps(bound.kwargs["ls_structured_output_format"]))["kwargs"]["method"] == "json_schema"


def test_a_tool_without_parameters_gets_none(make):
    @tool
    def stop() -> str:
        """Stop everything."""
        return "stopped"

    llm = make(temperature=2.0, seed=1).bind_tools([stop], tool_choice="stop")
    for number in range(5):
        (call,) = llm.invoke(f"go {number}").tool_calls
        assert call["args"] == {}
