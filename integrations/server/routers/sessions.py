"""``/v1/sessions``: what is stored; forks, exports, events, and the output of tools as it comes."""

from __future__ import annotations

import asyncio
import codecs
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from infllm_agent.errors import Cancelled
from infllm_agent.integrations.server.auth import Namespace
from infllm_agent.integrations.server.deps import Caller, TheService
from infllm_agent.integrations.server.errors import JsonResponse
from infllm_agent.integrations.server.protocol.messages import Asked
from infllm_agent.integrations.server.protocol.requests import ERRORS
from infllm_agent.integrations.server.service import Service
from infllm_agent.maintenance.archive import write_archive
from infllm_agent.messages import Message
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.session_pool import all_or_nothing
from infllm_agent.session.session import Session
from infllm_agent.storage.catalog import SessionInfo, check_name
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.tools import check_name as check_label

_PIECE = 1 << 16

router = APIRouter(prefix="/v1/sessions", responses=ERRORS)

EventRole = Literal["system", "user", "assistant", "tool", "observation"]


class Event(Asked):
    role: EventRole
    text: str
    name: str | None = Field(None, description="of the tool, or the source of the observation")
    call_id: str | None = Field(None, max_length=256)


class Events(Asked):
    events: list[Event] = Field(min_length=1, max_length=1000)


class Fork(Asked):
    name: str
    messages: int | None = Field(None, ge=0, lt=1 << 31, description="take over the first so many; None: all")


@router.get("")
async def list_sessions(
    request: Request,
    service: TheService,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(description="only names behind this one")] = "",
) -> Response:
    """Sessions by name, as of their last commits."""
    infos = await service.do(request, lambda _: caller.sessions(service.catalog))
    found = [info for info in infos if caller.own(info.name) > after]
    data = [fields(caller, info) for info in found[:limit]]
    return JsonResponse({"object": "list", "data": data, "has_more": len(found) > limit})


@router.get("/{session}")
async def show_session(
    session: str,
    request: Request,
    service: TheService,
    caller: Caller,
    last: Annotated[int, Query(ge=0, le=1000, description="how many of the latest messages to show")] = 5,
) -> Response:
    def show(_: Cancellation) -> dict[str, Any]:
        with _stored(service, caller, session) as store:
            return fields(caller, store.info) | {"recent": [message_fields(m) for m in store.messages(-last)[:last]]}

    return JsonResponse(await service.do(request, show))


