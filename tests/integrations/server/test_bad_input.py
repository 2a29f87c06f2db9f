"""Whatever comes in: a proper status in OpenAI's form, flat memory, and the session as it was."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from serving import Served, serving

from infllm_agent.integrations.server.auth import EVERYTHING, Namespace
from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.integrations.server.errors import ApiError
from infllm_agent.integrations.server.middleware.gate import LOOPBACK, Rates
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.session_store import SessionStore

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 100_000
HELLO = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel) -> Iterator[Served]:
    config = ServerConfig(body_bytes=LIMIT, most_tokens=50_000, stall_s=1.0)
    with serving(tmp_path_factory.mktemp("served"), tiny_model, config=config, hosts=LOOPBACK) as server:
        yield server


@pytest.fixture
def post(served: Served) -> Callable[..., httpx.Response]:
    def post(path: str = "/chat/completions", **body: Any) -> httpx.Response:
        if path == "/chat/completions":
            body = {"model": served.model, "messages": [HELLO], "max_tokens": 4, **body}
        return httpx.post(served.v1 + path, json=body, timeout=30)

    return post


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


def state(served: Served, name: str) -> tuple[Any, ...]:
    """What is on disk of a session."""
    with SessionStore.open(served.runtime.root, name, readonly=True) as store:
        return store.generation, store.messages(), list(store.token_ids())


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"model": "gpt-5"}, 404, "model_not_found", "no model 'gpt-5' here"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_value", "role"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            400,
            "unsupported_content",
            "messages[0].content[0] is of type 'image_url': the model reads text only",
        ),
        ({"messages": [HELLO, {"role": "tool", "tool_call_id": "c1", "content": "x"}]}, 400, "invalid_value", "'c1'"),
        (
            {
                "messages": [
                    HELLO,
                    {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{oops"}}]},
                ]
            },
            400,
            "invalid_value",
            "messages[1].tool_calls[0]",
        ),
        ({"n": 2}, 400, "invalid_value", "n = 2"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**9}, 400, "invalid_value", "50000 at most"),
        ({"stop": [""]}, 400, "invalid_value", "stop sequence"),
        ({"logprobs": True}, 400, "unsupported_parameter", "logprobs"),
        ({"frequency_penalty": 0.5}, 400, "unsupported_parameter", "frequency_penalty"),
        ({"colour": "red"}, 400, "unknown_parameter", "colour is unknown"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "invalid_name", "'a b'"),
        ({"tools": [{"type": "web_search"}]}, 400, "invalid_value", "tools"),
        ({"tool_choice": "required"}, 400, "invalid_value", "needs tools"),
        ({"response_format": {"type": "json_schema"}}, 400, "invalid_value", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}},
            400,
            "invalid_value",
            "wrong",
        ),
        ({"session_id": "x" * 300}, 400, "invalid_value", "session_id"),
        ({"append": True}, 400, "invalid_value", "to which session"),
        ({"seed": "x"}, 400, "invalid_value", "seed"),
    ],
)
def test_bad_requests(post, body, status, code, says):
    for stream in (False, True):
        error = error_of(post(**body, stream=stream), status)
        assert error["code"] == code
        assert says in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": 1e999}',
        b'{"model": NaN}',
        b"\xff\xfe{}",
        b'"' + b"\xc3" + b'"',
        b"[" * 50_000,
        b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
        b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "\\ud800": 1}',
    ],
)
@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/sessions/x/events", "/sessions/x/fork"])
def test_bodies_that_are_none(served, body, path):
    response = httpx.post(served.v1 + path, content=body, headers={"Content-Type": "application/json"})
    error_of(response, 400)


def test_lone_surrogates_become_the_sign_for_what_is_no_character(served):
    def send(model: bytes) -> httpx.Response:
        body = b'{"model": "%s", "messages": [{"role": "user", "content": "a\\ud800b"}], "max_tokens": 2}' % model
        return httpx.post(served.v1 + "/chat/completions", content=body, headers={"Content-Type": "application/json"})

    session = served.runtime.session(send(served.model.encode()).json()["session_id"])
    assert session.messages()[0].text == "a\ufffdb"
    error_of(send(b"\\udfff"), 404)


def test_deep_schemas_are_refused_or_served(post):
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    response = post(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    error_of(response, 400)


def test_a_body_that_is_too_large(served, post):
    error = error_of(post(messages=[{"role": "user", "content": "a" * LIMIT}]), 413)
    assert error["code"] == "body_too_large"

    def unannounced() -> Iterator[bytes]:
        yield b'{"model": "'
        for _ in range(50):
            yield b"a" * 10_000

    response = httpx.post(
        served.v1 + "/chat/completions", content=unannounced(), headers={"Content-Type": "application/json"}
    )
    error_of(response, 413)


def test_other_paths_methods_and_hosts(served):
    assert error_of(httpx.get(served.v1 + "/nothing"), 404)
    assert error_of(httpx.get(served.v1 + "/chat/completions"), 405)
    error = error_of(httpx.get(served.v1 + "/models", headers={"Host": "evil.example"}), 421)
    assert error["code"] == "unknown_host"
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"):
        assert httpx.get(served.v1 + "/models", headers={"Host": host}).status_code == 200


def test_a_session_that_another_process_has(served, post):
    post(append=True, session_id="taken")
    served.runtime.release("taken")
    with SessionStore.open(served.runtime.root, "taken"):
        error = error_of(post(append=True, session_id="taken"), 409)
        assert error["code"] == "session_locked"
    assert post(append=True, session_id="taken").status_code == 200


def test_a_request_that_fails_leaves_the_session_as_it_was(served, post):
    post(append=True, session_id="kept")
    before = state(served, "kept")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}
    error_of(post(append=True, session_id="kept", response_format=schema), 400)
    assert state(served, "kept") == before
    events = [{"role": "user", "text": "fine"}, {"role": "tool", "name": "not a name", "text": "x"}]
    error_of(post("/sessions/kept/events", events=events), 400)
    assert state(served, "kept") == before
    error_of(post("/sessions/kept/events", events=[{"role": "wizard", "text": "x"}]), 400)
    error_of(post("/sessions/kept/fork", name="../kept"), 400)
    error_of(post("/sessions/kept/fork", name="kept"), 409)
    error_of(post("/sessions/kept/fork", name="more", messages=99), 400)
    assert state(served, "kept") == before


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def long_answer(served: Served, **more: Any) -> bytes:
    body = {"model": served.model, "messages": [HELLO], "max_tokens": 50_000, **more}
    content = json.dumps(body).encode()
    return (
        http_head("/v1/chat/completions", "Content-Type: application/json", f"Content-Length: {len(content)}") + content
    )


def http_head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_the_middle(served, post, stream):
    """The model stops for it, and what it brought is taken back."""
    post(append=True, session_id="left")
    before = state(served, "left")
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(long_answer(served, append=True, session_id="left", stream=stream))
        wait_until(lambda: served.service.running == 1)
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    wait_until(lambda: served.service.running == 0)
    assert state(served, "left") == before
    assert post(append=True, session_id="left").status_code == 200


def test_a_slow_reader_is_left_and_costs_no_memory(served, post):
    post(append=True, session_id="slow")
    before = state(served, "slow")
    served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what it accepts inherits it
    process = psutil.Process(os.getpid())
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(long_answer(served, append=True, session_id="slow", stream=True))
        wait_until(lambda: served.service.running == 1)
        size = process.memory_info().rss
        wait_until(lambda: served.service.running == 0, 60)
        assert process.memory_info().rss - size < 100 << 20
    assert state(served, "slow") == before
    assert post(append=True, session_id="slow").status_code == 200


def test_what_was_streamed_in_stays_if_the_client_leaves(served):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(http_head("/v1/sessions/tail/stream?name=build", "Transfer-Encoding: chunked"))
        connection.sendall(b"c\r\nfirst line.\n\r\n")
        wait_until(lambda: served.runtime.is_open("tail") and served.runtime.session("tail").open_message is not None)
        time.sleep(0.2)
    wait_until(lambda: served.service.running == 0)
    (message,) = state(served, "tail")[1]
    assert (message.role, message.name, message.text) == ("tool", "build", "first line.\n")


def test_too_many_calls_at_once(served, post, monkeypatch):
    monkeypatch.setattr(served.service, "running", served.service.config.concurrent)
    response = post()
    assert error_of(response, 503)["code"] == "overloaded"
    assert int(response.headers["Retry-After"]) >= 1
    assert httpx.get(served.url + "/healthz").status_code == 200


def test_an_answer_that_takes_too_long(tmp_path, tiny_model):
    with serving(tmp_path, tiny_model, config=ServerConfig(timeout_s=0.5, most_tokens=100_000)) as served:
        body: dict[str, Any] = {"model": served.model, "messages": [HELLO], "max_tokens": 100_000}
        assert error_of(httpx.post(served.v1 + "/chat/completions", json=body, timeout=30), 504)["code"] == "timeout"
        with openai.OpenAI(base_url=served.v1, api_key="-", max_retries=0) as client:
            # In the middle of the stream; on a busy machine before its first piece.
            with pytest.raises(openai.APIError, match="no answer within timeout"):
                list(client.chat.completions.create(**body, stream=True))
        assert httpx.get(served.v1 + "/sessions").json()["data"] == []


def test_rates():
    now = [0.0]
    rates = Rates(6, clock=lambda: now[0])
    for _ in range(6):
        rates.take(EVERYTHING)
    with pytest.raises(ApiError, match="more than 6 requests"):
        rates.take(EVERYTHING)
    rates.take(Namespace("other"))
    now[0] = 10.0  # one more by now
    rates.take(EVERYTHING)
    with pytest.raises(ApiError) as refused:
        rates.take(EVERYTHING)
    assert refused.value.headers["Retry-After"] == "11"


def test_a_rate_over_http(tmp_path, tiny_model):
    with serving(tmp_path, tiny_model, config=ServerConfig(requests_per_minute=2)) as served:
        answers = [httpx.get(served.v1 + "/models") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert error_of(answers[2], 429)["type"] == "rate_limit_error"
        assert httpx.get(served.url + "/healthz").status_code == 200
