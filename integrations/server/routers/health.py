"""``/healthz`` and ``/metrics``, for those who keep the server running."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from infllm_agent.integrations.server.deps import TheService
from infllm_agent.integrations.server.errors import ApiError
from infllm_agent.integrations.server.protocol.requests import ERRORS

router = APIRouter(responses=ERRORS)


@router.get("/healthz")
async def healthz(service: TheService) -> dict[str, Any]:
    """Tell whether the server takes requests."""
    if service.stopping:
        raise ApiError(503, "the server is stopping", code="stopping")
    return {"status": "ok", "model": service.model, "calls": service.running}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: TheService) -> Response:
    """Count what all sessions do, and what requests there are, in Prometheus' text format."""
    found = service.runtime.metrics
    if found is None:
        raise ApiError(
            404, "there are no metrics: the runtime counts nothing (RuntimeConfig.metrics)", code="no_metrics"
        )
    requests = "" if service.requests is None else service.requests.text()
    return Response(found.text() + requests, media_type=found.content_type)
