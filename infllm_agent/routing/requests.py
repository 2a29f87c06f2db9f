"""What a call asks for, in the forms that LangChain's users and frameworks write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool

from infllm_agent.config import SamplingConfig
from infllm_agent.routing.turns import Turn
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
        begins: told of the session, with all that the call brings in it, before the answer begins.
    """

    turns: Sequence[Turn]
    sampling: SamplingConfig
    form: Form = Form()
    begins: Callable[[Session], None] = lambda session: None


def form_of(options: dict[str, Any]) -> Form:
    """The form that a call's keywords ask for; takes them out of ``options``.

    Raises:
        ValueError: a tool, a choice or a format that is none.
    """
    given = {name: options.pop(name, None) for name in FORM_ARGUMENTS}
    tools = tuple(ToolSpec.from_json(openai_tool(tool)) for tool in given["tools"] or ())
    choice = tool_choice(given["tool_choice"], [tool.name for tool in tools]) or "auto"
    parallel = given["parallel_tool_calls"]
    if parallel is None:
        # A model that is made to call says nothing about how often, and a small one would go on and on.
        parallel = choice in ("auto", "none")
    return Form(tools, choice, bool(parallel), _schema(given["response_format"]))


def openai_tool(tool: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """Any of the forms in which LangChain knows tools, as OpenAI's.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(tool, Mapping) and "parameters" not in tool and "input_schema" in tool:  # Anthropic's
        tool = {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}
    try:
        converted = convert_to_openai_tool(tool, strict=strict)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a tool: {tool!r:.200} ({error})") from error
    if "function" not in converted:
        raise ValueError(f"not a tool that can be called here: {tool!r:.200} (it is its provider's own)")
    return converted


def tool_choice(choice: Any, names: Sequence[str]) -> str | None:
    """A choice of tools in any provider's words, in ours: ``auto``, ``none``, ``any``, a name; None: not said.

    Raises:
        ValueError: it is none, or names a tool that is not there.
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


def json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of a pydantic class, a TypedDict, a function or a schema.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return convert_to_json_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a schema: {schema!r:.200} ({error})") from error


def _schema(response_format: Any) -> dict[str, Any] | None:
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        return json_schema(response_format)
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
    return json_schema(dict(response_format))
