"""Responses that are looked up again, as OpenAI's client does it: kept, shared, deleted, and nobody else's."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from serving import Served, serving

from infllm_agent.errors import StorageError
from infllm_agent.integrations.server.auth import ApiKeys
from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.integrations.server.response_store import KeptResponses, Key
from infllm_agent.model.local_model import LocalModel

pytestmark = pytest.mark.usefixtures("one_thread")

ADA, BOB, ALL = "ada-key-0123456789", "bob-key-0123456789", "all-key-0123456789"


def client_of(served: Served, key: str = "-") -> openai.OpenAI:
    return openai.OpenAI(base_url=served.v1, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), tiny_model) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served) as client:
        yield client


@pytest.fixture
def respond(client: openai.OpenAI, served: Served) -> Any:
    def respond(input: Any, **options: Any) -> Any:
        return client.responses.create(**{"model": served.model, "input": input, "max_output_tokens": 6, **options})

    return respond


def test_a_response_is_found_as_it_was_given(client, respond):
    first = respond("who?", instructions="You look after servers.", metadata={"ticket": "7"})
    more = respond("when?", previous_response_id=first.id)
    for given in (first, more):
        assert client.responses.retrieve(given.id) == given
    assert first.metadata == {"ticket": "7"}
    assert client.responses.retrieve(more.id).previous_response_id == first.id


def test_a_streamed_response_and_one_that_calls_are_found_too(client, respond):
    tool = {"type": "function", "name": "up", "parameters": {"type": "object", "properties": {}}, "strict": False}
    done = list(respond("up?", tools=[tool], tool_choice="required", max_output_tokens=100, stream=True))[-1].response
    assert done.output[0].type == "function_call"
    assert client.responses.retrieve(done.id) == done


def test_what_is_not_stored_or_deleted_is_not_found_and_not_continued(client, respond):
    gone, never = respond("who?"), respond("why?", store=False)
    assert (gone.store, never.store) == (True, False)
    assert client.responses.delete(gone.id) is None
    for id in (gone.id, never.id, gone.id[:-1] + "9", "resp_1", "resp_" + "0" * 32 + "_2"):
        for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError, match="no response") as error:
                call(id)
            assert error.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError) as error:
            respond("and?", previous_response_id=id)
        assert error.value.code == "previous_response_not_found"


def test_the_form_of_a_deletion(served, respond):
    id = respond("who?").id
    answer = httpx.delete(f"{served.v1}/responses/{id}")
    assert (answer.status_code, answer.json()) == (200, {"id": id, "object": "response", "deleted": True})
    assert httpx.get(f"{served.v1}/responses/{id}", params={"stream": True}).status_code == 400


def test_input_items_are_the_history_before_the_answer(client, respond):
    tool = {"type": "function", "name": "up", "parameters": {"type": "object", "properties": {}}, "strict": False}
    options: dict[str, Any] = {"tools": [tool], "max_output_tokens": 100}
    first = respond("up?", **options, tool_choice="required")
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}
    more = respond([result], **options, previous_response_id=first.id, tool_choice="none")
    items = list(client.responses.input_items.list(more.id, order="asc"))
    assert [item.type for item in items] == ["message", "message", "function_call", "function_call_output"]
    assert items[1].content[0].text == "up?"
    assert (items[2].id, items[2].call_id, items[3].output) == (call.id, call.call_id, "yes")
    # Page by page, in both orders, they are the same.
    for order, expected in (("asc", items), ("desc", items[::-1])):
        for limit in (1, 2, 3, 100):
            paged = list(client.responses.input_items.list(more.id, order=order, limit=limit))
            assert [item.id for item in paged] == [item.id for item in expected]
    with pytest.raises(openai.BadRequestError, match="has no item"):
        client.responses.input_items.list(more.id, after=more.output[0].id)
    # They are the input of another request that continues the same.
    again = respond([item.model_dump(exclude_none=True) for item in items], **options, tool_choice="none")
    assert again.output_text == more.output_text


def test_responses_end_with_their_session(client, respond, served):
    response = respond("who?", conversation="short-lived")
    folder = served.runtime.root / "responses"
    before = set(os.listdir(folder))
    assert httpx.delete(f"{served.v1}/sessions/short-lived").status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    assert before - set(os.listdir(folder)) == {response.id.split("_")[1]}


def test_responses_outlive_the_server_and_are_found_by_its_like(tmp_path, tiny_model):
    shared = ServerConfig(shared=True)
    with serving(tmp_path, tiny_model, config=shared) as one:
        with client_of(one) as client:
            given = client.responses.create(model=one.model, input="who?", max_output_tokens=6)
        with serving(tmp_path, tiny_model, config=shared) as other, client_of(other) as client:
            assert client.responses.retrieve(given.id) == given
            more = client.responses.create(
                model=one.model, input="when?", previous_response_id=given.id, max_output_tokens=6
            )
    with serving(tmp_path, tiny_model) as later, client_of(later) as client:
        assert client.responses.retrieve(given.id) == given
        assert client.responses.retrieve(more.id) == more
        client.responses.delete(given.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(given.id)


def test_responses_of_others_are_not_found(tmp_path, tiny_model):
    keys = ApiKeys([("ada", ADA), ("bob", BOB), ("*", ALL)])
    with (
        serving(tmp_path, tiny_model, keys=keys) as guarded,
        client_of(guarded, ADA) as ada,
        client_of(guarded, BOB) as bob,
        client_of(guarded, ALL) as everything,
    ):
        given = ada.responses.create(model=guarded.model, input="who?", max_output_tokens=6)
        for call in (bob.responses.retrieve, bob.responses.delete, bob.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                call(given.id)
        assert ada.responses.retrieve(given.id) == everything.responses.retrieve(given.id) == given


def test_links_in_the_folder_of_responses_are_refused(tmp_path):
    """None is followed, to read or to delete."""
    elsewhere, session = tmp_path / "elsewhere", "0" * 32
    (elsewhere / session).mkdir(parents=True)
    (elsewhere / session / "2.json").write_text("{}")
    key = Key(session, 2)
    for number, make in enumerate(
        (
            lambda root: (root / "responses").symlink_to(elsewhere),
            lambda root: ((root / "responses").mkdir(), (root / "responses" / session).symlink_to(elsewhere / session)),
            lambda root: (
                (root / "responses" / session).mkdir(parents=True),
                (root / "responses" / session / "2.json").symlink_to(elsewhere / session / "2.json"),
            ),
        )
    ):
        root = tmp_path / str(number)
        root.mkdir()
        make(root)
        kept = KeptResponses(root)
        with pytest.raises(StorageError):
            kept.find(key)
        with suppress(StorageError):
            kept.sweep(set)
        assert (elsewhere / session / "2.json").exists()


def test_what_is_kept_is_whole_or_not_there(tmp_path, monkeypatch):
    kept, key = KeptResponses(tmp_path), Key("1" * 32, 2)
    kept.keep(key, {"n": 1}, lambda: {key.session})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raise_no_space)
        with pytest.raises(StorageError):
            kept.keep(key, {"n": 2}, lambda: {key.session})
    assert kept.find(key) == {"n": 1}
    assert os.listdir(tmp_path / "responses" / key.session) == ["2.json"]
    assert (tmp_path / "responses" / key.session / "2.json").stat().st_mode & 0o077 == 0


def raise_no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told(served, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("infllm_agent.integrations.server.response_store.sync_folder", raise_no_space)
        body = {"model": served.model, "input": "full?", "max_output_tokens": 4}
        answer = httpx.post(f"{served.v1}/responses", json=body)
    assert answer.status_code == 507
    assert answer.json()["error"]["code"] == "insufficient_storage"
