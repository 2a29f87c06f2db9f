"""Tools and schemas in any of the forms that LangChain knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool

from infllm_agent.routing import requests


def form_of(options: dict[str, Any]) -> requests.Form:
    """Read the form that a call's keywords ask for, and take them out of ``options``. Raises ValueError."""
    return requests.form_of(options, openai_tool, json_schema)


def openai_tool(tool: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """Convert a function, LangChain tool, pydantic class, TypedDict or dict to OpenAI's form of a tool.

    Raises:
        ValueError: not a tool.
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


def json_schema(schema: Any) -> dict[str, Any]:
    """Convert a pydantic class, a TypedDict, a function or a JSON schema to a JSON schema.

    Raises:
        ValueError: not a schema.
    """
    try:
        return convert_to_json_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a schema: {schema!r:.200} ({error})") from error
