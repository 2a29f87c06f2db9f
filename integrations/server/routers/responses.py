"""``/v1/responses``: a conversation whose history the server keeps.

A response's id names a session and how many messages it had, so what continues it is found as any history is: it goes
on in that session, or in a fork of it where the session has gone on by itself. ``server_recall`` shows responses again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from functools import partial
from itertools import count
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Request
from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from infllm_agent.integrations.server.auth import Namespace
from infllm_agent.integrations.server.errors import JsonResponse, bad_request
from infllm_agent.integrations.server.protocol.messages import (
    Content,
    Function,
    Labelled,
    call_of,
    form,
    history,
    named,
    text_of,
)
from infllm_agent.integrations.server.protocol.requests import ERRORS, AnswerRequest, SessionHeader
from infllm_agent.integrations.server.response_store import Key
from infllm_agent.integrations.server.routers.chat_completions import (
    Answer,
    Chunks,
    answer_next,
    answer_whole,
    message_of,
    stored_turns,
)
from infllm_agent.integrations.server.routers.stored_responses import call_item, kept_response, message_item, text_part
from infllm_agent.integrations.server.service import Caller, EventStream, Service, TheService, event_of
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.families import branch_base
from infllm_agent.routing.requests import Form
from infllm_agent.routing.requests import Request as Call
from infllm_agent.routing.turns import Turn
from infllm_agent.session.session import Session

router = APIRouter(prefix="/v1", responses=ERRORS)


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
        """The input. Calls that follow each other, or a text of the assistant's, are one message."""
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


@router.post("/responses")
async def create_response(
    asked: ResponseRequest, request: Request, service: TheService, caller: Caller, session: SessionHeader = None
) -> Response:
    """Answer what comes next: after a response, in a conversation (which is a session), or at the beginning."""
    asked.check_model(service)
    record = _Record(asked, service)
    answer = record.keeping(_answer_to(asked, service, caller, asked.session(session), record))
    if not asked.stream:
        await service.gather(request, answer)
        return JsonResponse(record.done)
    return await EventStream.begun(request, _events(service, answer, record), service.config.stall_s)


def _answer_to(asked: ResponseRequest, service: Service, caller: Namespace, id: str | None, record: _Record) -> Answer:
    form, new = asked.form(), asked.turns()
    sampling = asked.sampling(service, asked.max_output_tokens)
    conversation = asked.conversation_id
    if conversation and asked.previous_response_id:
        raise bad_request("conversation and previous_response_id: give one of them", "conversation")
    if conversation:
        if asked.instructions is not None:
            new = [Turn("system", asked.instructions), *new]
        return partial(answer_next, service, caller, conversation, Call(new, sampling, form, record.begin), "input")

    def answer(cancelled: Cancellation) -> Chunks:
        family, before = id, list[Turn]()
        if asked.previous_response_id is not None:
            family, before = _found(service, caller, asked.previous_response_id)
        if asked.instructions is not None:
            before = [Turn("system", asked.instructions), *before[bool(before and before[0].role == "system") :]]
        turns = [*before, *named(new, "input", before)]
        if form.tools or asked.instructions is not None:
            turns = history(turns, form.tools, lambda: service.runtime.chat.default_system, "input")
        return answer_whole(service, caller, family, Call(turns, sampling, form, record.begin), cancelled)

    return answer


def _found(service: Service, caller: Namespace, response: str) -> tuple[str, list[Turn]]:
    """The session of an earlier response, and the history up to it.

    Raises:
        ApiError: there is no such response, or it is another's.
    """
    info, key, _ = kept_response(service, caller, response, "previous_response_id")
    return branch_base(caller.own(info.name)), stored_turns(service, info.name, key.messages)


