"""A real server for tests: uvicorn in a thread, on a port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from infllm_agent.config import MemoryConfig, RuntimeConfig
from infllm_agent.integrations.server import create_app
from infllm_agent.integrations.server.service import Service
from infllm_agent.model.local_model import LocalModel
from infllm_agent.runtime import AgentRuntime

#: So small that most of a short history is in blocks.
MEMORY = MemoryConfig(
    n_init=4, n_local=64, block_size=4, topk=4, candidates=8, chunk_size=16, question_chunk=4, max_cached_block=8
)


class Served:
    """A server that runs. ``url`` is its root."""

    def __init__(self, runtime: AgentRuntime, service: Service, listening: Any) -> None:
        self.runtime = runtime
        self.service = service
        self.socket = listening
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.v1 = f"{self.url}/v1"
        self.model = service.model


@contextmanager
def serving(root: Path, model: LocalModel, memory: MemoryConfig | None = MEMORY, **app: Any) -> Iterator[Served]:
    """Serve a folder of sessions; ``app`` as for ``create_app``."""
    with AgentRuntime(root, model, memory, RuntimeConfig(metrics=True, trace="off")) as runtime:
        application = create_app(runtime, **app)
        server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Served(runtime, application.state.service, server.servers[0].sockets[0])
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
