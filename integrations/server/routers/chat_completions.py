"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from infllm_agent.integrations.server.auth import Namespace
from infllm_agent.integrations.server.deps import Caller, TheService
from infllm_agent.integrations.server.errors import JsonResponse, bad_request
from infllm_agent.integrations.server.protocol.chat_completions import ChatRequest, Frame, call_fields, usage_fields
from infllm_agent.integrations.server.protocol.messages import history, named
from infllm_agent.integrations.server.protocol.requests import ERRORS, NAMELESS, SessionHeader, seed_of, stops_of
from infllm_agent.integrations.server.service import Service
from infllm_agent.integrations.server.sse import EventStream, event_of
from infllm_agent.messages import Turn
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.calls import answer_events, answer_history
from infllm_agent.routing.events import Events, Finished, Piece, completion_of
from infllm_agent.routing.requests import Request as Call
from infllm_agent.routing.turns import announcing
from infllm_agent.storage.session_store import SessionStore

Answer = Callable[[Cancellation], Events]

router = APIRouter(prefix="/v1", responses=ERRORS)


@router.post("/chat/completions")
async def chat_completions(
    asked: ChatRequest, request: Request, service: TheService, caller: Caller, session: SessionHeader = None
) -> Response:
    """Answer a history, in the session that it continues; with ``append``, the session as it stands."""
    asked.check_model(service)
    frame = Frame(service, caller)
    answer = _answer_to(asked, service, caller, asked.session(session), frame)
    if not asked.stream:
        return JsonResponse(frame.completion(completion_of(await service.gather(request, answer))))
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return await EventStream.begun(request, _events(service, answer, frame, with_usage), service.config.stall_s)


def _answer_to(asked: ChatRequest, service: Service, caller: Namespace, id: str | None, frame: Frame) -> Answer:
    """Make what answers the request, in a thread; what is wrong with the request is raised at once."""
    form, turns = asked.form(), asked.turns()
    most = asked.max_completion_tokens or asked.max_tokens
    sampling = asked.sampling(service, most, stop=stops_of(asked.stop), seed=seed_of(asked.seed))
    if asked.append:
        if id is None:
            raise bad_request("append: to which session? Name it in X-Session-Id or session_id", "session_id")
        return partial(answer_next, service, caller, id, Call(turns, sampling, form, frame.begin), "messages")
    turns = history(turns, form.tools, lambda: service.runtime.chat.default_system, "messages")
    return partial(answer_whole, service, caller, id, Call(turns, sampling, form, frame.begin))


def answer_whole(service: Service, caller: Namespace, id: str | None, call: Call, cancelled: Cancellation) -> Events:
    """Answer a whole history, in the session of the named family, or of all that have no name."""
    id = NAMELESS if id is None else id
    kept = service.config.nameless if id == NAMELESS else service.config.branches
    base = caller.family(service.catalog, id)
    return answer_history(service.runtime, base, call, cancelled, max_branches=kept)


def answer_next(
    service: Service, caller: Namespace, id: str, call: Call, where: str, cancelled: Cancellation
) -> Events:
    """Answer what comes next in a session. ``where`` names the messages to those who sent them."""
    name, turns = caller.session(service.catalog, id), call.turns
    if any(turn.role == "tool" for turn in turns):
        turns = named(turns, where, stored_turns(service, name))
    if call.form.tools and not stored_turns(service, name, 1):
        turns = announcing(turns, call.form.tools, lambda: service.runtime.chat.default_system)
    return answer_events(service.runtime, name, replace(call, turns=turns), cancelled)


def stored_turns(service: Service, name: str, stop: int | None = None) -> list[Turn]:
    """Read what a session holds: nothing yet, if there is no such session."""
    if service.catalog.find(name) is None:
        return []
    with SessionStore.open(service.runtime.root, name, readonly=True) as store:
        return [message.turn for message in store.messages(0, stop)]


async def _events(service: Service, answer: Answer, frame: Frame, with_usage: bool) -> AsyncGenerator[str, None]:
    """Answer in server-sent events."""
    role: dict[str, Any] = {"role": "assistant", "content": ""}
    index = count()
    async with aclosing(service.stream(answer)) as events:
        async for event in events:
            if isinstance(event, Finished):
                yield event_of(frame.piece(role, event.finish_reason or "stop"))
                if with_usage:
                    yield event_of(frame.head("chat.completion.chunk") | {"choices": [], "usage": usage_fields(event)})
                continue
            if isinstance(event, Piece):
                if not event.text:
                    continue
                delta: dict[str, Any] = {"content": event.text}
            else:
                delta = {"tool_calls": [{"index": next(index), **call_fields(event.call)}]}
            yield event_of(frame.piece(role | delta))
            role = {}
    yield "data: [DONE]\n\n"
