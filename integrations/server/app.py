"""An OpenAI-compatible server over a runtime: ``infllm-agent serve``, or any ASGI server with ``create_app``.

    app = create_app(AgentRuntime.open("sessions", model="smollm2"))

Chat completions bring the whole history, as everywhere; it goes on in the session that holds the most of it, so that
only what is new goes through the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from infllm_agent.errors import ConfigError

try:
    from fastapi import Depends, FastAPI
    from fastapi.routing import APIRoute
    from fastapi.security import HTTPBearer
except ImportError as error:
    raise ConfigError('the server needs FastAPI: pip install "infllm-agent[server]"') from error

from infllm_agent.config import SamplingConfig
from infllm_agent.integrations.server import errors
from infllm_agent.integrations.server.auth import ApiKeys
from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.integrations.server.middleware.gate import Gate
from infllm_agent.integrations.server.middleware.metrics import Measured, RequestMetrics
from infllm_agent.integrations.server.routers import (
    chat_completions,
    health,
    models,
    responses,
    session_import,
    sessions,
    stored_responses,
)
from infllm_agent.integrations.server.service import Service
from infllm_agent.runtime import AgentRuntime

__all__ = ["create_app"]

ROUTERS = (
    models.router,
    chat_completions.router,
    responses.router,
    stored_responses.router,
    sessions.router,
    session_import.router,
    health.router,
)


def create_app(
    runtime: AgentRuntime,
    config: ServerConfig | None = None,
    keys: ApiKeys | None = None,
    sampling: SamplingConfig | None = None,
    *,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """Make the application; its ``state.service`` is a ``Service``. The runtime stays its owner's to close.

    Args:
        keys: None: everybody who reaches it sees all sessions.
        sampling: how tokens are chosen where a request does not say.
        hosts: names by which requests may call the server; None: any.
    """
    service = Service(runtime, config or ServerConfig(), sampling or SamplingConfig())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="infllm-agent",
        description="Unbounded sessions on a local model, in OpenAI's protocol.",
        version=version("infllm-agent"),
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))],  # for the OpenAPI document; the gate reads the key
    )
    app.state.service = service
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Gate, service.config, keys, None if hosts is None else tuple(hosts))
    if runtime.metrics is not None:
        service.requests = _request_metrics()
        app.add_middleware(Measured, service.requests)
    return app


def _request_metrics() -> RequestMetrics:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return RequestMetrics([(route.path_regex, route.path_format) for route in routes])
