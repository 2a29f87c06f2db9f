"""``/v1/responses``: a conversation whose history the server keeps.

A response's id names a session and how many messages it had, so what continues it is found as any history is: it goes
on in that session, or in a fork of it where the session has gone on by itself. ``stored_responses`` shows responses
again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from functools import partial
from itertools import count
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from infllm_agent.integrations.server.auth import Namespace
from infllm_agent.integrations.server.deps import Caller, TheService
from infllm_agent.integrations.server.errors import JsonResponse, bad_request
from infllm_agent.integrations.server.protocol.messages import history, named
from infllm_agent.integrations.server.protocol.requests import ERRORS, SessionHeader
from infllm_agent.integrations.server.protocol.responses import (
    ResponseRequest,
    call_item,
    message_item,
    text_part,
    usage_fields,
)
from infllm_agent.integrations.server.response_store import Key
from infllm_agent.integrations.server.routers.chat_completions import Answer, answer_next, answer_whole, stored_turns
from infllm_agent.integrations.server.routers.stored_responses import kept_response
from infllm_agent.integrations.server.service import Service
from infllm_agent.integrations.server.sse import EventStream, event_of
from infllm_agent.messages import Turn
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.events import Completion, Event, Events, Finished, Piece, completion_of
from infllm_agent.routing.families import branch_base
from infllm_agent.routing.requests import Request as Call
from infllm_agent.session.session import Session
from infllm_agent.tools import ToolCall, dumps

router = APIRouter(prefix="/v1", responses=ERRORS)


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

    def answer(cancelled: Cancellation) -> Events:
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
    """Find the session of an earlier response, and the history up to it.

    Raises:
        ApiError: there is no such response, or it is another's.
    """
    info, key, _ = kept_response(service, caller, response, "previous_response_id")
    return branch_base(caller.own(info.name)), stored_turns(service, info.name, key.messages)


async def _events(service: Service, answer: Answer, record: _Record) -> AsyncGenerator[str, None]:
    """Answer in server-sent events."""
    numbers = count()

    def event(kind: str, **fields: Any) -> str:
        return event_of({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    parts = list[Event]()
    text: dict[str, Any] = {}
    async with aclosing(service.stream(answer)) as given:
        async for part in given:
            if not parts:
                yield event("response.created", response=record.response("in_progress"))
                yield event("response.in_progress", response=record.response("in_progress"))
            parts.append(part)
            if not isinstance(part, Piece) or not part.text:
                continue
            if not text:
                text = {"item_id": f"msg_{record.key}", "output_index": 0, "content_index": 0}
                item = message_item(record.key, "", "in_progress") | {"content": []}
                yield event("response.output_item.added", output_index=0, item=item)
                yield event("response.content_part.added", **text, part=text_part(""))
            yield event("response.output_text.delta", **text, delta=part.text, logprobs=[])
    whole = completion_of(parts)
    if text:
        yield event("response.output_text.done", **text, text=whole.text, logprobs=[])
        yield event("response.content_part.done", **text, part=text_part(whole.text))
        yield event("response.output_item.done", output_index=0, item=message_item(record.key, whole.text))
    for index, call in enumerate(record.call_items(whole.calls), int(bool(text))):
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
        """Note the session, and how many messages it will have with the answer."""
        self.key = Key(session.store.id, session.message_count + 1)

    def keeping(self, answer: Answer) -> Answer:
        """Keep what an answer comes to: once it is committed, and before anybody is told, ``done`` has the response,
        which is stored if that is wanted."""

        def kept(cancelled: Cancellation) -> Events:
            parts = list[Event]()
            with closing(answer(cancelled)) as events:
                for event in events:
                    parts.append(event)
                    if isinstance(event, Finished):
                        self.done = self._completed(completion_of(parts))
                        if self.done["store"]:
                            self._service.keep(self.key, self.done)
                    yield event

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

    def _completed(self, answer: Completion) -> dict[str, Any]:
        cut = answer.finished.finish_reason == "length"
        text = [message_item(self.key, answer.text)] if answer.text else []
        return self.response(
            "incomplete" if cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            output=[*text, *self.call_items(answer.calls)],
            usage=usage_fields(answer.finished),
        )

    def call_items(self, calls: tuple[ToolCall, ...]) -> list[dict[str, Any]]:
        return [
            call_item(self.key, number, call.id, call.name, dumps(call.arguments)) for number, call in enumerate(calls)
        ]
