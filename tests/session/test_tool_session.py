"""Tools in sessions: told of, called, answered, stored, and the same again after a restart."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tool_families import ADD, TOOLS, WEATHER, parsed_ids

from infllm_agent.errors import ConfigError, UnsupportedSchema
from infllm_agent.runtime import AgentRuntime
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.tools import ToolCall

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture
def runtime(tmp_path: Path, tiny_model_folder: Path) -> Iterator[AgentRuntime]:
    with AgentRuntime.open(tmp_path / "root", str(tiny_model_folder), dtype="float32") as runtime:
        yield runtime


def test_a_dialogue_with_tools_lasts(runtime: AgentRuntime) -> None:
    session = runtime.session("ops")
    session.append_system("Be brief.", tools=TOOLS)
    session.append_user("Weather in Paris and Rome?")
    reply = session.reply(tool_choice="any", max_tokens=70, temperature=1.0, seed=3)
    assert reply.finish_reason == "tool_calls"
    assert reply.message.calls == reply.tool_calls
    assert len({call.id for call in reply.tool_calls}) == len(reply.tool_calls) > 0
    assert reply.text == reply.message.text == ""
    for call in reply.tool_calls:
        session.append_tool_result(call.name, "sunny", call_id=call.id)
    session.append_assistant("It is", calls=[ToolCall("add", {"a": 1}, "mine")])
    messages, ids, chunks = session.messages(), session.token_ids(), session.chunks()
    assert messages[-1].calls == (ToolCall("add", {"a": 1}, "mine"),)
    session.commit()
    session.close()

    again = runtime.session("ops")
    assert (again.messages(), again.token_ids(), again.chunks()) == (messages, ids, chunks)
    assert again.tools == TOOLS
    again.store.verify()
    assert again.store.search('"mine"')[0].index == messages[-1].index


def test_what_was_generated_stays_as_it_was_and_reads_as_calls(runtime: AgentRuntime) -> None:
    session = runtime.session("ops")
    session.append_user("Go.")
    reply = session.reply(tools=[ADD], tool_choice="add", parallel_calls=False, max_tokens=60, temperature=1.0, seed=1)
    ids = session.token_ids()[reply.message.start : reply.message.end]
    ids = ids[len(session.chat.generation_prompt()) :][: reply.usage.output_tokens]
    parsed = parsed_ids(session.chat, ids)
    assert [(call.name, call.arguments) for call in parsed.calls] == [(c.name, c.arguments) for c in reply.tool_calls]
    assert not session.tools  # given for one reply, not announced


def test_forced_tokens_go_through_the_model_together_and_replay_the_same(runtime: AgentRuntime) -> None:
    import torch

    session = runtime.session("ops")
    session.append_user("Go.")
    before = session.memory.length
    reply = session.reply(tools=[WEATHER], tool_choice="any", parallel_calls=False, max_tokens=90)
    chunks = [chunk for chunk in session.chunks() if chunk[0] >= before]
    assert max(length for start, length in chunks if start >= reply.usage.input_tokens) > 5
    memory = session.model.new_memory(session.config)
    ids = session.token_ids()
    for start, length in session.chunks():
        logits = session.model.forward(ids[start : start + length], memory)
    follow = ids[memory.length : memory.length + 1]
    assert torch.isfinite(logits).all()
    assert torch.equal(session.model.forward(follow, memory), session.model.forward(follow, session.memory))


def test_streamed_pieces_are_the_text_without_the_calls(runtime: AgentRuntime) -> None:
    session = runtime.session("ops")
    session.append_system("x", tools=TOOLS)
    session.append_user("Go.")
    for seed in range(3):
        pieces = list(session.stream_reply(max_tokens=40, temperature=1.5, seed=seed))
        assert session.last_reply is not None
        assert "".join(pieces) == session.last_reply.text
    pieces = list(session.stream_reply(tool_choice="any", max_tokens=60, prefix=""))
    assert "".join(pieces) == ""


def test_schemas_prefixes_and_limits(runtime: AgentRuntime) -> None:
    session = runtime.session("ops")
    session.append_user("Where?")
    reply = session.reply(schema=CITY, max_tokens=20)
    assert (reply.finish_reason, list(json.loads(reply.text))) == ("stop", ["city"])
    reply = session.reply(schema=CITY, max_tokens=20, prefix='{"city": "Par')
    assert json.loads(reply.text)["city"].startswith("Par")
    reply = session.reply(schema=CITY, max_tokens=2)
    assert (reply.finish_reason, reply.tool_calls) == ("length", ())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"schema": {"type": "nonesuch"}}, UnsupportedSchema, "nonesuch"),
        ({"schema": CITY, "prefix": "no"}, ConfigError, "cannot begin with the prefix 'no'"),
        ({"schema": CITY, "tool_choice": "any"}, ConfigError, "contradict"),
        ({"tool_choice": "any"}, ConfigError, "no such tool"),
        ({"tools": TOOLS, "tool_choice": "subtract"}, ConfigError, "subtract"),
    ],
)
def test_what_cannot_be_asked_for_changes_nothing(
    runtime: AgentRuntime, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    session = runtime.session("ops")
    session.append_user("Go.")
    before = session.token_ids()
    with pytest.raises(error, match=words):
        session.reply(**options)
    assert session.token_ids() == before
    with pytest.raises(ConfigError, match="has no calls"):
        session.append("user", "x", calls=[ToolCall("add", {})])
    with pytest.raises(ConfigError, match="no tools"):
        session.append("user", "x", tools=TOOLS)
    assert session.token_ids() == before


def test_a_session_from_before_there_were_tools_opens(runtime: AgentRuntime) -> None:
    session = runtime.session("old")
    session.append_user("one")
    session.commit()
    folder = session.store.folder
    session.close()
    with closing(sqlite3.connect(folder / "session.db")) as db:  # as version 001 had left it
        db.execute("DROP INDEX messages_tools")
        db.execute("ALTER TABLE messages DROP COLUMN calls")
        db.execute("ALTER TABLE messages DROP COLUMN tools")
        db.execute("DELETE FROM _sqlite_migrations WHERE name = '002_tools'")
        db.commit()
    with SessionStore.open(runtime.root, "old", readonly=True) as store:
        assert [message.text for message in store.messages()] == ["one"]
        assert store.search("one")
        assert store.search("on")[0].calls == ()
        store.verify()
    again = runtime.session("old")
    assert (again.messages()[0].text, again.tools) == ("one", ())
    again.append_system("", tools=[ADD])
    again.commit()
    again.store.verify()


@pytest.mark.parametrize("column", ["calls", "tools"])
def test_damaged_calls_are_noticed(runtime: AgentRuntime, column: str) -> None:
    from infllm_agent.errors import CorruptSession

    session = runtime.session("ops")
    session.append_system("x", tools=[ADD])
    session.append_assistant("", calls=[ToolCall("add", {})])
    session.commit()
    path = session.store.folder / "session.db"
    session.close()
    for value in ("NULL", "'[]'"):
        with closing(sqlite3.connect(path)) as db:
            db.execute(f"UPDATE messages SET {column} = {value} WHERE {column} IS NOT NULL")
            db.commit()
        with SessionStore.open(runtime.root, "ops", readonly=True) as store, pytest.raises(CorruptSession):
            store.messages()


@pytest.mark.model
def test_the_packaged_model_calls_the_tool_that_fits(tmp_path: Path) -> None:
    with AgentRuntime.open(tmp_path) as runtime:
        session = runtime.session("ops")
        session.append_system("You are helpful.", tools=[WEATHER, ADD])
        session.append_user("What is the weather in Paris?")
        reply = session.reply(tool_choice="any", parallel_calls=False, max_tokens=60)
        assert [call.name for call in reply.tool_calls] == ["get_weather"]
        assert reply.tool_calls[0].arguments["city"] == "Paris"
