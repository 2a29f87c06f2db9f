"""Tools and calls of tools, as plain data, and the JSON in which they are stored.

Everything in them comes from outside: names, descriptions, arguments. What form a model has for them, ``toolformat``
knows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infllm_agent.errors import ConfigError, InvalidName

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_name(name: str, what: str = "name") -> str:
    """The name itself, if it may stand in a label or name a tool; else InvalidName."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidName(
            f"{what} {name!r} is not allowed: at most 64 letters, digits, '_', '.', '-', the first a letter or digit"
        )
    return name


@dataclass(frozen=True)
class ToolSpec:
    """A tool that the model may call.

    ``parameters`` is the JSON schema of its arguments, which are an object; empty means that it takes none.

    Raises InvalidName for a name outside the alphabet of ``check_name``, ConfigError for parameters that are no schema
    of an object, or no JSON.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name, "tool name")
        if not isinstance(self.description, str):
            raise ConfigError(f'tool "{self.name}": its description is {type(self.description).__name__}, not a text')
        if not isinstance(self.parameters, dict) or self.parameters.get("type", "object") != "object":
            raise ConfigError(
                f'tool "{self.name}": its parameters must be the JSON schema of an object, '
                f"not {_shown(self.parameters)}"
            )
        parameters = {"type": "object", "properties": {}, **self.parameters}
        try:
            plain = plain_json(parameters)
        except ValueError as error:
            raise ConfigError(f'tool "{self.name}": its parameters are no JSON: {error}') from None
        object.__setattr__(self, "parameters", plain)
        object.__setattr__(self, "description", _SURROGATE.sub("\ufffd", self.description))

    def to_json(self) -> dict[str, Any]:
        """The form that chat templates and most interfaces expect."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> ToolSpec:
        """From ``to_json``'s form, or from what stands under its ``function``. Raises InvalidName, ConfigError."""
        function = given.get("function", given)
        if not isinstance(function, Mapping) or "name" not in function:
            raise ConfigError(f"a tool needs a name, and may have description and parameters; got {_shown(given)}")
        return cls(function["name"], function.get("description") or "", function.get("parameters") or {})


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, as a model made it; ``id`` names it to the result that answers it.

    Raises ConfigError for arguments that are no JSON object.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.arguments, dict):
            raise ConfigError(f'call of "{self.name}": its arguments are {_shown(self.arguments)}, not an object')
        try:
            object.__setattr__(self, "arguments", plain_json(self.arguments))
        except ValueError as error:
            raise ConfigError(f'call of "{self.name}": its arguments are no JSON: {error}') from None
        object.__setattr__(self, "name", _SURROGATE.sub("\ufffd", self.name))


@dataclass(frozen=True)
class InvalidCall:
    """What a model wrote as a call and is none: the text, word for word, and the reason."""

    text: str
    reason: str


def calls_json(calls: Iterable[ToolCall]) -> str:
    """Calls as canonical JSON: equal texts for equal calls."""
    return dumps([{"name": call.name, "arguments": call.arguments, "id": call.id} for call in calls])


def calls_from_json(text: str) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(call["name"], call["arguments"], call["id"]) for call in json.loads(text))


def tools_json(tools: Iterable[ToolSpec]) -> str:
    """Tools as canonical JSON. Keys stay in their order, in which the model reads them."""
    return dumps([tool.to_json()["function"] for tool in tools])


def tools_from_json(text: str) -> tuple[ToolSpec, ...]:
    return tuple(ToolSpec.from_json(tool) for tool in json.loads(text))


def dumps(value: Any) -> str:
    """JSON as chat templates write it: on one line, any character as itself."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def loads(text: str) -> Any:
    """As ``json.loads``, but everything in it can be written again. Raises ValueError."""
    return _DECODER.decode(text)


def load_first(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, and where it ends. Raises ValueError."""
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deep") from None


def plain_json(value: Any) -> Any:
    """A copy in JSON's own types, with no lone surrogate in any text. Raises ValueError for what is no JSON."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no JSON number")
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"the keys of {_shown(value)} are not all texts")
        return {_SURROGATE.sub("\ufffd", key): plain_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(part) for part in value]
    raise ValueError(f"{_shown(value)} of type {type(value).__name__}")


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_no_number)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
