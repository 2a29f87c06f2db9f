"""Replies that are held to a form: whatever picks the tokens, what comes out is whole and valid, or said to be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_families import ADD, FAMILIES, TOOLS, WEATHER, family, tokenizer_of

from infllm_agent.chat.format import ChatFormat
from infllm_agent.config import SamplingConfig
from infllm_agent.errors import ConfigError, UnsupportedSchema
from infllm_agent.generation.grammar import Grammars
from infllm_agent.generation.writer import Writer
from infllm_agent.runtime import AgentRuntime
from infllm_agent.tools import ToolCall, ToolSpec

NAMES = sorted(FAMILIES)
CHATS = {name: family(name)[1] for name in NAMES}
GRAMMARS = {name: Grammars(chat) for name, chat in CHATS.items()}
BY_NAME = {tool.name: tool for tool in TOOLS}


def grammars_of(chat: ChatFormat) -> Grammars:
    return next((made for made in GRAMMARS.values() if made.chat is chat), None) or Grammars(chat)


def write(
    chat: ChatFormat,
    *,
    schema: dict[str, Any] | None = None,
    tools: tuple[ToolSpec, ...] = (),
    choice: str = "auto",
    parallel: bool = True,
    seed: int = 0,
    script: list[int] | None = None,
    **sampling: Any,
) -> Writer:
    """An answer of a writer without any sense: random logits, behind a beginning that it insists on."""
    if schema is not None:
        constraint = grammars_of(chat).schema(schema)
    else:
        constraint = grammars_of(chat).calls(tools, choice, parallel=parallel)
    names = {tool.name for tool in tools} if tools else None
    writer = Writer(chat, SamplingConfig(**{"max_tokens": 200, **sampling}), constraint=constraint, names=names)
    generator = torch.Generator().manual_seed(seed)
    size = chat.encoder.backend.get_vocab_size() + 16  # models have room for more tokens than their vocabulary
    writer.begin()
    while not writer.finish_reason:
        logits = torch.randn(size, generator=generator) * 3
        if script and len(writer.generated) < len(script):
            logits[script[len(writer.generated)]] += 99
        writer.write(logits)
    writer.finish()
    assert len(writer.generated) <= sampling.get("max_tokens", 200)
    return writer


def check_calls(calls: tuple[ToolCall, ...], tools: tuple[ToolSpec, ...] = TOOLS) -> None:
    for call in calls:
        tool = next(tool for tool in tools if tool.name == call.name)
        jsonschema.validate(call.arguments, tool.parameters)


# ------------------------------------------------------------------------------------------------ schemas

keys = st.sampled_from(["a", "b", "name", "名前 ü", 'q"\\', "\n", "<|im_end|>", ""])
scalars = st.one_of(
    st.sampled_from(
        [{"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": "integer"}]
    ),
    st.sampled_from(
        [{"type": "string", "format": kind} for kind in ("date", "date-time", "email", "uuid", "ipv4", "x")]
    ),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-99, 99),
        st.integers(0, 900),
    ),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low}, st.integers(-5, 5)),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^[A-Z]{2}-\\d{3}$", "^(a|bc)+$", "^x@y$")]),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.none() | st.booleans() | st.integers(-9, 99) | keys, min_size=1, max_size=4),
    ),
    st.builds(lambda value: {"const": value}, keys | st.integers(0, 9)),
    st.just({"type": ["string", "null"]}),
    st.just({"$ref": "#/$defs/tree"}),
)


def objects(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], required: int, more: Any) -> dict[str, Any]:
        schema = {"type": "object", "properties": properties, "required": list(properties)[:required]}
        return schema if more is None else {**schema, "additionalProperties": more}

    return st.builds(
        build,
        st.dictionaries(keys, parts, max_size=4),
        st.integers(0, 4),
        st.sampled_from([None, False, {"type": "integer"}]),
    )


schemas = st.recursive(
    scalars,
    lambda parts: st.one_of(
        objects(parts),
        st.builds(
            lambda part, low: {"type": "array", "items": part, "minItems": low, "maxItems": low + 3},
            parts,
            st.integers(0, 3),
        ),
        st.builds(lambda part: {"type": "array", "items": part}, parts),
        st.builds(lambda options: {"anyOf": options}, st.lists(parts, min_size=1, max_size=3)),
        st.just({"oneOf": [{"type": "string"}, {"type": "integer"}]}),
    ),
    max_leaves=8,
)
TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "required": ["value"],
}


def with_tree(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "$defs": {"tree": TREE}}


SEEDS = iter(range(10**9))


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(schema=schemas, room=st.integers(0, 60))
def test_whatever_is_written_under_a_schema_is_whole_and_valid(schema: dict[str, Any], room: int) -> None:
    chat, schema = CHATS["qwen"], with_tree(schema)
    shortest = len(grammars_of(chat).schema(schema)._way or [])
    writer = write(chat, schema=schema, max_tokens=shortest + room + 1, seed=next(SEEDS))
    assert writer.finish_reason == "stop"
    jsonschema.validate(json.loads(writer.text), schema)


def test_keys_and_values_that_spell_control_tokens() -> None:
    for text in ("<|im_end|>", "</s>", "<tool_call>"):
        schema = {"type": "object", "properties": {text: {"const": f"a{text}b"}}, "required": [text]}
        for name in ("qwen", "mistral_v3"):
            writer = write(CHATS[name], schema=schema)
            assert json.loads(writer.text) == {text: f"a{text}b"}
            assert CHATS[name].encoder.control_ids.isdisjoint(writer.generated)


def test_any_object() -> None:
    for seed in range(20):
        writer = write(CHATS["llama"], schema={"type": "object"}, seed=seed, max_tokens=30)
        assert isinstance(json.loads(writer.text), dict)
        assert writer.finish_reason == "stop"


def test_a_limit_below_the_shortest_answer_is_told() -> None:
    chat = CHATS["qwen"]
    schema = {"type": "object", "properties": {"name": {"type": "string", "minLength": 40}}, "required": ["name"]}
    shortest = len(grammars_of(chat).schema(schema)._way or [])
    for limit in range(1, shortest + 5):
        writer = write(chat, schema=schema, max_tokens=limit)
        assert len(writer.generated) <= limit
        if writer.finish_reason == "stop":
            jsonschema.validate(json.loads(writer.text), schema)
        else:
            assert writer.finish_reason == "length"
            assert limit < shortest


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([1], "must be an object, not list"),
        (True, "must be an object, not bool"),
        ({"type": "strin"}, "Invalid type: strin"),
        (
            {"type": "object", "properties": {"a": {"items": {"not": {}}}}},
            'at "properties/a/items": Unimplemented keys: \\["not"',
        ),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/$defs/none"}, "/\\$defs/none"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
        ({"pattern": "(?=a)b", "type": "string"}, "look-ahead"),
        ({"enum": []}, "Unsatisfiable"),
        ({"const": float("nan")}, "no JSON"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused_by_their_part(schema: Any, words: str) -> None:
    grammars = GRAMMARS["qwen"]
    with pytest.raises(UnsupportedSchema, match=words) as caught:
        grammars.schema(schema)
    assert "\n" not in str(caught.value)


def test_unknown_formats_ask_for_nothing_and_properties_are_those_named() -> None:
    chat = CHATS["qwen"]
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "password"}}, "required": ["a"]}
    for seed in range(5):
        assert list(json.loads(write(chat, schema=schema, seed=seed).text)) == ["a"]


def test_properties_of_several_parts_are_not_closed_against_each_other() -> None:
    parts = [{"properties": {key: {"type": "integer"}}, "required": [key], "type": "object"} for key in "ab"]
    writer = write(CHATS["qwen"], schema={"allOf": parts})
    assert json.loads(writer.text).keys() >= {"a", "b"}


# ------------------------------------------------------------------------------------------------ calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("choice", ["any", "add", "get_weather"])
def test_forced_calls_are_calls_of_that_tool_and_nothing_else(name: str, choice: str) -> None:
    for seed in range(4):
        writer = write(CHATS[name], tools=TOOLS, choice=choice, seed=seed, max_tokens=60)
        assert (writer.finish_reason, writer.text, writer.invalid_calls) == ("tool_calls", "", ())
        check_calls(writer.calls)
        if choice != "any":
            assert {call.name for call in writer.calls} == {choice}


@pytest.mark.parametrize("name", NAMES)
def test_several_calls_only_where_they_are_allowed(name: str) -> None:
    counts = {
        parallel: {
            len(write(CHATS[name], tools=(ADD,), choice="any", parallel=parallel, seed=seed, max_tokens=120).calls)
            for seed in range(10)
        }
        for parallel in (True, False)
    }
    assert counts[False] == {1}
    assert (max(counts[True]) > 1) is (name != "llama")


def opening(chat: ChatFormat, seed: int) -> list[int]:
    """What a writer insists on that wants to call."""
    text = "" if not chat.tools.form.opener or seed % 2 else "I see.\n"
    return chat.encoder.encode_control(text + chat.tools.form.alone)


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_opened_is_held_to_its_form(name: str, markers: bool) -> None:
    template, bos, eos, _ = FAMILIES[name]
    chat = ChatFormat(tokenizer_of(template, bos=bos, eos=eos, markers=markers))
    called = 0
    for seed in range(12):
        writer = write(chat, tools=TOOLS, seed=seed, script=opening(chat, seed), max_tokens=100, temperature=1.0)
        check_calls(writer.calls)
        if writer.finish_reason != "length":
            assert not writer.invalid_calls
        called += bool(writer.calls)
    assert called


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_with_none_no_call_can_be_opened(name: str, markers: bool) -> None:
    template, bos, eos, _ = FAMILIES[name]
    chat = ChatFormat(tokenizer_of(template, bos=bos, eos=eos, markers=markers))
    for seed in range(6):
        writer = write(chat, tools=TOOLS, choice="none", seed=seed, script=opening(chat, seed), max_tokens=60)
        assert not writer.calls
        assert not writer.invalid_calls
        assert writer.text


def test_free_text_may_have_other_control_tokens() -> None:
    chat = CHATS["qwen"]
    think = chat.encoder.encode_control("<think>")[0]
    constraint = grammars_of(chat).calls(TOOLS, "auto")
    assert constraint.mask(torch.zeros(1000))[think] == 0
    assert constraint.advance(think, 100) == [think]
    assert constraint.free


def test_a_call_cut_by_the_limit_is_no_call() -> None:
    chat = CHATS["qwen"]
    writer = write(chat, tools=TOOLS, choice="any", max_tokens=5)
    assert (writer.finish_reason, writer.calls) == ("length", ())
    assert [invalid.text for invalid in writer.invalid_calls] == [writer.text]


def test_choices_that_cannot_be() -> None:
    chat = CHATS["qwen"]
    for tools, choice in (((), "any"), (TOOLS, "nonesuch")):
        with pytest.raises(ConfigError, match="tool_choice"):
            grammars_of(chat).calls(tools, choice)
    bad = ToolSpec("bad", "", {"properties": {"x": {"type": "strin"}}})
    with pytest.raises(UnsupportedSchema, match=r'tool "bad".*"properties/x"'):
        grammars_of(chat).calls((bad,), "auto")


def test_stop_sequences_and_the_penalty_leave_the_form_alone() -> None:
    chat = CHATS["qwen"]
    for seed in range(5):
        writer = write(
            chat, schema=WEATHER.parameters, seed=seed, stop=("{", '"'), repetition_penalty=9.0, temperature=1.0
        )
        jsonschema.validate(json.loads(writer.text), WEATHER.parameters)
        writer = write(
            chat, tools=TOOLS, choice="any", seed=seed, stop=("{", '"'), repetition_penalty=9.0, max_tokens=60
        )
        check_calls(writer.calls)
        assert writer.calls


def test_forced_tokens_need_no_logits() -> None:
    chat = CHATS["qwen"]
    constraint = grammars_of(chat).calls((ADD,), "any")
    begun = chat.decode(constraint.begin(100))
    assert begun.startswith('<tool_call>\n{"name": "add", "arguments": {"a":')
    assert len(grammars_of(chat).calls((ADD,), "any").begin(3)) == 3


# ------------------------------------------------------------------------------------------------ with models


def small_schemas(count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(schema=objects(schemas))
    def collect(schema: dict[str, Any]) -> None:
        found.append(with_tree(schema))

    collect()
    return found[:count]


def check_replies(runtime: AgentRuntime, count: int, max_tokens: int) -> None:
    session = runtime.session("schemas")
    session.append_user("Describe a city as JSON.")
    session.commit()
    for schema in small_schemas(count):
        reply = session.reply(schema=schema, max_tokens=max_tokens, temperature=1.0, seed=1)
        if reply.finish_reason == "length":
            assert len(runtime.grammars.schema(schema)._way or []) > max_tokens
        else:
            jsonschema.validate(json.loads(reply.text), schema)
        session.rollback()


def test_a_tiny_model_of_random_weights_writes_valid_json(tmp_path: Path, tiny_model_folder: Path) -> None:
    with AgentRuntime.open(tmp_path, str(tiny_model_folder), dtype="float32") as runtime:
        check_replies(runtime, 30, 60)


@pytest.mark.model
@pytest.mark.slow
def test_the_packaged_model_writes_valid_json(tmp_path: Path) -> None:
    with AgentRuntime.open(tmp_path) as runtime:
        check_replies(runtime, 10, 20)
