"""``POST /v1/sessions/ID/import``: a session from an archive, which is read while it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import TimeoutError as NotYet
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from infllm_agent.errors import Cancelled, CorruptSession, SessionExists, StorageError
from infllm_agent.integrations.server.deps import Caller, TheService
from infllm_agent.integrations.server.errors import CLIENT_GONE, ApiError, JsonResponse
from infllm_agent.integrations.server.protocol.requests import ERRORS
from infllm_agent.integrations.server.routers.sessions import fields
from infllm_agent.maintenance.archive import read_archive
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.calls import is_full
from infllm_agent.storage.catalog import SessionInfo

router = APIRouter(prefix="/v1/sessions", responses=ERRORS)

#: Seconds between two looks whether the server stops.
_LOOK_S = 0.5
_BODY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, "required": True}


@router.post("/{session}/import", status_code=201, openapi_extra={"requestBody": _BODY})
async def import_session(session: str, request: Request, service: TheService, caller: Caller) -> Response:
    """Make a session from the body, an exported file: all of it, checked to the last byte, or nothing."""
    loop, body = asyncio.get_running_loop(), request.stream()

    def take(cancelled: Cancellation) -> Iterator[SessionInfo]:
        name = caller.session(service.catalog, session)
        exists = ApiError(409, f"there is a session {session[:140]!r} already", code="session_exists", param="session")
        if service.catalog.find(name) is not None:
            raise exists
        file = _Body(body, loop, service.config.stall_s, cancelled)
        try:
            yield read_archive(service.runtime.root, file, name, progress=service.runtime.tiers.reserve_disk)
        except SessionExists:  # another has made it meanwhile
            raise exists from None
        except CorruptSession as error:
            raise ApiError(400, str(error), code="invalid_archive") from error
        except StorageError as error:
            if error.__cause__ is not None or is_full(error):
                raise
            raise ApiError(400, str(error), code="invalid_archive") from error  # of a newer version

    async with aclosing(service.stream(take, unlimited=True)) as done:
        return JsonResponse(fields(caller, await anext(done)), 201)


class _Body:
    """A request's body as a file, for a thread; of it, one piece is in memory."""

    def __init__(
        self, body: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop, stall_s: float, cancelled: Cancellation
    ) -> None:
        self._body = body
        self._loop = loop
        self._stall_s = stall_s
        self._cancelled = cancelled
        self._piece = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes.

        Raises Cancelled; ApiError if the client leaves, sends nothing for long, or sends too much.
        """
        if not self._piece:
            self._piece = memoryview(self._next())
        data, self._piece = bytes(self._piece[:size]), self._piece[size:]
        return data

    def _next(self) -> bytes:
        waiting = asyncio.run_coroutine_threadsafe(self._arrived(), self._loop)
        while True:
            try:
                return waiting.result(_LOOK_S)
            except NotYet:
                if not self._cancelled():
                    continue
                waiting.cancel()
                raise Cancelled("stopped while an archive was taken in; nothing of it is kept") from None

    async def _arrived(self) -> bytes:
        try:
            async with asyncio.timeout(self._stall_s):
                async for piece in self._body:
                    if piece:
                        return piece
                return b""
        except TimeoutError:
            said = f"nothing more of the archive has come in {self._stall_s:g} s"
            raise ApiError(408, said, code="stalled") from None
        except ClientDisconnect:
            raise ApiError(CLIENT_GONE, "the client has left", code="client_gone") from None
