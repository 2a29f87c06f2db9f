"""An OpenAI-compatible server over a runtime: ``infllm-agent serve``, or any ASGI server with ``create_app``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infllm_agent.integrations.server.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    if name == "create_app":  # loaded when asked for: its settings must not wait for FastAPI
        from infllm_agent.integrations.server.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
