"""infllm-agent: a long-lived agent runtime over the InfLLM context memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infllm_agent.agent.functions import StopAgent, Tool
    from infllm_agent.config import MemoryConfig, RuntimeConfig, SamplingConfig
    from infllm_agent.errors import InfLLMError
    from infllm_agent.platform import logs
    from infllm_agent.platform.signals import exit_on_signals
    from infllm_agent.runtime import AgentRuntime
    from infllm_agent.session.session import Session

__all__ = [
    "AgentRuntime",
    "InfLLMError",
    "MemoryConfig",
    "RuntimeConfig",
    "SamplingConfig",
    "Session",
    "StopAgent",
    "Tool",
    "__version__",
    "exit_on_signals",
    "logs",
]
__version__ = "0.1.0"

_HOME = {
    "AgentRuntime": "runtime",
    "InfLLMError": "errors",
    "MemoryConfig": "config",
    "RuntimeConfig": "config",
    "SamplingConfig": "config",
    "Session": "session.session",
    "StopAgent": "agent.functions",
    "Tool": "agent.functions",
    "exit_on_signals": "platform.signals",
}
_MODULES = {"logs": "platform.logs"}


logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent, until somebody listens (``logs.setup``)


def __getattr__(name: str) -> Any:
    # Loaded when asked for: listing sessions must not wait for torch.
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"infllm_agent.{_MODULES[name]}")
    if name in _HOME:
        return getattr(import_module(f"infllm_agent.{_HOME[name]}"), name)
    raise AttributeError(f"module 'infllm_agent' has no attribute {name!r}")
