"""What a call asks for, in plain dicts: without LangChain, routing reads OpenAI's and Anthropic's."""

from __future__ import annotations

from typing import Any

import pytest

from infllm_agent.routing.requests import form_of

PARAMETERS = {"type": "object", "properties": {"host": {"type": "string"}}, "required": ["host"]}
FUNCTION = {"name": "look", "description": "Look at a host.", "parameters": PARAMETERS}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": FUNCTION},
        FUNCTION,
        {"name": "look", "description": "Look at a host.", "input_schema": PARAMETERS},
    ],
)
def test_tools_of_each_provider(tool):
    options = {"tools": [tool], "tool_choice": "required", "temperature": 0.5}
    form = form_of(options)
    assert [(spec.name, spec.description, spec.parameters) for spec in form.tools] == [
        ("look", "Look at a host.", PARAMETERS)
    ]
    assert (form.tool_choice, form.parallel_calls) == ("any", False)
    assert options == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        (7, "not a tool: 7"),
        ({}, "not a tool: {}"),
        ({"input_schema": PARAMETERS}, "not a tool: "),
        ({"type": "web_search_preview"}, "not a tool that can be called here: .* its provider's own"),
        ({"type": "function", "name": "look"}, "not a tool that can be called here"),
        ({"name": "a b"}, "not allowed"),
        ({"name": "look", "parameters": 3}, "look"),
    ],
)
def test_what_is_not_a_tool(tool, said):
    with pytest.raises(ValueError, match=said):
        form_of({"tools": [tool]})


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}, PARAMETERS),
        (PARAMETERS, PARAMETERS),
    ],
)
def test_formats(response_format: Any, schema: Any):
    assert form_of({"response_format": response_format}).schema == schema


def test_what_is_not_a_format():
    with pytest.raises(ValueError, match="not a schema: 'thing'"):
        form_of({"response_format": "thing"})
    with pytest.raises(ValueError, match="without a schema"):
        form_of({"response_format": {"type": "json_schema"}})


def test_conversions_are_handed_in():
    form = form_of(
        {"tools": [len], "response_format": int},
        tool_of=lambda tool: {"type": "function", "function": {"name": tool.__name__}},
        schema_of=lambda kind: {"type": {int: "integer"}[kind]},
    )
    assert [tool.name for tool in form.tools] == ["len"]
    assert form.schema == {"type": "integer"}
