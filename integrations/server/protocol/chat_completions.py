"""The words of ``/v1/chat/completions``: what is asked, and how it is answered."""

from __future__ import annotations

import time
import uuid
from typing import Any

from pydantic import Field

from infllm_agent.integrations.server.auth import Namespace
from infllm_agent.integrations.server.errors import bad_request
from infllm_agent.integrations.server.protocol.messages import (
    ChatMessage,
    FunctionTool,
    Labelled,
    NamedChoice,
    ResponseFormat,
    ToolChoice,
    form,
)
from infllm_agent.integrations.server.protocol.requests import AnswerRequest
from infllm_agent.integrations.server.service import Service
from infllm_agent.messages import Turn
from infllm_agent.routing.events import Completion, Finished
from infllm_agent.routing.requests import Form
from infllm_agent.session.session import Session
from infllm_agent.tools import ToolCall, dumps

#: Parameters that would change the answer, and are not served.
_NOT_SERVED = ("frequency_penalty", "presence_penalty", "logprobs", "top_logprobs", "logit_bias")


class StreamOptions(Labelled):
    include_usage: bool | None = False


class ChatRequest(AnswerRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    append: bool = Field(
        False, description="not OpenAI's: the messages are what comes next in the session, not all of its history"
    )
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    stream_options: StreamOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    response_format: ResponseFormat | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def turns(self) -> list[Turn]:
        return [message.turn(f"messages[{number}]") for number, message in enumerate(self.messages)]

    def form(self) -> Form:
        if self.n not in (None, 1):
            raise bad_request(f"n = {self.n}: a request gets one answer; send it again for another", "n")
        for name in _NOT_SERVED:
            if getattr(self, name):
                raise bad_request(f"{name} is not served: leave it out", name, "unsupported_parameter")
        if self.modalities not in (None, ["text"]):
            raise bad_request("modalities: the model writes text only", "modalities", "unsupported_parameter")
        choice = self.tool_choice
        return form(
            [tool.model_dump(exclude_none=True) for tool in self.tools or ()],
            choice.model_dump() if isinstance(choice, NamedChoice) else choice,
            self.parallel_tool_calls,
            self.response_format.plain() if self.response_format else None,
        )


class Frame:
    """Makes the JSON of one answer, whole or in pieces."""

    def __init__(self, service: Service, caller: Namespace) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = service.model
        self._caller = caller
        self._session = ""

    def begin(self, session: Session) -> None:
        self._session = self._caller.own(session.name)

    def head(self, kind: str) -> dict[str, Any]:
        """Begin an object. ``session_id`` is not OpenAI's."""
        made = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return made | {"session_id": self._session}

    def piece(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self.head("chat.completion.chunk") | {"choices": [choice]}

    def completion(self, answer: Completion) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            said["tool_calls"] = [call_fields(call) for call in answer.calls]
            said["content"] = answer.text or None
        finish = answer.finished.finish_reason or "stop"
        choice = {"index": 0, "message": said, "finish_reason": finish, "logprobs": None}
        return self.head("chat.completion") | {"choices": [choice], "usage": usage_fields(answer.finished)}


def call_fields(call: ToolCall) -> dict[str, Any]:
    """Write a call of a tool."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dumps(call.arguments)}}


def usage_fields(finished: Finished) -> dict[str, Any]:
    """Write an answer's tokens; ``prompt_tokens`` without ``cached_tokens`` went through the model for it."""
    usage = finished.usage
    assert usage is not None
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
    }
