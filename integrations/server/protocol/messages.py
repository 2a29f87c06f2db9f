"""Messages, tools and formats in the words of OpenAI's clients, and how they become turns of a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from infllm_agent.errors import InfLLMError
from infllm_agent.integrations.server.errors import bad_request
from infllm_agent.messages import Turn
from infllm_agent.routing.requests import Form, form_of
from infllm_agent.routing.turns import announcing
from infllm_agent.tools import ToolCall, ToolSpec, loads

_TEXT = ("text", "input_text", "output_text", "refusal")


class Asked(BaseModel):
    """Base of what a request has: unknown fields are refused, for they would have no effect."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Labelled(BaseModel):
    """Base of what a history has: clients send back what they were sent, with fields of many makers."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Part(Labelled):
    type: str
    text: str | None = None
    refusal: str | None = None


Content = str | list[Part] | None


class FunctionCall(Labelled):
    name: str = Field(max_length=64)
    arguments: str = Field(description="a JSON object")


class Call(Labelled):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Labelled):
    """A message of a history. ``observation`` is a role of this server's: what was seen, rather than said."""

    role: Literal["system", "developer", "user", "assistant", "tool", "observation"]
    content: Content = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def turn(self, where: str) -> Turn:
        """Convert it to what a session stores. Raises ApiError for what a text model cannot read."""
        text = text_of(self.content, f"{where}.content")
        if self.role == "assistant":
            calls = tuple(
                call_of(call.function.name, call.function.arguments, call.id, f"{where}.tool_calls[{number}]")
                for number, call in enumerate(self.tool_calls or ())
            )
            return Turn("assistant", text, calls=calls)
        if self.content is None:
            raise bad_request(f"{where}.content: a message of the {self.role} needs a text", f"{where}.content")
        if self.role == "tool":
            if self.tool_call_id is None:
                raise bad_request(f"{where}.tool_call_id: which call does the result answer?", f"{where}.tool_call_id")
            return Turn("tool", text, self.name, self.tool_call_id)
        if self.role == "observation":
            return Turn("observation", text, self.name)
        return Turn("user" if self.role == "user" else "system", text)


class Function(Labelled):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Labelled):
    type: Literal["function"]
    function: Function


class NamedFunction(Labelled):
    name: str


class NamedChoice(Labelled):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class SchemaFormat(Labelled):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Labelled):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    def plain(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        if self.json_schema is None:
            raise bad_request("response_format.json_schema is missing", "response_format.json_schema")
        return {"type": "json_schema", "json_schema": {"schema": self.json_schema.schema_}}


def text_of(content: Content, where: str) -> str:
    """Read the text of a message's content. Raises ApiError for content that is not text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in _TEXT or text is None:
            raise bad_request(
                f"{where}[{number}] is of type {part.type[:40]!r}: the model reads text only",
                f"{where}[{number}]",
                "unsupported_content",
            )
        texts.append(text)
    return "".join(texts)


def call_of(name: str, arguments: str, id: str, where: str) -> ToolCall:
    """Read a call of a history. Raises ApiError for arguments that are not a JSON object."""
    try:
        return ToolCall(name, loads(arguments or "{}"), id)
    except (ValueError, RecursionError) as error:  # ConfigError is one
        raise bad_request(f"{where}: the arguments of the call are not a JSON object: {error}", where) from None


def form(
    tools: Sequence[dict[str, Any]] | None, choice: Any, parallel: bool | None, response_format: dict[str, Any] | None
) -> Form:
    """Read what an answer may be, in OpenAI's words. Raises ApiError."""
    asked = {
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "response_format": response_format,
    }
    try:
        return form_of(asked)
    except InfLLMError:
        raise
    except ValueError as error:
        raise bad_request(str(error)) from error


def history(
    turns: Sequence[Turn], tools: Sequence[ToolSpec], default_system: Callable[[], str], where: str
) -> list[Turn]:
    """Complete a whole history: name the tools of results, and have its first message announce the tools."""
    return announcing(named(turns, where), tools, default_system)


def named(turns: Sequence[Turn], where: str, before: Sequence[Turn] = ()) -> list[Turn]:
    """Add the tools' names to results.

    Args:
        before: the history that they continue.

    Raises:
        ApiError: a result that no call asked for.
    """
    asked = {call.id: call.name for turn in before for call in turn.calls}
    found = []
    for number, turn in enumerate(turns):
        if turn.role == "tool" and turn.call_id is not None:
            if turn.call_id not in asked:
                raise bad_request(
                    f"{where}[{number}] is the result of a call {turn.call_id[:100]!r} that no message before it made; "
                    "keep the message with the call, or leave out the result",
                    f"{where}[{number}]",
                )
            turn = turn._replace(name=turn.name or asked[turn.call_id])
        asked |= {call.id: call.name for call in turn.calls}
        found.append(turn)
    return found
