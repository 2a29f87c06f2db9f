"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Send

from infllm_agent.integrations.server.disconnect import unless_gone
from infllm_agent.integrations.server.errors import body_of, error_of


def event_of(data: Any, name: str | None = None) -> str:
    """Write one event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, allow_nan=False)}\n\n"


class EventStream(StreamingResponse):
    """A response of events. A client that does not read is left after ``stall_s`` seconds.

    An error before the first event is raised, so that it gets a status of its own; a later one is the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], stall_s: float) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._stall_s = stall_s

    @classmethod
    async def begun(cls, request: Request, events: AsyncGenerator[str, None], stall_s: float) -> EventStream:
        async def begin() -> str:
            try:
                return await anext(events)
            except BaseException:
                await events.aclose()
                raise

        first = await unless_gone(request, begin())

        async def all_events() -> AsyncGenerator[str, None]:
            async with aclosing(events):
                yield first
                try:
                    async for event in events:
                        yield event
                except Exception as error:
                    yield event_of(body_of(error_of(error)))

        return cls(all_events(), stall_s)

    async def stream_response(self, send: Send) -> None:
        async def in_time(message: Any) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        async with aclosing(self._events) as events:
            try:
                await in_time({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for event in events:
                    await in_time({"type": "http.response.body", "body": event.encode(), "more_body": True})
                await in_time({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:
                pass  # the server closes a connection whose response is not complete
