"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from infllm_agent.integrations.server.deps import TheService
from infllm_agent.integrations.server.protocol.requests import ERRORS, check_model
from infllm_agent.integrations.server.service import Service

router = APIRouter(prefix="/v1", responses=ERRORS)


@router.get("/models")
async def list_models(service: TheService) -> dict[str, Any]:
    """List the model that is served."""
    return {"object": "list", "data": [_model(service)]}


@router.get("/models/{model:path}")
async def show_model(model: str, service: TheService) -> dict[str, Any]:
    """Show the model that is served."""
    check_model(service, model)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": service.started, "owned_by": "infllm-agent"}
