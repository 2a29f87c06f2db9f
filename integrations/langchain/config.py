"""The session that a call's config names."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableConfig, ensure_config


def with_session_id(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add the session that the config names to the keywords of a call, unless they name one themselves.

    Inside a node of a graph, or a tool, the config need not be given: LangChain keeps it in a context variable.
    """
    if kwargs.get("session_id") is None:
        configurable = ensure_config(config).get("configurable", {})
        named = configurable.get("session_id") or configurable.get("thread_id")
        if named is not None:
            kwargs = {**kwargs, "session_id": str(named)}
    return kwargs
