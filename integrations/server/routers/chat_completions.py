"""``/v1/models`` and ``/v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any, cast

from fastapi import APIRouter, Request
from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk
from pydantic import Field
from starlette.responses import Response

from infllm_agent.integrations.server.auth import Namespace
from infllm_agent.integrations.server.errors import JsonResponse, bad_request
from infllm_agent.integrations.server.protocol.messages import (
    ChatMessage,
    FunctionTool,
    Labelled,
    NamedChoice,
    ResponseFormat,
    ToolChoice,
    form,
    history,
    named,
    stored_turn,
)
from infllm_agent.integrations.server.protocol.requests import (
    ERRORS,
    NAMELESS,
    AnswerRequest,
    SessionHeader,
    check_model,
    seed_of,
    stops_of,
)
from infllm_agent.integrations.server.service import (
    Caller,
    EventStream,
    Service,
    TheService,
    event_of,
)
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.calls import answer_events, answer_history
from infllm_agent.routing.requests import Form
from infllm_agent.routing.requests import Request as Call
from infllm_agent.routing.turns import Turn, announcing
from infllm_agent.session.session import Session
from infllm_agent.storage.session_store import SessionStore

Chunks = Iterator[ChatGenerationChunk]
Answer = Callable[[Cancellation], Chunks]

router = APIRouter(prefix="/v1", responses=ERRORS)

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


@router.get("/models")
async def list_models(service: TheService) -> dict[str, Any]:
    """The model that is served."""
    return {"object": "list", "data": [_model(service)]}


@router.get("/models/{model:path}")
async def show_model(model: str, service: TheService) -> dict[str, Any]:
    check_model(service, model)
    return _model(service)


@router.post("/chat/completions")
async def chat_completions(
    asked: ChatRequest, request: Request, service: TheService, caller: Caller, session: SessionHeader = None
) -> Response:
    """Answer a history, in the session that it continues; with ``append``, the session as it stands."""
    asked.check_model(service)
    frame = _Frame(service, caller)
    answer = _answer_to(asked, service, caller, asked.session(session), frame)
    if not asked.stream:
        return JsonResponse(frame.completion(message_of(await service.gather(request, answer))))
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return await EventStream.begun(request, _events(service, answer, frame, with_usage), service.config.stall_s)


def _answer_to(asked: ChatRequest, service: Service, caller: Namespace, id: str | None, frame: _Frame) -> Answer:
    """What answers the request, in a thread. What is wrong with it is told before."""
    form, turns = asked.form(), asked.turns()
    most = asked.max_completion_tokens or asked.max_tokens
    sampling = asked.sampling(service, most, stop=stops_of(asked.stop), seed=seed_of(asked.seed))
    if asked.append:
        if id is None:
            raise bad_request("append: to which session? Name it in X-Session-Id or session_id", "session_id")
        return partial(answer_next, service, caller, id, Call(turns, sampling, form, frame.begin), "messages")
    turns = history(turns, form.tools, lambda: service.runtime.chat.default_system, "messages")
    return partial(answer_whole, service, caller, id, Call(turns, sampling, form, frame.begin))


def answer_whole(service: Service, caller: Namespace, id: str | None, call: Call, cancelled: Cancellation) -> Chunks:
    """The answer to a whole history, in the session of the named family, or of all that have no name."""
    id = NAMELESS if id is None else id
    kept = service.config.nameless if id == NAMELESS else service.config.branches
    base = caller.family(service.catalog, id)
    return answer_history(service.runtime, base, call, cancelled, max_branches=kept)


def answer_next(
    service: Service, caller: Namespace, id: str, call: Call, where: str, cancelled: Cancellation
) -> Chunks:
    """The answer to what comes next in a session. ``where`` names the messages to those who sent them."""
    name, turns = caller.session(service.catalog, id), call.turns
    if any(turn.role == "tool" for turn in turns):
        turns = named(turns, where, stored_turns(service, name))
    if call.form.tools and not stored_turns(service, name, 1):
        turns = announcing(turns, call.form.tools, lambda: service.runtime.chat.default_system)
    return answer_events(service.runtime, name, replace(call, turns=turns), cancelled)


def stored_turns(service: Service, name: str, stop: int | None = None) -> list[Turn]:
    """What a session holds. None yet if there is no such session."""
    if service.catalog.find(name) is None:
        return []
    with SessionStore.open(service.runtime.root, name, readonly=True) as store:
        return [stored_turn(message) for message in store.messages(0, stop)]


def message_of(chunks: Sequence[ChatGenerationChunk]) -> AIMessageChunk:
    return cast(AIMessageChunk, reduce(add, chunks).message)


async def _events(service: Service, answer: Answer, frame: _Frame, with_usage: bool) -> AsyncGenerator[str, None]:
    """The answer as server-sent events."""
    role: dict[str, Any] = {"role": "assistant", "content": ""}
    async with aclosing(service.stream(answer)) as chunks:
        async for chunk in chunks:
            message = cast(AIMessageChunk, chunk.message)
            if message.text:
                yield event_of(frame.piece({**role, "content": message.text}))
                role = {}
            for call in message.tool_call_chunks:
                function = {"name": call["name"], "arguments": call["args"]}
                # LangChain's indices count the text as 0.
                said = {"index": (call["index"] or 1) - 1, "id": call["id"], "type": "function", "function": function}
                yield event_of(frame.piece({**role, "tool_calls": [said]}))
                role = {}
            if message.chunk_position == "last":
                finish = message.response_metadata.get("finish_reason", "stop")
                yield event_of(frame.piece(role, finish))
                if with_usage:
                    yield event_of(frame.head("chat.completion.chunk") | {"choices": [], "usage": usage_of(message)})
    yield "data: [DONE]\n\n"


class _Frame:
    """What all pieces of one answer have in common."""

    def __init__(self, service: Service, caller: Namespace) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = service.model
        self._caller = caller
        self._session = ""

    def begin(self, session: Session) -> None:
        self._session = self._caller.own(session.name)

    def head(self, kind: str) -> dict[str, Any]:
        """``session_id`` is not OpenAI's."""
        made = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return made | {"session_id": self._session}

    def piece(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self.head("chat.completion.chunk") | {"choices": [choice]}

    def completion(self, message: AIMessageChunk) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": message.text, "refusal": None}
        if message.tool_call_chunks:
            said["tool_calls"] = [
                {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
                for call in message.tool_call_chunks
            ]
            said["content"] = message.text or None
        finish = message.response_metadata.get("finish_reason", "stop")
        choice = {"index": 0, "message": said, "finish_reason": finish, "logprobs": None}
        return self.head("chat.completion") | {"choices": [choice], "usage": usage_of(message)}


def usage_of(message: AIMessageChunk) -> dict[str, Any]:
    """Tokens; those that went through the model for this answer are ``prompt_tokens`` without ``cached_tokens``."""
    usage = message.usage_metadata
    assert usage is not None
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["input_token_details"]["cache_read"]},
    }


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": service.started, "owned_by": "infllm-agent"}
