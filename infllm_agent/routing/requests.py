"""What a call asks for, in the words that model providers have for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infllm_agent.config import SamplingConfig
from infllm_agent.messages import Turn
from infllm_agent.session.session import Session
from infllm_agent.tools import ToolSpec

#: Keywords of a call that say which tools there are and what form the answer has.
FORM_ARGUMENTS = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "strict")


@dataclass(frozen=True)
class Form:
    """What an answer may be: free text, calls of tools, or JSON.

    Attributes:
        tools: those that the history announces.
        tool_choice: ``auto``, ``none``, ``any``, or the name of a tool.
        schema: the JSON schema that the answer's text must satisfy.
    """

    tools: tuple[ToolSpec, ...] = ()
    tool_choice: str = "auto"
    parallel_calls: bool = True
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """One call of a chat model.

    Attributes:
        begins: called with the session before the answer begins, when it holds all that the call brings.
    """

    turns: Sequence[Turn]
    sampling: SamplingConfig
    form: Form = Form()
    begins: Callable[[Session], None] = lambda session: None


def openai_tool(tool: Any) -> dict[str, Any]:
    """Convert a tool that is a dict in OpenAI's or Anthropic's form to OpenAI's.

    Raises:
        ValueError: not a tool in either form.
    """
    if isinstance(tool, Mapping):
        if "function" in tool:
            return dict(tool)
        if "name" in tool and tool.get("type") != "function":
            parameters = tool.get("parameters", tool.get("input_schema", {}))
            function = {"name": tool["name"], "description": tool.get("description", ""), "parameters": parameters}
            return {"type": "function", "function": function}
        if "type" in tool:
            raise ValueError(f"not a tool that can be called here: {tool!r:.200} (it is its provider's own)")
    raise ValueError(f"not a tool: {tool!r:.200} (give a dict in OpenAI's or Anthropic's form)")


def json_schema(schema: Any) -> dict[str, Any]:
    """Take a JSON schema. Raises ValueError for anything else."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"not a schema: {schema!r:.200} (give a JSON schema)")
    return dict(schema)


def form_of(
    options: dict[str, Any],
    tool_of: Callable[[Any], dict[str, Any]] = openai_tool,
    schema_of: Callable[[Any], dict[str, Any]] = json_schema,
) -> Form:
    """Read the form that a call's keywords ask for, and take them out of ``options``.

    Args:
        tool_of: converts whatever callers give as a tool to OpenAI's form.
        schema_of: converts whatever they give as a schema to a JSON schema.

    Raises:
        ValueError: an invalid tool, choice or format.
    """
    given = {name: options.pop(name, None) for name in FORM_ARGUMENTS}
    tools = tuple(ToolSpec.from_json(tool_of(tool)) for tool in given["tools"] or ())
    choice = tool_choice(given["tool_choice"], [tool.name for tool in tools]) or "auto"
    parallel = given["parallel_tool_calls"]
    if parallel is None:
        # A model that is made to call says nothing about how often, and a small one would go on and on.
        parallel = choice in ("auto", "none")
    return Form(tools, choice, bool(parallel), _schema(given["response_format"], schema_of))


def tool_choice(choice: Any, names: Sequence[str]) -> str | None:
    """Translate a choice of tools from any provider's words to ``auto``, ``none``, ``any`` or a name; None: not said.

    Raises:
        ValueError: an invalid choice, or the name of a tool that is not there.
    """
    if isinstance(choice, Mapping):
        kind = choice.get("type")
        choice = choice.get("function", choice).get("name") if kind in ("function", "tool") else kind
    if choice is None:
        return None
    if isinstance(choice, bool):
        choice = "any" if choice else "none"
    choice = {"required": "any"}.get(choice, choice)
    if choice in ("auto", "none", "any"):
        if choice == "any" and not names:
            raise ValueError('tool_choice "any" needs tools to choose from')
        return str(choice)
    if choice not in names:
        raise ValueError(f"tool_choice {choice!r} is neither auto, none, any nor one of the tools: {', '.join(names)}")
    return str(choice)


def _schema(response_format: Any, schema_of: Callable[[Any], dict[str, Any]]) -> dict[str, Any] | None:
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        return schema_of(response_format)
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return dict(response_format.get("schema", {"type": "object"}))
    if kind == "json_schema":
        described = response_format.get("json_schema", response_format)
        if not isinstance(described, Mapping) or not isinstance(described.get("schema"), Mapping):
            raise ValueError(f"response_format of type json_schema without a schema: {dict(response_format)!r:.200}")
        return dict(described["schema"])
    return schema_of(dict(response_format))
