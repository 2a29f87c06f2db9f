"""A session over HTTP from an archive; what fails leaves nothing; sessions that another server has open."""

from __future__ import annotations

import os
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import Served, serving

from infllm_agent.errors import StorageError
from infllm_agent.integrations.server.auth import ApiKeys
from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.model.local_model import LocalModel
from infllm_agent.routing import session_pool
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT, BODY = 4_000_000, 10_000
ADA, BOB = "ada-key-0123456789", "bob-key-0123456789"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel) -> Iterator[Served]:
    config = ServerConfig(body_bytes=BODY, import_bytes=LIMIT, stall_s=1.0)
    with serving(tmp_path_factory.mktemp("served"), tiny_model, config=config) as server:
        yield server


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.v1, timeout=30) as client:
        yield client


def append(http: httpx.Client, name: str, *texts: str) -> None:
    events = [{"role": "user", "text": text} for text in texts]
    assert http.post(f"/sessions/{name}/events", json={"events": events}).status_code == 201


def ask(http: httpx.Client, served: Served, name: str, text: str, **options: Any) -> httpx.Response:
    body = {"model": served.model, "messages": [{"role": "user", "content": text}], "max_tokens": 12, "append": True}
    return http.post("/chat/completions", json={**body, "session_id": name, **options})


@pytest.fixture
def archive(http: httpx.Client) -> bytes:
    if http.get("/sessions/source").status_code == 404:
        append(http, "source", "disk full on db-3; " * 30, "and on db-4")
    return http.get("/sessions/source/export").content


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    return str(error["message"])


def left(served: Served) -> list[str]:
    """What lies about among the sessions, under way or abandoned."""
    return [name for name in os.listdir(Path(served.runtime.root) / "sessions") if name.startswith(".")]


def test_what_was_exported_goes_on_to_the_same_answer(http, served, archive):
    assert len(archive) > BODY
    made = http.post("/sessions/copy/import", content=(archive[at : at + 5000] for at in range(0, len(archive), 5000)))
    assert (made.status_code, made.json()["id"], made.json()["messages"]) == (201, "copy", 2)
    texts = [http.get(f"/sessions/{name}/messages").json()["data"] for name in ("source", "copy")]
    assert texts[0] == texts[1]
    answers = [ask(http, served, name, "which?").json() for name in ("source", "copy")]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]
    # Any text names a session; the answer says which.
    made = http.post("/sessions/ada@example.com/import", content=archive).json()
    assert ask(http, served, "ada@example.com", "which?").json()["session_id"] == made["id"]


def test_a_name_that_is_taken(http, archive):
    said = refused(http.post("/sessions/source/import", content=archive), 409, "session_exists")
    assert said == "there is a session 'source' already"


