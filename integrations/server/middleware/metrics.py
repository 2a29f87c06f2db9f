"""Metrics of the requests that a server answers, for Prometheus."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infllm_agent.integrations.server.errors import CLIENT_GONE
from infllm_agent.session.metrics import FIRST_TOKEN_S

#: Upper bounds of the histogram of requests, in seconds: from a look at a session to the longest answer.
REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
#: Methods by name; whatever else a client may write there is "other".
METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS")
OTHER = "other"


class RequestMetrics:
    """Counts requests. No label is what a client wrote: routes are named by their templates."""

    def __init__(self, routes: Sequence[tuple[re.Pattern[str], str]]) -> None:
        """
        Args:
            routes: what the paths of a route match, and its template, such as ``/v1/sessions/{session}``.
        """
        self._routes = tuple(routes)
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "infllm_http_requests",
            f"Requests answered, refused ones included; {CLIENT_GONE}: the client left before.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "infllm_http_request_seconds",
            "From a request's head to the end of its answer, of streams to their last event.",
            ("route", "method"),
            buckets=REQUEST_S,
            registry=registry,
        )
        self.under_way = Gauge(
            "infllm_http_requests_in_flight", "Requests under way.", ("route", "method"), registry=registry
        )
        self.first_token = Histogram(
            "infllm_http_first_token_seconds",
            "From a request's head to the first event of its stream.",
            ("route",),
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )

    def text(self) -> str:
        """Write all counts in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def route(self, path: str) -> str:
        """Find the template of a path; ``other`` for one that is not served, and for the documents."""
        return next((template for pattern, template in self._routes if pattern.match(path)), OTHER)


class Measured:
    """ASGI middleware that tells ``RequestMetrics`` of each request; outside of all that may refuse one."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        method = scope["method"] if scope["method"] in METHODS else OTHER
        labels = (self.metrics.route(scope["path"]), method)
        status, waits = CLIENT_GONE, False

        async def observed(message: Message) -> None:
            nonlocal status, waits
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
                waits = (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
            elif waits and message.get("body"):
                waits = False
                self.metrics.first_token.labels(labels[0]).observe(time.perf_counter() - began)

        under_way = self.metrics.under_way.labels(*labels)
        under_way.inc()
        try:
            await self.app(scope, receive, observed)
        except Exception:
            status = 500 if status == CLIENT_GONE else status  # it is answered outside of here
            raise
        finally:
            under_way.dec()
            self.metrics.requests.labels(*labels, str(status)).inc()
            self.metrics.seconds.labels(*labels).observe(time.perf_counter() - began)