@router.get("/{session}/messages")
async def list_messages(
    session: str,
    request: Request,
    service: TheService,
    caller: Caller,
    start: Annotated[int, Query(ge=0, lt=1 << 31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """The history, word for word."""

    def read(_: Cancellation) -> dict[str, Any]:
        with _stored(service, caller, session) as store:
            found = [message_fields(message) for message in store.messages(start, start + limit)]
            return {"object": "list", "data": found, "has_more": start + limit < store.message_count}

    return JsonResponse(await service.do(request, read))


@router.get("/{session}/search")
async def search_session(
    session: str,
    q: Annotated[str, Query(min_length=1, max_length=1000)],
    request: Request,
    service: TheService,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Response:
    """Messages that have all the words, newest first."""

    def find(_: Cancellation) -> dict[str, Any]:
        with _stored(service, caller, session) as store:
            return {"object": "list", "data": [message_fields(message) for message in store.search(q, limit)]}

    return JsonResponse(await service.do(request, find))


@router.post("/{session}/fork", status_code=201)
async def fork_session(session: str, asked: Fork, request: Request, service: TheService, caller: Caller) -> Response:
    """A session that begins as this one; nothing is read again."""
    name = check_name(caller.prefix + asked.name)

    def fork(cancelled: Cancellation) -> SessionInfo:
        source = caller.existing(service.catalog, session)
        with service.pool.by_name(source, cancelled, make=False):
            made = service.runtime.fork(source, name, asked.messages, cancelled=cancelled)
            info = made.store.info
            service.runtime.release(name)
            return info

    return JsonResponse(fields(caller, await service.do(request, fork)), 201)


@router.get("/{session}/export", response_class=StreamingResponse)
async def export_session(session: str, request: Request, service: TheService, caller: Caller) -> Response:
    """The whole session as one file, which ``infllm-agent sessions import`` makes a session of again."""
    pieces = service.stream(lambda cancelled: _exported(service, caller.existing(service.catalog, session), cancelled))
    first = await anext(pieces)

    async def body() -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return StreamingResponse(body(), media_type="application/x-tar")


@router.delete("/{session}")
async def delete_session(session: str, request: Request, service: TheService, caller: Caller) -> Response:
    """Delete a session and its branches, once the calls that use them are done."""

    def delete(cancelled: Cancellation) -> list[str]:
        name = caller.existing(service.catalog, session)
        deleted = service.pool.delete(name, cancelled)
        service.responses.sweep(service.session_ids)
        return deleted

    gone = [caller.own(name) for name in await service.do(request, delete)]
    return JsonResponse({"object": "session.deleted", "deleted": gone})


@router.post("/{session}/events", status_code=201)
async def append_events(session: str, asked: Events, request: Request, service: TheService, caller: Caller) -> Response:
    """Append to a session, which is made if there is none. What is acknowledged is on disk; the model reads it soon."""
    for event in asked.events:
        if event.name is not None:
            check_label(event.name)

    def append(cancelled: Cancellation) -> dict[str, Any]:
        name = caller.session(service.catalog, session)
        with service.pool.by_name(name, cancelled) as opened:
            with _unread(opened), all_or_nothing(opened, cancelled):
                for event in asked.events:
                    opened.append(event.role, event.text, name=event.name, call_id=event.call_id)
            return _extent(caller, opened)

    return JsonResponse(await service.do(request, append), 201)


@router.post("/{session}/stream", status_code=201)
async def stream_in(
    session: str,
    request: Request,
    service: TheService,
    caller: Caller,
    role: Annotated[Literal["tool", "observation", "user"], Query()] = "tool",
    name: Annotated[str | None, Query(description="of the tool, or the source of the observation")] = None,
    call_id: Annotated[str | None, Query(max_length=256)] = None,
) -> Response:
    """Make the body, UTF-8 text that may take hours to come, one message, which is read while it comes.

    It is taken as fast as the model reads. If the client leaves in the middle, the message ends with what had come.
    """
    if name is not None:
        check_label(name)
    loop, body = asyncio.get_running_loop(), request.stream()

    def pieces() -> Iterator[bytes]:
        while piece := asyncio.run_coroutine_threadsafe(_next(body), loop).result():
            yield piece

    def take(cancelled: Cancellation) -> Iterator[dict[str, Any]]:
        full = caller.session(service.catalog, session)
        with service.pool.by_name(full, cancelled) as opened, opened.cancelled_by(cancelled):
            with opened.stream(role, name=name, call_id=call_id) as stream:
                for text in _decoded(pieces()):
                    stream.write(text)
                    if opened.is_due:
                        opened.commit()
            opened.commit()
            yield _extent(caller, opened)

    async with aclosing(service.stream(take, unlimited=True)) as done:
        return JsonResponse(await anext(done), 201)


async def _next(body: AsyncIterator[bytes]) -> bytes:
    """The next piece that is not empty; an empty one at the end, or where the client has left."""
    try:
        async for piece in body:
            if piece:
                return piece
    except ClientDisconnect:
        pass
    return b""


@contextmanager
def _unread(session: Session) -> Iterator[None]:
    """What is appended meanwhile waits for the model."""
    eager, session.eager = session.eager, False
    try:
        yield
    finally:
        session.eager = eager


def _decoded(pieces: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", True)


def _exported(service: Service, name: str, cancelled: Cancellation) -> Iterator[bytes]:
    """A session's archive, piece by piece."""
    if service.runtime.is_open(name):
        with service.pool.by_name(name, cancelled, make=False) as opened:
            opened.commit()
    failure: list[BaseException] = []
    reader, writer = os.pipe()

    def write() -> None:
        try:
            with open(writer, "wb") as file:
                write_archive(service.runtime.root, name, file)
        except BrokenPipeError:
            pass  # nobody wants the rest
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=write, name="infllm-export")
    thread.start()
    try:
        with open(reader, "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                if cancelled():
                    raise Cancelled(f'session "{name}": stopped while it was exported')
                yield piece
    finally:
        thread.join()
    if failure:
        raise failure[0]


@contextmanager
def _stored(service: Service, caller: Namespace, session: str) -> Iterator[SessionStore]:
    with SessionStore.open(service.runtime.root, caller.existing(service.catalog, session), readonly=True) as store:
        yield store


def fields(caller: Namespace, info: SessionInfo) -> dict[str, Any]:
    """A session; times are unix seconds."""
    return {
        "id": caller.own(info.name),
        "object": "session",
        "messages": info.messages,
        "tokens": info.tokens,
        "blocks": info.blocks,
        "bytes": info.bytes,
        "created": info.created,
        "updated": info.updated,
        "model": info.model,
    }


def message_fields(message: Message) -> dict[str, Any]:
    calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in message.calls]
    return {
        "message": message.index,
        "role": message.role,
        "name": message.name,
        "time": message.time,
        "text": message.text,
        "call_id": message.call_id,
        "calls": calls,
    }


def _extent(caller: Namespace, session: Session) -> dict[str, Any]:
    return {
        "id": caller.own(session.name),
        "object": "session.extent",
        "messages": session.message_count,
        "tokens": session.token_count,
    }
