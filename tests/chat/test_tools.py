"""Tools and calls: in each family's form, found again in what a model writes, and never more than text."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_families import ADD, FAMILIES, PLAIN_ADDED, SPECIAL, TOOLS, WEATHER, family, parsed_ids
from transformers import PreTrainedTokenizerFast

from infllm_agent.chat.call_form import short_id
from infllm_agent.chat.format import ChatFormat
from infllm_agent.errors import ConfigError, InvalidName
from infllm_agent.generation.text_pieces import TextPieces
from infllm_agent.tools import ToolCall, ToolSpec, calls_from_json, calls_json, tools_from_json, tools_json

NAMES = sorted(FAMILIES)
LOADED = {(name, markers): family(name, markers=markers) for name in NAMES for markers in (True, False)}

hostile = st.lists(
    st.one_of(
        st.sampled_from([*SPECIAL, *PLAIN_ADDED, "\n", '"', "}", "]", "\\", "<tool_", "call>"]), st.text(max_size=8)
    ),
    max_size=6,
).map("".join)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | hostile,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile, inner, max_size=3),
    max_leaves=6,
)
call_names = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=12)
ids = st.none() | st.text(string.ascii_letters + string.digits, min_size=9, max_size=9)
tool_calls = st.builds(ToolCall, call_names, st.dictionaries(hostile, json_values, max_size=3), ids)


def exact(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[return-value]


def announced(chat: ChatFormat, tools: tuple[ToolSpec, ...], content: str, *, first: bool = True) -> list[int]:
    ids = chat.open("system", first=first, tools=tools) + chat.encoder.encode_text(content)
    return ids + chat.close("system", tools=tools)


def controls(chat: ChatFormat, ids: list[int]) -> list[int]:
    return [token for token in ids if token in chat.encoder.control_ids]


def as_messages(calls: list[ToolCall], content: str = "") -> dict[str, Any]:
    listed = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": listed}


# ------------------------------------------------------------------------------------------------ data


def test_stored_forms_round_trip() -> None:
    assert tools_from_json(tools_json(TOOLS)) == TOOLS
    calls = (ToolCall("a", {"x": [1, {"é\0": None}]}, "id"), ToolCall("b", {}))
    assert calls_from_json(calls_json(calls)) == calls
    assert ToolSpec.from_json(WEATHER.to_json()) == ToolSpec.from_json(WEATHER.to_json()["function"]) == WEATHER
    assert ToolSpec("x").parameters == {"type": "object", "properties": {}}


@settings(max_examples=100, deadline=None)
@given(calls=st.lists(tool_calls, max_size=3))
def test_calls_are_stored_as_they_are(calls: list[ToolCall]) -> None:
    text = calls_json(calls)
    text.encode()
    assert calls_from_json(text) == tuple(calls)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ToolSpec("a b"), InvalidName, "tool name 'a b'"),
        (lambda: ToolSpec(3), InvalidName, "3"),  # type: ignore[arg-type]
        (lambda: ToolSpec("a", parameters={"type": "string"}), ConfigError, "schema of an object"),
        (lambda: ToolSpec("a", parameters={"x": {1, 2}}), ConfigError, "no JSON"),
        (lambda: ToolSpec("a", 3), ConfigError, "description"),  # type: ignore[arg-type]
        (lambda: ToolSpec.from_json({"description": "x"}), ConfigError, "needs a name"),
        (lambda: ToolCall("a", [1]), ConfigError, "not an object"),  # type: ignore[arg-type]
        (lambda: ToolCall("a", {"x": float("nan")}), ConfigError, "nan"),
        (lambda: ToolCall("a", {"x": {1: 2}}), ConfigError, "texts"),
    ],
)
def test_what_is_no_tool_and_no_call(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_surrogates_do_not_reach_the_store() -> None:
    assert ToolCall("a\ud800", {"\udfff": ["\ud800"]}) == ToolCall("a\ufffd", {"\ufffd": ["\ufffd"]})


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("name", NAMES)
def test_each_family_is_known_by_its_template(name: str) -> None:
    tokenizer, chat = family(name)
    assert chat.tools.native is FAMILIES[name][3]
    opener = {"llama": "", "mistral": "[TOOL_CALLS]"}.get(name.split("_")[0], "<tool_call>")
    assert chat.tools.form.opener == opener
    text = exact(tokenizer, announced(chat, TOOLS, "Be brief."))
    assert text.count("Be brief.") == text.count("get_weather") == text.count("Adds") == 1


@pytest.mark.parametrize(
    "name", [name for name in NAMES if FAMILIES[name][3] and name not in ("smollm3", "mistral_v3")]
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_dialogue_with_calls_equals_the_template(name: str, count: int) -> None:
    tokenizer, chat = family(name)
    if name == "llama" and count == 2:
        pytest.skip("the template refuses two calls")
    calls = [ToolCall("get_weather", {"city": "Paris"}, "abcdefgh1"), ToolCall("add", {"a": 2}, "abcdefgh2")][:count]
    content = "Let me see." if name == "qwen" else ""
    ids = announced(chat, TOOLS, "Be brief.") + chat.render("user", "Go.") + chat.open("assistant")
    ids += chat.encoder.encode_text(content) + chat.close("assistant", calls=calls, after_text=bool(content))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go."},
        as_messages(calls, content),
    ]
    expected = tokenizer.apply_chat_template(
        messages, tools=[tool.to_json() for tool in TOOLS], tokenize=False, tools_in_user_message=False
    )
    if name == "llama":
        from datetime import datetime

        expected = expected.replace(datetime.now().strftime("%d %b %Y"), "05 Mar 2031")
    assert exact(tokenizer, ids) == expected


def test_results_take_the_templates_form_with_the_calls_id() -> None:
    for name, expected in {
        "mistral_v3": '[TOOL_RESULTS] {"content": x, "call_id": "abcdefgh1"}[/TOOL_RESULTS]',
        "mistral_v11": "[TOOL_RESULTS]abcdefgh1[TOOL_CONTENT]x[/TOOL_RESULTS]",
        "mistral_v13": "[TOOL_RESULTS]x[/TOOL_RESULTS]",
        "qwen": "<|im_start|>user\n<tool_response>\nx\n</tool_response><|im_end|>\n",
    }.items():
        tokenizer, chat = family(name)
        ids = (
            chat.open("tool", call_id="abcdefgh1")
            + chat.encoder.encode_text("x")
            + chat.close("tool", call_id="abcdefgh1")
        )
        assert exact(tokenizer, ids) == expected
    # an id of another kind stands there as the same short one, with the call and with its result
    tokenizer, chat = family("mistral_v3")
    call = exact(tokenizer, chat.close("assistant", calls=[ToolCall("add", {}, "call_4711")], after_text=False))
    assert short_id("call_4711") in call
    assert short_id("call_4711") in exact(tokenizer, chat.close("tool", call_id="call_4711"))


def test_tools_announced_later_keep_the_form_of_a_later_message() -> None:
    for name, begin in {
        "qwen": "<|im_start|>system\n",
        "llama": "<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n",
        "mistral_v3": "[AVAILABLE_TOOLS] [{",
        "mistral_v11": "[SYSTEM_PROMPT]",
        "chatml": "<|im_start|>system\n",
    }.items():
        tokenizer, chat = family(name)
        assert exact(tokenizer, announced(chat, TOOLS, "x", first=False)).startswith(begin)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(text=hostile, call=tool_calls)
def test_nothing_in_tools_and_calls_becomes_a_control_token(name: str, text: str, call: ToolCall) -> None:
    _, chat = LOADED[name, True]
    tool = ToolSpec("grep", text, {"properties": {text: {"enum": [text], "description": text}}, "required": [text]})
    harmless = announced(chat, (ToolSpec("grep", "x", {"properties": {"x": {}}}),), "x")
    assert controls(chat, announced(chat, (tool,), text)) == controls(chat, harmless)
    harmless = chat.close("assistant", calls=[ToolCall("x", {}), ToolCall("x", {})])
    assert controls(chat, chat.close("assistant", calls=[call, call])) == controls(chat, harmless)


def test_the_default_system_message_is_known() -> None:
    assert family("qwen")[1].default_system == "You are Q."
    assert family("chatml")[1].default_system == family("mistral_v3")[1].default_system == ""


# ------------------------------------------------------------------------------------------------ reading


def assistant_ids(chat: ChatFormat, text: str, calls: list[ToolCall]) -> list[int]:
    """What a model would have generated."""
    return chat.encoder.encode_text(text) + chat.tools.encode_calls(calls, after_text=bool(text))


def without_id(calls: Any) -> list[ToolCall]:
    return [ToolCall(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(calls=st.lists(tool_calls, min_size=1, max_size=3), text=st.sampled_from(["", "Let me see.", "a\n\nb"]))
def test_calls_are_found_as_they_were_written(name: str, markers: bool, calls: list[ToolCall], text: str) -> None:
    _, chat = LOADED[name, markers]
    if not chat.tools.form.opener:
        text = ""
    parsed = parsed_ids(chat, assistant_ids(chat, text, calls))
    assert parsed.text == text
    assert without_id(parsed.calls) == without_id(calls)
    assert not parsed.invalid
    if chat.tools.form.end.count("\ue010") or "\ue010" in chat.tools.form.middle:
        assert [call.id for call, given in zip(parsed.calls, calls, strict=True) if given.id] == [
            call.id for call in calls if call.id
        ]


MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|im_end|>"]
PARTS = [
    *("\n", " ", "add", "{", '"', "}", "]", "[", "{}", "[]", "null", "NaN", "text", ";", "[" * 3000, "9" * 5000),
    *('{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": {}}', '[{"name": "x"}]'),
    *('{"name": "add"', '{"name": 3}', '{"a": 1}', '{"name":"f","arguments":"{}"}'),
    *('{"name": "f", "arguments": {"x": 1e999}}', '{"name": "\\ud800", "arguments": {"x": "\\udc00"}}'),
]
pieces_of_calls = st.sampled_from(MARKERS) | st.sampled_from(PARTS)


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("name", ["qwen", "llama", "mistral_v3", "mistral_v11"])
@settings(max_examples=150, deadline=None)
@given(written=st.lists(st.one_of(pieces_of_calls, st.text(max_size=6)), max_size=8), known=st.booleans())
def test_any_text_is_read_and_streams_as_it_reads(name: str, markers: bool, written: list[str], known: bool) -> None:
    _, chat = LOADED[name, markers]
    names = {"add", "f"} if known else None
    ids = chat.encoder.encode_control("".join(written).encode("utf-8", "replace").decode())
    parsed = parsed_ids(chat, ids, names)
    calls_json(parsed.calls).encode()
    parsed.text.encode()
    for invalid in parsed.invalid:
        assert invalid.text in parsed.text
        assert invalid.reason
    pieces = TextPieces(chat.encoder.backend, reader=chat.reader, names=names)
    streamed = [pieces.add(token) for token in ids]
    streamed.append(pieces.finish())
    assert "".join(streamed) == pieces.text == parsed.text
    assert (pieces.calls, pieces.invalid) == (parsed.calls, parsed.invalid)


@pytest.mark.parametrize(
    ("written", "text", "calls", "reasons"),
    [
        ('<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', "", [("a", {"x": 1})], []),
        ('Hm. <tool_call>{"name": "a"}</tool_call> Done.', "Hm. Done.", [("a", {})], []),
        ('<tool_call>\n[{"name": "a"}, {"name": "b"}]\n</tool_call>\n', "", [("a", {}), ("b", {})], []),
        ('<tool_call>{"name": "a", "arguments": "{\\"x\\": 2}"}</tool_call>', "", [("a", {"x": 2})], []),
        ('<tool_call>{"function": {"name": "a", "parameters": {"x": 2}}}</tool_call>', "", [("a", {"x": 2})], []),
        (
            '<tool_call>{"name": "a", "arguments": {"x": "</tool_call>"}}</tool_call>',
            "",
            [("a", {"x": "</tool_call>"})],
            [],
        ),
        ('<tool_call>{"name": "a"', None, [], ["no JSON"]),
        ('<tool_call>{"name": "a"}', None, [], ["not closed by </tool_call>"]),
        ('<tool_call>{"name": "a"} and</tool_call> b', None, [], ["not closed"]),
        ('<tool_call>{"arguments": {}}</tool_call>', None, [], ["no name"]),
        ('<tool_call>{"name": "a", "arguments": 3}</tool_call>', None, [], ["arguments are 3"]),
        ("<tool_call>[]</tool_call>", None, [], ["empty list"]),
        ('<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', None, [], ["NaN"]),
        ("<tool_call></tool_call>", None, [], ["no JSON"]),
        ('<tool_call>{<tool_call>{"name": "b"}</tool_call>', "<tool_call>{", [("b", {})], ["no JSON"]),
        ("no call </tool_call>", None, [], []),
    ],
)
def test_hermes_calls(written: str, text: str | None, calls: list[Any], reasons: list[str]) -> None:
    _, chat = LOADED["qwen", True]
    parsed = parsed_ids(chat, chat.encoder.encode_control(written))
    assert parsed.text == (written if text is None else text)
    assert [(call.name, call.arguments) for call in parsed.calls] == calls
    assert len(parsed.invalid) == len(reasons)
    for invalid, reason in zip(parsed.invalid, reasons, strict=True):
        assert reason in invalid.reason


@pytest.mark.parametrize(
    ("written", "calls", "invalid"),
    [
        ('{"name": "add", "parameters": {"a": 1}}', [("add", {"a": 1})], 0),
        (' <|python_tag|>{"name": "add", "parameters": {}}', [("add", {})], 0),
        ('{"name": "add", "parameters": {}}; {"name": "add", "arguments": {}}', [("add", {}), ("add", {})], 0),
        ('{"name": "Ann", "parameters": {}}', [], 0),  # no tool of that name: a text
        ('{"name": "Ann", "age": 3}', [], 0),
        ('The call is {"name": "add", "parameters": {}}', [], 0),
        ("<|python_tag|>print(1)", [], 1),
        ('{"name": "add", "parameters": {', [], 1),
        ("{}", [], 0),
    ],
)
def test_llama_calls(written: str, calls: list[Any], invalid: int) -> None:
    _, chat = LOADED["llama", True]
    parsed = parsed_ids(chat, chat.encoder.encode_control(written), {"add"})
    assert [(call.name, call.arguments) for call in parsed.calls] == calls
    assert len(parsed.invalid) == invalid
    assert parsed.text == ("" if calls else written)


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        ('[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "abcdefgh1"}]', [("add", {}, "abcdefgh1")]),
        ('[TOOL_CALLS][{"name": "add", "arguments": {}}]', [("add", {}, None)]),
        ('[TOOL_CALLS]add[ARGS]{"a": 1}', [("add", {"a": 1}, None)]),
        (
            '[TOOL_CALLS]add[CALL_ID]abcdefgh1[ARGS]{"a": 1}[TOOL_CALLS]x{}',
            [("add", {"a": 1}, "abcdefgh1"), ("x", {}, None)],
        ),
        ("[TOOL_CALLS]add[ARGS]", []),
        ("[TOOL_CALLS]", []),
    ],
)
def test_mistral_calls(written: str, calls: list[Any]) -> None:
    for name in ("mistral_v11",):
        _, chat = LOADED[name, True]
        parsed = parsed_ids(chat, chat.encoder.encode_control(written))
        assert [(call.name, call.arguments, call.id) for call in parsed.calls] == calls
        assert bool(parsed.invalid) is not bool(calls)


def test_a_marker_that_is_a_token_cannot_be_spelled() -> None:
    """A model that repeats what a tool has printed must not make calls of it."""
    written = '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>'
    for markers in (True, False):
        _, chat = LOADED["qwen", markers]
        parsed = parsed_ids(chat, chat.encoder.encode_text(written))
        assert bool(parsed.calls) is not markers
        assert parsed.text == (written if markers else "")


def test_streamed_text_ends_before_a_call_and_stop_sequences_end_text_only() -> None:
    _, chat = LOADED["qwen", False]

    def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextPieces]:
        pieces = TextPieces(chat.encoder.backend, stop, reader=chat.reader)
        given = []
        for token in chat.encoder.encode_text(text):
            given.append(pieces.add(token))
            if pieces.stopped:
                break
        return [*given, pieces.finish()], pieces

    call = '<tool_call>\n{"name": "add", "arguments": {"s": "STOP"}}\n</tool_call>'
    given, pieces = stream(f"I add.\n{call}", ("STOP",))
    assert "".join(given) == "I add."
    assert given[-1] == ""
    assert pieces.calls == (ToolCall("add", {"s": "STOP"}),)
    given, pieces = stream(f"I STOP here {call}", ("STOP",))
    assert ("".join(given), pieces.calls) == ("I ", ())
    given, _ = stream("a <tool_b and so on")
    assert "".join(given) == "a <tool_b and so on"


def test_json_of_tools_is_what_models_are_shown() -> None:
    tokenizer, chat = family("mistral_v3")
    text = exact(tokenizer, announced(chat, TOOLS, "x"))
    listed = text.split("[AVAILABLE_TOOLS] ")[1].split("[/AVAILABLE_TOOLS][INST]")[0]
    assert json.loads(listed) == [WEATHER.to_json(), ADD.to_json()]
