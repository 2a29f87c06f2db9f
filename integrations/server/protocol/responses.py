"""The words of ``/v1/responses``: what is asked, and the items of which histories and answers are made."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from infllm_agent.integrations.server.errors import bad_request
from infllm_agent.integrations.server.protocol.messages import Content, Function, Labelled, call_of, form, text_of
from infllm_agent.integrations.server.protocol.requests import AnswerRequest
from infllm_agent.integrations.server.response_store import Key
from infllm_agent.messages import Message, Turn
from infllm_agent.routing.events import Finished
from infllm_agent.routing.requests import Form


class MessageItem(Labelled):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def turn(self, where: str) -> Turn:
        role = "system" if self.role == "developer" else self.role
        return Turn(role, text_of(self.content, f"{where}.content"))


class CallItem(Labelled):
    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(max_length=64)
    arguments: str


class ResultItem(Labelled):
    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: Content

    def turn(self, where: str) -> Turn:
        return Turn("tool", text_of(self.output, f"{where}.output"), None, self.call_id)


class ReasoningItem(Labelled):
    type: Literal["reasoning"]


def _kind(item: Any) -> str:
    return str(item.get("type") or "message") if isinstance(item, dict) else str(getattr(item, "type", ""))


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class ResponseTool(Function):
    type: Literal["function"]


class ResponseChoice(Labelled):
    type: Literal["function"]
    name: str


class TextFormat(Labelled):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Labelled):
    format: TextFormat | None = None


class ConversationId(Labelled):
    id: str = Field(min_length=1, max_length=256)


class ResponseRequest(AnswerRequest):
    input: str | list[Item] = Field(min_length=1)
    instructions: str | None = Field(None, description="a system message; None keeps that of the history")
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = Field(None, description="a session: the input is what comes next in it")
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseChoice | None = None
    text: TextOptions | None = None
    # These change no answer here: nothing is truncated, and nothing is thought.
    background: Literal[False] | None = None
    include: list[str] | None = None
    max_tool_calls: int | None = None
    reasoning: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None
    top_logprobs: Literal[0] | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation

    def turns(self) -> list[Turn]:
        """Convert the input. Calls that follow each other, or a text of the assistant's, become one message."""
        if isinstance(self.input, str):
            return [Turn("user", self.input)]
        turns: list[Turn] = []
        for number, item in enumerate(self.input):
            where = f"input[{number}]"
            if isinstance(item, CallItem):
                call = call_of(item.name, item.arguments, item.call_id, where)
                if turns and turns[-1].role == "assistant":
                    turns[-1] = turns[-1]._replace(calls=(*turns[-1].calls, call))
                else:
                    turns.append(Turn("assistant", "", calls=(call,)))
            elif not isinstance(item, ReasoningItem):
                turns.append(item.turn(where))
        if not turns:
            raise bad_request("input: there is nothing in it to answer", "input")
        return turns

    def form(self) -> Form:
        choice = self.tool_choice
        wanted = self.text.format if self.text else None
        response_format = None
        if wanted is not None and wanted.type == "json_schema":
            if wanted.schema_ is None:
                raise bad_request("text.format.schema is missing", "text.format.schema")
            response_format = {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}
        elif wanted is not None:
            response_format = {"type": wanted.type}
        tools = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in self.tools or ()]
        return form(
            [{"type": "function", "function": tool} for tool in tools],
            {"type": "function", "function": {"name": choice.name}} if isinstance(choice, ResponseChoice) else choice,
            self.parallel_tool_calls,
            response_format,
        )


def input_items(session: str, message: Message) -> list[dict[str, Any]]:
    """Write a stored message in the words of OpenAI's responses. Those of an answer have the ids that it gave them."""
    key = Key(session, message.index + 1)
    if message.role == "tool":
        call_id, text = message.call_id or "", message.text
        return [{"id": f"fco_{key}", "type": "function_call_output", "call_id": call_id, "output": text}]
    calls = [call_item(key, n, c.id, c.name, json.dumps(c.arguments)) for n, c in enumerate(message.calls)]
    if message.role == "assistant":
        return [*([message_item(key, message.text)] if message.text or not calls else []), *calls]
    content = [{"type": "input_text", "text": message.text}]
    item = {"id": f"msg_{key}", "type": "message", "role": message.role, "status": "completed"}
    return [item | {"content": content}]


def message_item(key: Key, text: str, status: str = "completed") -> dict[str, Any]:
    """Write what the assistant said."""
    said = {"id": f"msg_{key}", "type": "message", "role": "assistant", "status": status}
    return said | {"content": [text_part(text)]}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(key: Key, number: int, id: str | None, name: str | None, arguments: str | None) -> dict[str, Any]:
    """Write a call of the assistant's; ``arguments`` are JSON."""
    item = {"id": f"fc_{key}_{number}", "type": "function_call", "call_id": id, "name": name}
    return item | {"arguments": arguments, "status": "completed"}


def usage_fields(finished: Finished) -> dict[str, Any]:
    """Write an answer's tokens."""
    usage = finished.usage
    assert usage is not None
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.reused_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