def head_of(name: str, size: int) -> bytes:
    """The header of a member of a tar archive."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "ends too early"),
        (lambda data: b"no archive at all" * 100, "no tar archive of a session"),
        (lambda data: data[: len(data) // 2], "ends too early"),
        (lambda data: data + b"more", "something follows"),
        (lambda data: data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:], "refused"),
        (lambda data: head_of("infllm-session-9/session.db", 512) + data[512:], "upgrade infllm-agent"),
        (lambda data: head_of("../../session.db", 512) + data[512:], "is where the file"),
    ],
)
def test_a_damaged_archive_leaves_nothing(http, served, archive, damage: Callable[[bytes], bytes], says):
    said = refused(http.post("/sessions/damaged/import", content=damage(archive)), 400, "invalid_archive")
    assert says in said
    assert str(served.runtime.root) not in said
    assert http.get("/sessions/damaged").status_code == 404
    assert left(served) == []


def test_an_archive_that_is_too_large_or_does_not_come(http, served, archive):
    refused(http.post("/sessions/large/import", content=bytes(LIMIT + 1)), 413, "body_too_large")
    piece = archive[:100_000]

    def unannounced() -> Iterator[bytes]:
        yield archive  # zeros may follow
        for _ in range(LIMIT // len(piece) + 1):
            yield bytes(len(piece))

    refused(http.post("/sessions/large/import", content=unannounced()), 413, "body_too_large")

    def stalled() -> Iterator[bytes]:
        yield piece
        time.sleep(2)
        yield piece

    refused(http.post("/sessions/large/import", content=stalled()), 408, "stalled")
    with socket.create_connection(("127.0.0.1", served.port)) as connection:  # leaves in the middle
        head = f"POST /v1/sessions/large/import HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(archive)}\r\n\r\n"
        connection.sendall(head.encode() + piece)
        wait_until(lambda: left(served) != [])
    wait_until(lambda: served.service.running == 0)
    assert http.get("/sessions/large").status_code == 404
    assert left(served) == []


def test_the_body_is_not_held_in_memory(tmp_path, tiny_model):
    """A member of 300 MB, by its header, of an archive that then ends: as much has passed through."""
    size = 300 << 20

    def body() -> Iterator[bytes]:
        yield head_of("infllm-session-1/session.db", size)
        for _ in range(size >> 20):
            yield bytes(1 << 20)
            peak.append(psutil.Process().memory_info().rss)

    peak = [psutil.Process().memory_info().rss]
    with serving(tmp_path, tiny_model) as served:
        answer = httpx.post(f"{served.v1}/sessions/big/import", content=body(), timeout=60)
        refused(answer, 400, "invalid_archive")
    assert len(peak) > size >> 20
    assert max(peak) - peak[0] < 100 << 20


def test_an_import_is_of_the_keys_namespace(tmp_path, tiny_model, archive):
    with serving(tmp_path, tiny_model, keys=ApiKeys([("ada", ADA), ("bob", BOB)])) as guarded:
        for key in (ADA, BOB):
            headers = {"Authorization": f"Bearer {key}"}
            made = httpx.post(f"{guarded.v1}/sessions/copy/import", content=archive, headers=headers)
            assert (made.status_code, made.json()["id"]) == (201, "copy")
            refused(
                httpx.post(f"{guarded.v1}/sessions/copy/import", content=archive, headers=headers),
                409,
                "session_exists",
            )
        assert httpx.post(f"{guarded.v1}/sessions/copy/import", content=archive).status_code == 401
        assert [info.name for info in guarded.runtime.sessions()] == ["ada:copy", "bob:copy"]


# -- what fails leaves nothing -----------------------------------------------------------------------------------------


def test_a_first_append_that_fails_leaves_no_session(http, served, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "commit", fail)
        assert http.post("/sessions/new/events", json={"events": [{"role": "user", "text": "x"}]}).status_code == 500
    bad = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}}
    assert ask(http, served, "new", "hello", **bad).status_code == 400
    with monkeypatch.context() as patch:
        patch.setattr(Session, "stream_reply", fail)
        assert ask(http, served, "new", "hello").status_code == 500
        assert ask(http, served, "new", "hello", append=False).status_code == 500
    assert http.get("/sessions/new").status_code == 404
    # One that holds something stays, whatever fails later.
    append(http, "new", "one")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "stream_reply", fail)
        assert ask(http, served, "new", "hello").status_code == 500
    assert http.get("/sessions/new").json()["messages"] == 1


def test_reading_ahead_makes_no_session_again(http, served):
    append(http, "deleted", "one " * 2000)
    assert http.delete("/sessions/deleted").status_code == 200
    wait_until(lambda: not served.runtime.dispatcher.backlog().running)
    assert http.get("/sessions/deleted").status_code == 404


# -- two servers -------------------------------------------------------------------------------------------------------


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_session_that_another_server_has_open_is_deleted(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(session_pool, "DELETE_S", 0.5)
    config = ServerConfig(shared=True)
    with (
        serving(tmp_path, tiny_model, config=config) as one,
        serving(tmp_path, tiny_model, config=config) as other,
        httpx.Client(base_url=one.v1, timeout=30) as first,
        httpx.Client(base_url=other.v1, timeout=30) as second,
    ):
        append(first, "idle", "hello")
        assert one.runtime.is_open("idle")
        assert second.delete("/sessions/idle").json()["deleted"] == ["idle"]
        assert first.get("/sessions/idle").status_code == 404
        assert not one.runtime.is_open("idle")
        # While a call of the other uses it, it cannot be had.
        append(first, "busy", "hello")
        gate = threading.Event()

        def output() -> Iterator[bytes]:
            yield b"a line"
            gate.wait(20)

        thread = threading.Thread(target=lambda: first.post("/sessions/busy/stream", content=output()))
        thread.start()
        try:
            wait_until(lambda: one.runtime.open_for_call("busy").open_message is not None)
            refused(second.delete("/sessions/busy"), 409, "session_locked")
        finally:
            gate.set()
            thread.join()
        assert second.delete("/sessions/busy").json()["deleted"] == ["busy"]


def test_a_holder_that_does_not_share_keeps_its_session(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(session_pool, "DELETE_S", 0.3)
    with serving(tmp_path, tiny_model, config=ServerConfig(shared=True)) as served:
        with AgentRuntime(tmp_path, tiny_model, served.runtime.memory) as runtime:
            runtime.session("mine").append_user("hello")
            refused(httpx.delete(f"{served.v1}/sessions/mine"), 409, "session_locked")
        assert httpx.delete(f"{served.v1}/sessions/mine").status_code == 200
