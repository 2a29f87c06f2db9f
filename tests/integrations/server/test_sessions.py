"""The server's sessions: what is stored, forks, exports, events, what streams in; and who may see it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import Served, serving

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.integrations.server.auth import EVERYTHING, ApiKeys, Namespace
from infllm_agent.maintenance.archive import import_session
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.session_store import SessionStore

pytestmark = pytest.mark.usefixtures("one_thread")

UP = {
    "format": {
        "type": "json_schema",
        "name": "x",
        "schema": {"type": "object", "properties": {"up": {"type": "boolean"}}, "required": ["up"]},
    }
}
ADA, BOB, ALL = "ada-key-0123456789", "bob-key-0123456789", "all-key-0123456789"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), tiny_model) as server:
        yield server


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.v1 + "/sessions", timeout=30, follow_redirects=True) as client:
        yield client


def append(http: httpx.Client, name: str, *texts: str) -> dict[str, Any]:
    events = [{"role": "user", "text": text} for text in texts]
    response = http.post(f"/{name}/events", json={"events": events})
    assert response.status_code == 201, response.text
    return response.json()


def test_what_is_acknowledged_is_on_disk_and_read_soon(http, served):
    text = "the tool printed a line of its log; " * 20
    done = append(http, "soon", text, text)
    with SessionStore.open(served.runtime.root, "soon", readonly=True) as store:
        assert [message.text for message in store.messages()] == [text, text]
        assert store.token_count == done["tokens"]
    end = time.monotonic() + 20
    while served.runtime.session("soon").pending_tokens >= served.runtime.memory.chunk_size:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_reading_ahead_gives_way_to_calls(http, served):
    """Appending to a session that is being read does not wait for the end of it."""
    append(http, "busy", "a line of its log; " * 3000)
    began = time.monotonic()
    append(http, "busy", "and one more")
    appended = time.monotonic() - began
    assert served.runtime.session("busy").pending_tokens > 10 * served.runtime.memory.chunk_size, (
        "read too soon to tell"
    )
    assert appended < 5
    http.delete("/busy")


def test_list_show_messages_search_delete(http):
    append(http, "log", "disk full on db-3", "all is well", "disk replaced")
    append(http, "log2", "nothing")
    names = [info["id"] for info in http.get("").json()["data"]]
    assert names == sorted(names)
    assert {"log", "log2"} <= set(names)
    page = http.get("", params={"limit": 1, "after": "log"}).json()
    assert ([info["id"] for info in page["data"]], page["has_more"]) == (["log2"], len(names) > names.index("log2") + 1)
    shown = http.get("/log", params={"last": 2}).json()
    assert shown["messages"] == 3
    assert [message["text"] for message in shown["recent"]] == ["all is well", "disk replaced"]
    assert http.get("/log", params={"last": 0}).json()["recent"] == []
    read = http.get("/log/messages", params={"start": 1, "limit": 1}).json()
    assert ([message["message"] for message in read["data"]], read["has_more"]) == ([1], True)
    found = http.get("/log/search", params={"q": "disk"}).json()["data"]
    assert [message["text"] for message in found] == ["disk replaced", "disk full on db-3"]
    assert http.delete("/log").json()["deleted"] == ["log"]
    assert http.get("/log").status_code == 404
    assert http.delete("/log").status_code == 404


def test_a_fork_goes_its_own_way(http, served):
    append(http, "trunk", "one", "two", "three")
    made = http.post("/trunk/fork", json={"name": "twig", "messages": 2})
    assert (made.status_code, made.json()["id"], made.json()["messages"]) == (201, "twig", 2)
    append(http, "twig", "four")
    texts = [[m["text"] for m in http.get(f"/{name}/messages").json()["data"]] for name in ("trunk", "twig")]
    assert texts == [["one", "two", "three"], ["one", "two", "four"]]


def test_an_export_is_a_session_again(http, served, tmp_path):
    append(http, "packed", "a line " * 100, "another")
    response = http.get("/packed/export")
    assert response.headers["content-type"] == "application/x-tar"
    (tmp_path / "packed.tar").write_bytes(response.content)
    info = import_session(tmp_path / "root", tmp_path / "packed.tar")
    assert (info.name, info.messages) == ("packed", 2)
    assert http.get("/none/export").status_code == 404


def test_a_tools_output_is_read_while_it_comes(http, served):
    gate, lines = threading.Event(), 40

    def output() -> Iterator[bytes]:
        for number in range(lines):
            yield f"line {number} é\n".encode()
        gate.wait(20)
        yield "é".encode()[:1]  # a character in two pieces
        yield "é".encode()[1:]

    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(http.post("/build/stream", params={"name": "make"}, content=output()))
    )
    thread.start()
    end = time.monotonic() + 20
    while not served.runtime.is_open("build") or served.runtime.session("build").memory.length < 100:
        assert time.monotonic() < end
        time.sleep(0.02)
    gate.set()
    thread.join()
    assert answers[0].status_code == 201
    (message,) = http.get("/build/messages").json()["data"]
    assert message["text"] == "".join(f"line {number} é\n" for number in range(lines)) + "é"
    assert (message["role"], message["name"]) == ("tool", "make")
    assert http.post("/build/stream", params={"name": "a b"}, content=b"x").status_code == 400
    assert http.post("/build/stream", params={"role": "wizard"}, content=b"x").status_code == 400


# -- who may see it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel) -> Iterator[Served]:
    keys = ApiKeys([("ada", ADA), ("bob", BOB), ("*", ALL)])
    with serving(tmp_path_factory.mktemp("guarded"), tiny_model, keys=keys) as server:
        yield server


def as_(served: Served, key: str) -> httpx.Client:
    return httpx.Client(base_url=served.v1, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def test_a_key_sees_its_own_sessions_only(guarded):
    with as_(guarded, ADA) as ada, as_(guarded, BOB) as bob, as_(guarded, ALL) as everything:
        for client, text in ((ada, "of ada"), (bob, "of bob")):
            events = [{"role": "user", "text": text}]
            assert client.post("/sessions/notes/events", json={"events": events}).json()["id"] == "notes"
            assert [info["id"] for info in client.get("/sessions").json()["data"]] == ["notes"]
            (message,) = client.get("/sessions/notes/messages").json()["data"]
            assert message["text"] == text
        assert [i["id"] for i in everything.get("/sessions").json()["data"]] == ["ada:notes", "bob:notes"]
        ada.post("/sessions/secret/events", json={"events": [{"role": "user", "text": "of ada"}]})
        for name in ("secret", "ada:secret", "ada:notes", "../ada:notes", "notes.b2"):
            for method, path, body in (
                ("GET", f"/sessions/{name}", None),
                ("GET", f"/sessions/{name}/messages", None),
                ("GET", f"/sessions/{name}/search?q=ada", None),
                ("GET", f"/sessions/{name}/export", None),
                ("DELETE", f"/sessions/{name}", None),
                ("POST", f"/sessions/{name}/fork", {"name": "mine"}),
            ):
                response = bob.request(method, path, json=body)
                assert response.status_code == 404, (method, path, response.text)
                assert "ada:notes" not in response.text.replace(f"'{name}'", "")
        assert ada.get("/sessions/secret").status_code == 200
        assert ada.delete("/sessions/notes").json()["deleted"] == ["notes"]
        assert bob.get("/sessions/notes").status_code == 200


def test_histories_and_responses_of_others_are_not_found(guarded):
    history: list[Any] = [{"role": "user", "content": "the same words " * 8}]
    with (
        openai.OpenAI(base_url=guarded.v1, api_key=ADA, max_retries=0) as ada,
        openai.OpenAI(base_url=guarded.v1, api_key=BOB, max_retries=0) as bob,
    ):
        ada.chat.completions.create(model=guarded.model, messages=history, max_tokens=4)
        answer = bob.chat.completions.create(model=guarded.model, messages=history, max_tokens=4)
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        response = ada.responses.create(model=guarded.model, input="hello", max_output_tokens=4)
        with pytest.raises(openai.NotFoundError, match="no response"):
            bob.responses.create(model=guarded.model, input="?", previous_response_id=response.id)


def test_no_key_and_unknown_keys(guarded):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}, {"Authorization": ADA}):
        for path in ("/v1/models", "/v1/sessions", "/metrics", "/nothing"):
            response = httpx.get(guarded.url + path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(guarded.url + "/healthz").json()["status"] == "ok"
    with as_(guarded, ADA) as ada, as_(guarded, ALL) as everything:
        assert ada.get(guarded.url + "/metrics").status_code == 403
        assert "infllm_sessions_open" in everything.get(guarded.url + "/metrics").text


def test_keys_from_a_file_and_the_environment(tmp_path: Path):
    path = tmp_path / "keys"
    digest = "sha256:" + hashlib.sha256(BOB.encode()).hexdigest()
    path.write_text(f"# who\nada {ADA}\n\nbob {digest}  # only its digest\n* {ALL}\n")
    path.chmod(0o600)
    for keys in (ApiKeys.load(path), ApiKeys.load(None, {"INFLLM_API_KEYS": f"ada={ADA}, bob={digest}\n*={ALL}"})):
        assert keys is not None
        assert keys.namespace(ADA) == Namespace("ada")
        assert keys.namespace(BOB) == Namespace("bob")
        assert keys.namespace(ALL) == EVERYTHING
        assert keys.namespace(digest) is None
        assert keys.namespace("") is None
    assert ApiKeys.load(None, {}) is None


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("ada short\n", 0o600, "has 5 characters"),
        (f"a:b {ADA}\n", 0o600, "namespace 'a:b'"),
        (f"ada {ADA} more\n", 0o600, "line 1"),
        (f"ada {ADA}\nbob {ADA}\n", 0o600, "there twice"),
        ("# nothing\n", 0o600, "no API key"),
        (f"ada {ADA}\n", 0o644, "chmod 600"),
    ],
)
def test_keys_that_cannot_be(tmp_path, text, mode, says):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=says):
        ApiKeys.load(path)


# -- responses ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.v1, api_key="-", max_retries=0) as client:
        yield client


def test_a_response_continues_another(client, served):
    first = client.responses.create(
        model=served.model, instructions="You look after servers.", input="who?", max_output_tokens=6
    )
    assert first.status == "incomplete"
    assert first.incomplete_details.reason == "max_output_tokens"
    more = client.responses.create(
        model=served.model, input="when?", previous_response_id=first.id, max_output_tokens=6
    )
    assert more.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    # Another continuation of the first is a branch, and the first line stays.
    other = client.responses.create(
        model=served.model, input="why?", previous_response_id=first.id, max_output_tokens=6
    )
    assert other.usage.input_tokens_details.cached_tokens > 0.4 * first.usage.total_tokens
    again = client.responses.create(model=served.model, input="so?", previous_response_id=more.id, max_output_tokens=6)
    assert again.usage.input_tokens_details.cached_tokens >= more.usage.total_tokens - 1
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=served.model, input="?", previous_response_id=first.id[:-1] + "9")


def test_streamed_responses_are_those_of_the_whole(client, served):
    options: dict[str, Any] = {"model": served.model, "input": "up?", "max_output_tokens": 60, "text": UP}
    whole = client.responses.create(**options)
    assert whole.status == "completed"
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert streamed.output_text == whole.output_text
    cut = [event.type for event in client.responses.create(**{**options, "text": None}, stream=True)]
    assert cut[-1] == "response.incomplete"


def test_calls_in_responses_and_their_results(client, served):
    tool = {"type": "function", "name": "up", "parameters": {"type": "object", "properties": {}}, "strict": False}
    options: dict[str, Any] = {"model": served.model, "tools": [tool], "max_output_tokens": 100}
    first = client.responses.create(**options, input="up?", tool_choice="required")
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, call.arguments) == ("up", "{}")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}
    more = client.responses.create(**options, input=[result], previous_response_id=first.id, tool_choice="none")
    # An answer of which every token follows from its form has not gone through the model yet.
    assert more.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    # The whole history, by hand, is the same one.
    items = [{"role": "user", "content": "up?"}, *[item.model_dump() for item in first.output], result]
    assert client.responses.create(**options, input=items, tool_choice="none").usage.input_tokens_details.cached_tokens
    with client.responses.stream(**options, input="up?", tool_choice="required") as stream:
        assert "response.function_call_arguments.done" in [event.type for event in stream]
    with pytest.raises(openai.BadRequestError, match="call 'nobodys'"):
        client.responses.create(**options, input=[{**result, "call_id": "nobodys"}])


def test_a_conversation_is_a_session(client, http, served):
    append(http, "talk", "disk full on db-3")
    response = client.responses.create(model=served.model, input="which?", conversation="talk", max_output_tokens=6)
    assert response.conversation.id == "talk"
    texts = [message["text"] for message in http.get("/talk/messages").json()["data"]]
    assert texts == ["disk full on db-3", "which?", response.output_text]
    response = client.responses.create(
        model=served.model,
        input="up?",
        conversation={"id": "talk"},
        max_output_tokens=60,
        text=UP,
    )
    assert response.output_text.startswith("{")


def test_sessions_of_another_memory_are_refused_by_name(http, served):
    """409, and the session is as it was."""
    other = MemoryConfig(n_local=32, topk=0, candidates=0, chunk_size=16)
    from infllm_agent.runtime import AgentRuntime

    with AgentRuntime(served.runtime.root, served.runtime.model, other) as runtime:
        session = runtime.session("foreign")
        session.append_user("hello")
    response = http.post("/foreign/events", json={"events": [{"role": "user", "text": "x"}]})
    assert response.status_code == 409
    assert "memory" in response.json()["error"]["message"]
