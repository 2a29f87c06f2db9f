"""What FastAPI hands to the routes: the service, and whose sessions a request may see."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from infllm_agent.integrations.server.auth import Namespace
from infllm_agent.integrations.server.service import Service


def service_of(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def namespace_of(request: Request) -> Namespace:
    return cast(Namespace, request.state.namespace)


TheService = Annotated[Service, Depends(service_of)]
Caller = Annotated[Namespace, Depends(namespace_of)]