async def _events(service: Service, answer: Answer, record: _Record) -> AsyncGenerator[str, None]:
    """The response as server-sent events."""
    numbers = count()

    def event(kind: str, **fields: Any) -> str:
        return event_of({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    parts = list[ChatGenerationChunk]()
    text: dict[str, Any] = {}
    async with aclosing(service.stream(answer)) as chunks:
        async for chunk in chunks:
            if not parts:
                yield event("response.created", response=record.response("in_progress"))
                yield event("response.in_progress", response=record.response("in_progress"))
            parts.append(chunk)
            if not chunk.text:
                continue
            if not text:
                text = {"item_id": f"msg_{record.key}", "output_index": 0, "content_index": 0}
                item = message_item(record.key, "", "in_progress") | {"content": []}
                yield event("response.output_item.added", output_index=0, item=item)
                yield event("response.content_part.added", **text, part=text_part(""))
            yield event("response.output_text.delta", **text, delta=chunk.text, logprobs=[])
    whole = message_of(parts)
    if text:
        yield event("response.output_text.done", **text, text=whole.text, logprobs=[])
        yield event("response.content_part.done", **text, part=text_part(whole.text))
        yield event("response.output_item.done", output_index=0, item=message_item(record.key, whole.text))
    for index, call in enumerate(record.calls(whole), int(bool(text))):
        where = {"item_id": call["id"], "output_index": index}
        item = call | {"arguments": "", "status": "in_progress"}
        yield event("response.output_item.added", output_index=index, item=item)
        yield event("response.function_call_arguments.delta", **where, delta=call["arguments"])
        yield event("response.function_call_arguments.done", **where, arguments=call["arguments"], name=call["name"])
        yield event("response.output_item.done", output_index=index, item=call)
    yield event(f"response.{record.done['status']}", response=record.done)


class _Record:
    """The response to one request, in its states."""

    def __init__(self, asked: ResponseRequest, service: Service) -> None:
        self._asked = asked
        self._service = service
        self._created = int(time.time())
        self.key = Key("", 0)
        self.done: dict[str, Any] = {}

    def begin(self, session: Session) -> None:
        """The session is known, and how many messages it will have with the answer."""
        self.key = Key(session.store.id, session.message_count + 1)

    def keeping(self, answer: Answer) -> Answer:
        """The same answer. Once it is committed, and before anybody is told, ``done`` has the response, which is kept
        if that is wanted."""

        def kept(cancelled: Cancellation) -> Chunks:
            parts = list[ChatGenerationChunk]()
            with closing(cast(Generator[ChatGenerationChunk], answer(cancelled))) as chunks:
                for chunk in chunks:
                    parts.append(chunk)
                    if cast(AIMessageChunk, chunk.message).chunk_position == "last":
                        self.done = self._completed(message_of(parts))
                        if self.done["store"]:
                            self._service.keep(self.key, self.done)
                    yield chunk

        return kept

    def response(self, status: str, **fields: Any) -> dict[str, Any]:
        asked = self._asked
        as_asked = asked.model_dump(include={"text", "tool_choice", "tools"}, exclude_none=True, by_alias=True)
        return {
            "id": f"resp_{self.key}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "conversation": {"id": asked.conversation_id} if asked.conversation_id else None,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._service.model,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            **as_asked,
            **fields,
        }

    def _completed(self, message: AIMessageChunk) -> dict[str, Any]:
        cut = message.response_metadata.get("finish_reason") == "length"
        text = [message_item(self.key, message.text)] if message.text else []
        return self.response(
            "incomplete" if cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            output=[*text, *self.calls(message)],
            usage=_usage(message),
        )

    def calls(self, message: AIMessageChunk) -> list[dict[str, Any]]:
        return [
            call_item(self.key, number, call["id"], call["name"], call["args"])
            for number, call in enumerate(message.tool_call_chunks)
        ]


def _usage(message: AIMessageChunk) -> dict[str, Any]:
    usage = message.usage_metadata
    assert usage is not None
    return {
        "input_tokens": usage["input_tokens"],
        "input_tokens_details": {"cached_tokens": usage["input_token_details"]["cache_read"]},
        "output_tokens": usage["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
