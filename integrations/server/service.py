"""What the routes of a server share: the runtime, and how blocking work is done for a request."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from fastapi import Request

from infllm_agent.config import SamplingConfig
from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.integrations.server.disconnect import unless_gone
from infllm_agent.integrations.server.errors import ApiError
from infllm_agent.integrations.server.middleware.metrics import RequestMetrics
from infllm_agent.integrations.server.response_store import KeptResponses, Key
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.platform.threads import from_thread
from infllm_agent.routing.calls import time_limit
from infllm_agent.routing.handover import Handover
from infllm_agent.routing.session_pool import pool_of
from infllm_agent.runtime import AgentRuntime
from infllm_agent.storage.catalog import Catalog

T = TypeVar("T")


class Service:
    """One runtime, served.

    Attributes:
        defaults: how tokens are chosen where a request does not say.
        model: what the model is called by those who ask for it.
    """

    def __init__(self, runtime: AgentRuntime, config: ServerConfig, defaults: SamplingConfig) -> None:
        self.runtime = runtime
        self.config = config
        self.defaults = defaults
        self.pool = pool_of(runtime)
        name = runtime.model.name
        self.model = config.served_name or (os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name)
        self.started = int(time.time())
        self.running = 0
        self.requests: RequestMetrics | None = None
        self._stopping = Cancellation()
        self.handover = Handover(runtime.root, config.timeout_s) if config.shared else None
        if self.handover is not None:
            self.pool.share(self.handover)
        self.responses = KeptResponses(runtime.root)
        self.responses.sweep(self.session_ids)

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.runtime.root)

    def session_ids(self) -> set[str]:
        return {info.id for info in self.catalog.list()}

    def keep(self, key: Key, response: dict[str, Any]) -> None:
        """Have a response on disk. Raises StorageError."""
        self.responses.keep(key, response, self.session_ids)

    @property
    def stopping(self) -> bool:
        return self._stopping()

    def stop(self) -> None:
        """End what is under way at the next chunk or token; it is taken back. May be called more than once."""
        self._stopping.cancel()

    def close(self) -> None:
        """``stop``, and commit and close the sessions, once what is under way has ended."""
        self.stop()
        if self.handover is not None:
            self.handover.close()
        self.pool.close(Cancellation())

    async def stream(
        self, produce: Callable[[Cancellation], Iterator[T]], *, unlimited: bool = False
    ) -> AsyncGenerator[T, None]:
        """What ``produce`` yields in a thread of its own, until somebody closes this, or ``stop``.

        Args:
            unlimited: it may take longer than ``timeout_s``.
        """
        seconds = None if unlimited else self.config.timeout_s
        with self._place():

            def stoppable(left: Cancellation) -> Iterator[T]:
                with time_limit(seconds, Cancellation(left, self._stopping)) as cancelled:
                    yield from produce(cancelled)

            async with aclosing(from_thread(stoppable)) as items:
                async for item in items:
                    yield item

    async def gather(self, request: Request, produce: Callable[[Cancellation], Iterator[T]]) -> list[T]:
        """All that ``produce`` yields; it is told to stop if the client leaves."""

        async def all_of_it() -> list[T]:
            async with aclosing(self.stream(produce)) as items:
                return [item async for item in items]

        return await unless_gone(request, all_of_it())

    async def do(self, request: Request, act: Callable[[Cancellation], T]) -> T:
        """The result of ``act``, in a thread of its own."""
        (result,) = await self.gather(request, lambda cancelled: iter([act(cancelled)]))
        return result

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        if self.running >= self.config.concurrent:
            raise ApiError(503, f"{self.running} calls are under way; try again", code="overloaded")
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
