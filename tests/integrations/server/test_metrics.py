"""Metrics of requests: what was asked is counted, and nothing that a client writes becomes a label."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from load_example import load_example
from prometheus_client.parser import text_string_to_metric_families
from serving import Served, serving

from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.model.local_model import LocalModel

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT, SESSION = "/v1/chat/completions", "/v1/sessions/{session}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), tiny_model, config=ServerConfig(body_bytes=10_000)) as server:
        yield server


def samples(served: Served, name: str) -> dict[tuple[str, ...], float]:
    """The values of a metric, by what its labels say, in the order of their names."""
    text = httpx.get(f"{served.url}/metrics").text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {tuple(s.labels[k] for k in sorted(s.labels)): s.value for s in found if s.name == f"infllm_http_{name}"}


def ask(served: Served, **options: object) -> None:
    body = {"model": served.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **options}
    with httpx.stream("POST", served.url + CHAT, json=body, timeout=30) as response:
        response.read()


def test_requests_by_route_method_and_status(served):
    before = samples(served, "requests_total")
    events = {"events": [{"role": "user", "text": "hello"}]}
    httpx.post(f"{served.v1}/sessions/one/events", json=events)
    httpx.post(f"{served.v1}/sessions/two/events", json=events)
    httpx.get(f"{served.v1}/sessions/one")
    httpx.get(f"{served.v1}/sessions/none")
    httpx.delete(f"{served.v1}/sessions/one")
    httpx.post(served.url + CHAT, content=bytes(20_000))  # refused before it is read
    httpx.get(served.url + CHAT)
    httpx.get(f"{served.v1}/models/a/b")
    after = samples(served, "requests_total")
    changes = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key)}
    metrics = changes.pop(("GET", "/metrics", "200"))
    assert metrics == 1  # the one that asked before; the last is still under way
    assert changes == {
        ("POST", f"{SESSION}/events", "201"): 2,
        ("GET", SESSION, "200"): 1,
        ("GET", SESSION, "404"): 1,
        ("DELETE", SESSION, "200"): 1,
        ("POST", CHAT, "413"): 1,
        ("GET", CHAT, "405"): 1,
        ("GET", "/v1/models/{model}", "404"): 1,
    }


def test_labels_do_not_grow_with_what_clients_write(served):
    def labels() -> set[tuple[str, ...]]:
        return set(samples(served, "requests_total"))

    def send(number: int) -> None:
        httpx.get(f"{served.url}/nothing/{number}")
        httpx.get(f"{served.v1}/sessions/s{number}/search", params={"q": str(number)})
        httpx.get(f"{served.v1}/responses/resp_{number}")
        httpx.request(f"METHOD{number}", served.url + CHAT)

    send(0)
    known = labels()
    assert {("other", CHAT, "405"), ("GET", "other", "404")} <= known
    for number in range(1, 20):
        send(number)
    assert labels() == known


def test_times_of_answers_and_their_first_tokens(served):
    ask(served)
    whole, first = samples(served, "request_seconds_count"), samples(served, "first_token_seconds_count")
    ask(served, stream=True)
    assert samples(served, "request_seconds_count")[("POST", CHAT)] == whole[("POST", CHAT)] + 1
    assert samples(served, "first_token_seconds_count")[(CHAT,)] == first.get((CHAT,), 0) + 1
    assert samples(served, "first_token_seconds_sum")[(CHAT,)] < samples(served, "request_seconds_sum")[("POST", CHAT)]


def test_requests_in_flight_and_clients_that_leave(served):
    gauge, route = "requests_in_flight", ("POST", f"{SESSION}/stream")
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = "POST /v1/sessions/tail/stream HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        end = time.monotonic() + 10
        while not samples(served, gauge).get(route):
            assert time.monotonic() < end
            time.sleep(0.02)
    while samples(served, gauge)[route]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_example_of_a_stateless_client_runs(tmp_path: Path, tiny_model: LocalModel, capsys):
    """As it stands, but for the address."""
    with serving(tmp_path, tiny_model) as served:
        load_example("openai_client").main(served.v1, served.model)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("> ") for line in lines) == 4
    costs = [[int(word) for word in line.split() if word.isdigit()] for line in lines if "of them read" in line]
    assert len(costs) == 3
    assert costs[0][0] == costs[0][1]  # the first reads all
    for (_, first), (tokens, read) in zip(costs[:1] * 2, costs[1:], strict=True):
        assert read < tokens - first / 2  # the others what is new
    cached = re.search(r"'cache_read': (\d+)", lines[-1])  # LangChain's goes on where OpenAI's client began
    assert cached is not None
    assert int(cached[1]) > 0
