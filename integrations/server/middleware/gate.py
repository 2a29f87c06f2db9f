"""What is checked before a request is read: the host it names, its key, how many there were, its size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infllm_agent.integrations.server.auth import EVERYTHING, ApiKeys, Namespace
from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.integrations.server.errors import ApiError, response_of

#: Paths that need no key: whether it lives, and what it offers.
OPEN_PATHS = ("/healthz", "/docs", "/redoc", "/openapi.json")
#: Names by which a server that only this machine reaches is called. A web page that a browser here shows may send
#: requests to it, under its own name.
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """ASGI middleware. Lets a request through with ``scope["state"]["namespace"]`` set, or answers it with an error."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, keys: ApiKeys | None, hosts: tuple[str, ...] | None = LOOPBACK
    ) -> None:
        """
        Args:
            keys: None: everybody is let in, and sees all sessions.
            hosts: names of the server that requests may call it by; None: any.
        """
        self.app = app
        self.config = config
        self.keys = keys
        self.hosts = hosts
        self.rates = Rates(config.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_host(headers)
            namespace = self._namespace(scope["path"], headers)
            scope.setdefault("state", {})["namespace"] = namespace
            if (largest := self._largest(scope["path"])) is not None:
                receive = _bounded(largest, headers, receive)
        except ApiError as error:
            await response_of(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_host(self, headers: Mapping[str, str]) -> None:
        name = headers.get("host", "").lower()
        name = name if name.endswith("]") else name.rpartition(":")[0] or name
        if self.hosts is not None and name not in self.hosts:
            raise ApiError(421, f"this server is not called {name[:100]!r}", code="unknown_host", param="Host")

    def _namespace(self, path: str, headers: Mapping[str, str]) -> Namespace:
        if path in OPEN_PATHS or self.keys is None:
            self.rates.take(EVERYTHING) if path not in OPEN_PATHS else None
            return EVERYTHING
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("give an API key: Authorization: Bearer KEY")
        namespace = self.keys.namespace(key.strip())
        if namespace is None:
            raise _unauthorized("this API key is not known here")
        if path == "/metrics" and namespace.name is not None:
            raise ApiError(403, "the metrics are of all namespaces: take a key of the namespace *", code="not_allowed")
        self.rates.take(namespace)
        return namespace

    def _largest(self, path: str) -> int | None:
        """Look up how many bytes a body may have; None: any number, because it is read as it comes."""
        if path.endswith("/stream"):
            return None
        return self.config.import_bytes if path.endswith("/import") else self.config.body_bytes


class Rates:
    """A bucket of requests for each namespace: full at first, refilled evenly, emptied by requests."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = per_minute
        self._clock = clock
        self._buckets: dict[Namespace, tuple[float, float]] = {}  # what is left, as of when

    def take(self, namespace: Namespace) -> None:
        """Take one request. Raises ApiError if none is left."""
        if self._size is None:
            return
        now = self._clock()
        left, then = self._buckets.get(namespace, (float(self._size), now))
        left = min(float(self._size), left + (now - then) * self._size / 60)
        if left < 1:
            wait = (1 - left) * 60 / self._size
            raise ApiError(
                429,
                f"more than {self._size} requests in a minute; the next is let in after {wait:.1f} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(int(wait) + 1)},
            )
        self._buckets[namespace] = left - 1, now


def _bounded(largest: int, headers: Mapping[str, str], receive: Receive) -> Receive:
    """Pass on a body as long as it is not too large."""
    size = 0
    told = headers.get("content-length", "")
    if told.isdigit() and int(told) > largest:
        raise _too_large(largest)

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > largest:
            raise _too_large(largest)
        return message

    return bounded


def _unauthorized(said: str) -> ApiError:
    return ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _too_large(largest: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {largest:,} bytes; send less at once, or stream it into a session",
        code="body_too_large",
    )
