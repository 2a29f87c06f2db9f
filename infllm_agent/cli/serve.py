"""``infllm-agent serve``: an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infllm_agent.cli import output
from infllm_agent.cli.options import BucketUrl, Memory, RuntimeOptions, Sampling, Server, Tracing
from infllm_agent.cli.options import takes_options as options
from infllm_agent.config import MemoryConfig, SamplingConfig
from infllm_agent.errors import ConfigError
from infllm_agent.integrations.server.config import ServerConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

#: Next tokens of so many sessions share a forward: more tokens a second of all, each a little later.
DEFAULT_BATCH = 4
#: A server has more users than a program that uses a runtime by itself.
DEFAULT_KEPT_OPEN = 16


@options
def serve(
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="API keys: a namespace and a key on each line, * for all sessions.",
            show_default="$INFLLM_API_KEYS: NAMESPACE=KEY,...; else no key is asked for",
        ),
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Listen beyond this machine, though no key is asked for.")
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1, help="Run so many replicas under Ray Serve, each with a model.", show_default="none, no Ray"
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Most sessions whose next tokens are computed together.")
    ] = DEFAULT_BATCH,
    kept_open: Annotated[
        int,
        typer.Option(
            min=0, help="Sessions that stay open when no call uses them, each with its window and cached blocks."
        ),
    ] = DEFAULT_KEPT_OPEN,
    bucket: BucketUrl | None = None,
    trace: Tracing = "off",
    *,
    where: RuntimeOptions,
    memory: Memory,
    sampling: Sampling,
    server: Server,
) -> None:
    """Serve sessions in OpenAI's HTTP protocol; Ctrl-C or SIGTERM ends it in order."""
    config, defaults = ServerConfig(**server), SamplingConfig(**sampling)
    from infllm_agent.integrations.server.auth import VARIABLE, ApiKeys  # mistakes are told before the model is loaded

    known = ApiKeys.load(keys.expanduser() if keys else None)
    if known is None and not is_loopback(host) and not open_to_all:
        raise typer.BadParameter(
            f"whoever reaches {host} could read and delete all sessions: give --keys FILE, ${VARIABLE}, "
            "or --open-to-all",
            param_hint="--host",
        )
    allowed = where.allowed(trace=trace, metrics=True, batch=batch, kept_open=kept_open)
    from infllm_agent.integrations.server import create_app
    from infllm_agent.integrations.server.middleware.gate import LOOPBACK

    hosts = LOOPBACK if known is None and is_loopback(host) else None
    if replicas is not None:
        from infllm_agent.integrations.ray_serve import ReplicaSettings, serve_replicas

        settings = ReplicaSettings(
            os.path.abspath(where.root),
            where.model,
            memory,
            allowed,
            config,
            known,
            defaults,
            hosts,
            where.device,
            where.dtype,
            bucket,
        )
        serve_replicas(settings, replicas, host, port)
        return
    from infllm_agent.maintenance.bucket import Bucket
    from infllm_agent.model.local_model import LocalModel
    from infllm_agent.runtime import AgentRuntime

    published = Bucket(bucket) if bucket else None  # a mistake is told before the model is loaded

    with listening(host, port) as bound:
        model = LocalModel.load(where.model, device=where.device, dtype=where.dtype, progress=output.note)
        sizes: MemoryConfig | None = model.default_memory().changed(**memory) if memory else None
        with AgentRuntime(where.root, model, sizes, allowed, published) as runtime:
            run(create_app(runtime, config, known, defaults, hosts=hosts), bound, config.grace_s)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound before the model is loaded, so that a port in use is told at once."""
    address = host.strip("[]")
    try:
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    return bound


def run(app: FastAPI, bound: socket.socket, grace_s: float) -> None:
    """Serve until SIGINT or SIGTERM. Calls that are under way then have ``grace_s`` seconds; after that, they are
    ended and taken back."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals end the serving and no more: the runtime is closed after it."""
            numbers = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            host, port = bound.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {app.state.service.model} at http://{shown}:{port}/v1", file=sys.stderr, flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(grace_s, app.state.service.stop)
            await super().shutdown(sockets=sockets)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace_s) + 10,
        limit_concurrency=None,
    )
    Server(config).run(sockets=[bound])
