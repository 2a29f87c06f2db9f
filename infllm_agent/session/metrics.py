"""Metrics for Prometheus: what sessions did, counted as it happens; what there is to do, at the moment of a scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from wsgiref.simple_server import WSGIServer

from infllm_agent.errors import ConfigError
from infllm_agent.memory.context import ContextMemory
from infllm_agent.messages import Message
from infllm_agent.reply import Reply
from infllm_agent.session.observer import Load, Observer

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, start_http_server
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError('metrics need prometheus_client: pip install "infllm-agent[metrics]"') from error

#: Upper bounds of histograms, in seconds.
FORWARD_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)
ANSWER_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
COMMIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics(Observer):
    """The metrics of one runtime, in a registry of their own. ``RuntimeConfig(metrics=True)`` makes them.

    No metric has a label for the session: there may be hundreds of thousands of them. The log has their names.

    Attributes:
        registry: a ``prometheus_client.CollectorRegistry``, for those who serve it themselves.
        content_type: of ``text``, for an HTTP header.
    """

    content_type: str = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, load: Callable[[], Load]) -> None:
        """
        Args:
            load: asked at every scrape, from any thread.
        """
        self.registry = registry = CollectorRegistry()
        self._server: tuple[WSGIServer, Thread] | None = None
        registry.register(_Now(load))

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"infllm_{name}", says, labels, registry=registry)

        def histogram(name: str, says: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"infllm_{name}", says, labels, registry=registry, buckets=bounds)

        self._read = counter("tokens_read", "Tokens that went through the model, written ones included.")
        self._read_again = counter("tokens_read_again", "Tokens read anew for a fork whose source could not go back.")
        self._written = counter("tokens_written", "Tokens of answers.")
        self._messages = counter("messages", "Messages complete, by role; answers are the assistant's.", "role")
        self._answers = counter("answers", "Answers, by how they ended.", "finish_reason")
        self._failures = counter("failures", "Work that failed, by the error's class.", "error")
        self._opened = counter("sessions_opened", "Sessions opened or made.")
        lookups = counter("block_lookups", "A block's keys or values of one layer, by where found.", "tier")
        self._device, self._host, self._disk = (lookups.labels(tier) for tier in ("device", "host", "disk"))
        loaded = counter("block_loaded_bytes", "Keys and values of blocks as they came from a tier.", "tier")
        self._host_bytes, self._disk_bytes = loaded.labels("host"), loaded.labels("disk")
        forward = histogram("forward_seconds", "One forward, waiting for its turn included.", FORWARD_S, "kind")
        self._decode, self._prefill = forward.labels("decode"), forward.labels("prefill")
        self._first_token = histogram("first_token_seconds", "From the call to its first token.", FIRST_TOKEN_S)
        self._answer = histogram("answer_seconds", "From the call to the end of the answer.", ANSWER_S)
        self._queued = histogram("answer_queue_seconds", "What a live session's answer waited to begin.", FIRST_TOKEN_S)
        self._commit = histogram("commit_seconds", "Commits that wrote something.", COMMIT_S)

    def text(self) -> str:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve them at ``http://host:port/metrics`` until ``close``, in a thread.

        Args:
            port: 0 takes a free one.
            host: ``0.0.0.0`` lets other machines ask; nothing protects the page.

        Returns:
            The port.

        Raises:
            ConfigError: they are served already, or there they cannot be.
        """
        if self._server is not None:
            raise ConfigError(f"the metrics are served already, on port {self._server[0].server_port}")
        try:
            self._server = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"the metrics cannot be served on port {port} of {host}: {error}") from error
        return self._server[0].server_port

    def close(self) -> None:
        """Serve them no longer; more than once does no harm."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()

    # -- what is observed --------------------------------------------------------------------------------------------

    def opened(self, session: str, messages: int, tokens: int) -> None:
        super().opened(session, messages, tokens)
        self._opened.inc()

    def forked(self, session: str, source: str, read_again: int) -> None:
        super().forked(session, source, read_again)
        self._read_again.inc(read_again)

    def message(self, session: str, message: Message) -> None:
        super().message(session, message)
        self._messages.labels(message.role).inc()

    @contextmanager
    def reading(self, memory: ContextMemory, tokens: int) -> Iterator[None]:
        began, (hits, _), before = time.perf_counter(), memory.cache_counters(), memory.store.counters
        yield
        (self._decode if tokens == 1 else self._prefill).observe(time.perf_counter() - began)
        self._read.inc(tokens)
        host, disk = (now - then for now, then in zip(memory.store.counters, before, strict=True))
        size = memory.store.shape.plane_bytes(0)
        self._device.inc(2 * (memory.cache_counters()[0] - hits))
        self._host.inc(host)
        self._disk.inc(disk)
        self._host_bytes.inc(host * size)
        self._disk_bytes.inc(disk * size)

    def answer_begins(self, queued_s: float) -> None:
        self._queued.observe(queued_s)

    def answered(self, session: str, reply: Reply) -> None:
        super().answered(session, reply)
        self._written.inc(reply.usage.output_tokens)
        self._answers.labels(reply.finish_reason).inc()
        self._answer.observe(reply.seconds)
        if reply.usage.output_tokens:
            self._first_token.observe(reply.first_token_s)

    def committed(self, session: str, generation: int, tokens: int, seconds: float) -> None:
        super().committed(session, generation, tokens, seconds)
        self._commit.observe(seconds)

    def count_failure(self, kind: str) -> None:
        self._failures.labels(kind).inc()


class _Now(Collector):
    """What is so at the moment of the scrape."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[GaugeMetricFamily]:
        load = self._load()
        gauge = GaugeMetricFamily
        yield gauge("infllm_sessions_open", "Sessions that are open.", load.sessions)
        yield gauge("infllm_sessions_running", "Live sessions that are worked on.", load.running)
        yield gauge("infllm_queued_items", "Messages and requests in the queues of live sessions.", load.items)
        yield gauge("infllm_queued_chars", "Text in the queues of live sessions, in characters.", load.chars)
        yield gauge("infllm_model_waiting_threads", "Threads that wait for their turn at the model.", load.waiting)
        sizes = gauge("infllm_memory_bytes", "Memories of open sessions; disk: blocks in files.", labels=["tier"])
        for tier, size in load.bytes.items():
            sizes.add_metric([tier], size)
        yield sizes
