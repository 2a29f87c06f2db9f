"""JSON schemas as grammars: what is asked of them, and which part of one is at fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from infllm_agent.errors import UnsupportedSchema
from infllm_agent.tools import plain_json

#: Exactly as ``json.dumps`` writes: white space is no place where a model could go on for ever.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_UNKNOWN_FORMAT = re.compile(r"Unknown format: (\S+)")
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
#: A schema with one of these may have its properties described elsewhere.
_COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties", "unevaluatedProperties")


def grammar_of(schema: Any, what: str, error_of: Callable[[str], str]) -> str:
    """Write the schema as an expression of a Lark grammar.

    Args:
        what: what the schema belongs to, for errors.
        error_of: says what is wrong with a whole grammar; "" if nothing is.

    Raises UnsupportedSchema, naming the part of the schema that is at fault.
    """
    if not isinstance(schema, dict):
        raise UnsupportedSchema(f"{what} is no JSON schema: it must be an object, not {type(schema).__name__}")
    try:
        closed = _closed(plain_json(schema))
    except (ValueError, RecursionError) as trouble:
        raise UnsupportedSchema(f"{what} is no JSON: {trouble}") from None
    error = error_of(f"start: {_expression(closed)}")
    while unknown := _UNKNOWN_FORMAT.search(error):  # a format that nobody knows asks for nothing
        closed = _without_format(closed, unknown[1])
        error = error_of(f"start: {_expression(closed)}")
    if error:
        path, reason = _at_fault(closed, closed, error, error_of)
        place = f' at "{path}"' if path else ""
        raise UnsupportedSchema(f"{what} cannot be followed{place}: {_reason(reason)}")
    return _expression(closed)


def _expression(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _STYLE})


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Forbid properties other than those that the schema names, where it leaves that open.

    What it allows is allowed by the original too; but a small model, free to add properties, adds them without end.
    """
    if any("allOf" in part for _, part in _walk(schema, "")):
        return schema  # its parts describe the same object, each another side of it

    def close(part: dict[str, Any]) -> dict[str, Any]:
        part = {key: _mapped(key, value, close) for key, value in part.items()}
        if "properties" in part and not any(key in part for key in _COMPOSED):
            part["additionalProperties"] = False
        return part

    return close(schema)


def _without_format(schema: dict[str, Any], format: str) -> dict[str, Any]:
    return {
        key: _mapped(key, value, lambda part: _without_format(part, format))
        for key, value in schema.items()
        if (key, value) != ("format", format)
    }


def _mapped(key: str, value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
        return {name: change(part) if isinstance(part, dict) else part for name, part in value.items()}
    if key in _LISTS_OF_SCHEMAS and isinstance(value, list):
        return [change(part) if isinstance(part, dict) else part for part in value]
    if key in _SCHEMAS and isinstance(value, dict):
        return change(value)
    return value


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas inside a schema, one level down, by their path from it."""
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            yield from ((f"{key}/{name}", part) for name, part in value.items() if isinstance(part, dict))
        elif key in _LISTS_OF_SCHEMAS and isinstance(value, list):
            yield from ((f"{key}/{number}", part) for number, part in enumerate(value) if isinstance(part, dict))
        elif key in _SCHEMAS and isinstance(value, dict):
            yield key, value


def _walk(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, part in _parts(schema):
        yield from _walk(part, f"{path}/{name}")


def _at_fault(
    schema: dict[str, Any], root: dict[str, Any], error: str, error_of: Callable[[str], str], path: str = ""
) -> tuple[str, str]:
    """Find the innermost part that is at fault by itself, and why."""
    shared: dict[str, Any] = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for name, part in _parts(schema):
        if found := error_of(f"start: {_expression({**shared, **part})}"):
            return _at_fault(part, root, found, error_of, f"{path}/{name}" if path else name)
    return path, error


def _reason(error: str) -> str:
    """Take the library's message without its picture of the grammar."""
    text = error.split("failed to compile JSON schema: ")[-1]
    lines = re.split(r"\n\s+\d+ \| ", text)[0].splitlines()
    return " ".join(line.strip() for line in lines if line.strip(" ^"))
