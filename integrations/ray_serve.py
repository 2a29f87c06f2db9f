"""Many replicas of the server, on one machine or many, through Ray Serve.

    serve.run(application(ReplicaSettings(root="/shared/sessions", model="smollm2"), replicas=2))

Each replica has a model of its own and all share one folder of sessions, so any of them can serve any session. Requests
with the same ``X-Session-Id`` go to the same replica, by consistent hashing, as long as it is there and takes more;
others go anywhere. A session is written by one replica at a time, which holds its lock: one that another replica asks
for is given to it as soon as no call uses it (``handover``). A call is acknowledged when it is on disk, so a replica
that is lost takes with it what it had not acknowledged, and no more: the kernel drops its locks, and the next request
finds the session on another.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from infllm_agent.errors import ConfigError

try:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig
except ImportError as error:
    raise ConfigError('replicas need Ray Serve: pip install "infllm-agent[ray]"') from error
import torch
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infllm_agent.config import MemoryConfig, RuntimeConfig, SamplingConfig
from infllm_agent.integrations.server import create_app
from infllm_agent.integrations.server.auth import ApiKeys
from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.model.local_model import LocalModel
from infllm_agent.platform.signals import exit_on_signals
from infllm_agent.runtime import AgentRuntime

#: Sends requests of a session to one replica; when that is full, to the next on the ring.
ROUTER = RequestRouterConfig(request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter")


@dataclass(frozen=True)
class ReplicaSettings:
    """The settings of each replica.

    Attributes:
        root: the folder of sessions, on a file system that all replicas share and that has locks (``flock``).
        memory: fields of ``MemoryConfig`` that differ from the model's default.
        bucket: the URL of an object store (``Bucket``) where every commit is published, for replicas on machines that
            share no file system; ``root`` is then a folder of each machine.
        config: limits of each replica: rates and calls are counted by each for itself.
    """

    root: str
    model: str = "smollm2"
    memory: dict[str, Any] = field(default_factory=dict)
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(metrics=True, trace="off"))
    config: ServerConfig = field(default_factory=ServerConfig)
    keys: ApiKeys | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    hosts: tuple[str, ...] | None = None
    device: str = "auto"
    dtype: str = "auto"
    bucket: str | None = None


class Replica:
    """One replica: the application of ``server.create_app``, and a header that says who answered."""

    def __init__(self, settings: ReplicaSettings) -> None:
        model = LocalModel.load(settings.model, device=settings.device, dtype=settings.dtype)
        memory: MemoryConfig | None = model.default_memory().changed(**settings.memory) if settings.memory else None
        runtime = AgentRuntime(settings.root, model, memory, settings.runtime, settings.bucket)
        shared = ServerConfig(**{**settings.config.model_dump(), "shared": True})
        self._app = create_app(runtime, shared, settings.keys, settings.sampling, hosts=settings.hosts)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        self._app.add_middleware(Signed)
        return self._app


class Signed:
    """ASGI middleware: ``X-Replica`` names the host and process that answered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._name = f"{socket.gethostname()}:{os.getpid()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def signing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-replica", self._name)]}
            await send(message)

        await self.app(scope, receive, signing)


def application(
    settings: ReplicaSettings,
    *,
    replicas: int = 2,
    autoscaling: dict[str, Any] | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    **options: Any,
) -> Any:
    """Make a ``ray.serve.Application`` of the server.

    Args:
        replicas: how many, unless ``autoscaling`` says so.
        autoscaling: fields of ``ray.serve.config.AutoscalingConfig``: ``min_replicas``, ``max_replicas``,
            ``target_ongoing_requests``, ...
        cpus, gpus: of each replica; a model on a GPU wants one.
        options: more of ``serve.deployment``'s, such as ``health_check_period_s``.
    """
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="infllm-agent",
        num_replicas=replicas if autoscaling is None else None,
        autoscaling_config=autoscaling,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=settings.config.concurrent,
        graceful_shutdown_timeout_s=settings.config.grace_s + 10,
        request_router_config=ROUTER,
        **{"health_check_period_s": 2.0, "health_check_timeout_s": 20.0, **options},
    )
    return deployment.bind(settings)


def serve_replicas(settings: ReplicaSettings, replicas: int, host: str, port: int) -> None:
    """Run a cluster on this machine, or as part of the one that Ray finds here, until SIGINT or SIGTERM."""
    gpus = 1.0 if settings.device != "cpu" and torch.cuda.is_available() else 0.0
    cpus = 1.0 if gpus else (os.cpu_count() or 1) / replicas
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application(settings, replicas=replicas, cpus=cpus, gpus=gpus))
        print(f"serving {replicas} replicas at http://{host}:{port}/v1", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt), exit_on_signals():
            threading.Event().wait()
    finally:
        serve.shutdown()
        ray.shutdown()
