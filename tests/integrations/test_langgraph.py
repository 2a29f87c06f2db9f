"""LangGraph's threads over sessions: deleting both, searching a thread's own history, and the examples."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from load_example import load_example

from infllm_agent.config import MemoryConfig
from infllm_agent.integrations.langchain import ChatInfLLM, SessionRunnable
from infllm_agent.integrations.langgraph import SessionRetriever, history_tool, tie_sessions
from infllm_agent.model.local_model import LocalModel
from infllm_agent.runtime import AgentRuntime

MEMORY = MemoryConfig(
    n_init=4, n_local=64, block_size=8, topk=4, candidates=8, chunk_size=64, question_chunk=8, max_cached_block=8
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tmp_path: Path, tiny_model: LocalModel) -> Iterator[Callable[..., ChatInfLLM]]:
    with AgentRuntime(tmp_path, tiny_model, MEMORY) as runtime:
        yield lambda **fields: ChatInfLLM(**{"runtime": runtime, "max_tokens": 6, **fields})


def of(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def names(llm: ChatInfLLM) -> list[str]:
    assert llm.runtime is not None
    return [info.name for info in llm.runtime.sessions()]


@pytest.mark.parametrize("way", ["delete_thread", "adelete_thread"])
def test_a_deleted_thread_takes_its_sessions_with_it(make, way):
    llm = make()
    checkpointer = tie_sessions(InMemorySaver(), llm)
    agent = create_agent(llm, checkpointer=checkpointer)
    for thread in ("ada", "ben"):
        agent.invoke({"messages": [HumanMessage("hello")]}, of(thread))
    llm.invoke("something else", session_id="ada")  # a branch
    assert names(llm) == ["ada", "ada.b2", "ben"]
    if way == "delete_thread":
        checkpointer.delete_thread("ada")
    else:
        asyncio.run(checkpointer.adelete_thread("ada"))
    assert names(llm) == ["ben"]
    assert agent.get_state(of("ada")).values == {}
    assert len(agent.get_state(of("ben")).values["messages"]) == 2
    checkpointer.delete_thread("nobody")  # as the checkpointer itself: no error


def test_a_thread_goes_on_in_its_session(make):
    llm = make()
    agent = create_agent(llm, checkpointer=InMemorySaver(), system_prompt="Be brief.")
    for question in ("hello", "and how are you?", "really?"):
        messages = agent.invoke({"messages": [HumanMessage(question)]}, of("ada"))["messages"]
    assert names(llm) == ["ada"]
    details = messages[-1].usage_metadata["input_token_details"]
    assert details["cache_read"] > details["cache_creation"]
    # Back in time: the graph goes on from an earlier checkpoint, and so does the memory.
    early = next(state for state in agent.get_state_history(of("ada")) if len(state.values.get("messages", [])) == 2)
    agent.invoke({"messages": [HumanMessage("what else?")]}, early.config)
    assert names(llm) == ["ada", "ada.b2"]


def test_agents_call_tools_and_read_what_they_return(make):
    llm = make(max_tokens=120)
    read = []

    @tool
    def read_log(host: str) -> str:
        """The latest lines of a host's log."""
        read.append(host)
        return "02:14 disk full"

    @wrap_model_call
    def three_calls(request, handler):
        called = sum(isinstance(message, ToolMessage) for message in request.messages)
        return handler(request.override(tool_choice="read_log" if called < 3 else "none"))

    agent = create_agent(llm, [read_log], middleware=[three_calls])
    messages = agent.invoke({"messages": [HumanMessage("Which host is down?")]}, of("ops"))["messages"]
    calls = [message for message in messages if isinstance(message, AIMessage) and message.tool_calls]
    assert [call.tool_calls[0]["args"]["host"] for call in calls] == read
    assert len(read) == 3
    assert names(llm) == ["ops"]
    before = 0  # tokens that had gone through the model when the answer before was done
    for answer in (message for message in messages if isinstance(message, AIMessage)):
        usage = answer.usage_metadata
        assert usage["input_token_details"]["cache_read"] >= before
        before = usage["input_tokens"]


def test_a_retriever_over_the_history(make):
    llm = make(max_tokens=1)
    llm.invoke([SystemMessage("Look after servers."), HumanMessage("db-3 says: disk full")], session_id="ops")
    SessionRunnable(llm=llm, session_id="ops").invoke(
        {"role": "tool", "name": "df", "text": "x" * 5000 + " disk at 100 % " + "y" * 5000}, reply=False
    )
    found = SessionRetriever(llm=llm, session_id="ops").invoke("disk")
    assert [document.metadata["role"] for document in found] == ["tool", "user"]
    assert found[1].page_content == "db-3 says: disk full"
    assert "disk at 100 %" in found[0].page_content
    assert len(found[0].page_content) <= 2000 + len("...  ...")
    assert datetime.fromisoformat(found[0].metadata["time"]).tzinfo is not None
    assert [d.metadata["name"] for d in SessionRetriever(llm=llm).invoke("disk", of("ops"))] == ["df", None]
    assert asyncio.run(SessionRetriever(llm=llm, k=1).ainvoke("DISK full", of("ops")))[0].metadata["message"] == 1
    assert SessionRetriever(llm=llm).invoke("disk", of("nobody")) == []
    soon = datetime.now(UTC) + timedelta(hours=1)
    assert SessionRetriever(llm=llm).invoke("disk", of("ops"), after=soon) == []
    assert len(SessionRetriever(llm=llm).invoke("disk", of("ops"), before=soon)) == 2


def test_reading_and_deleting_need_no_model(make, tmp_path):
    llm = make(max_tokens=1, session_id="ops")
    llm.invoke([HumanMessage("db-3 says: disk full")])
    root = llm.runtime.root
    llm.runtime.close()
    apart = ChatInfLLM(root=root, model="no such model", session_id="ops")
    assert [document.page_content for document in SessionRetriever(llm=apart).invoke("disk")] == [
        "db-3 says: disk full"
    ]
    assert apart.prune() == []
    assert apart.delete_session() == ["ops"]


def test_a_search_does_not_find_itself(make):
    llm = make(max_tokens=1)
    search = history_tool(llm)
    call = {"name": "search_history", "args": {"query": "window"}, "id": "call00001"}
    other = {"name": "open", "args": {"what": "window"}, "id": "call00002"}
    history = [HumanMessage("?"), AIMessage("", tool_calls=[call]), ToolMessage("No window.", tool_call_id="call00001")]
    history += [AIMessage("", tool_calls=[other]), ToolMessage("done", tool_call_id="call00002"), HumanMessage("!")]
    llm.invoke(history, session_id="ops")
    said = search.invoke({"query": '"window"'}, of("ops"))
    assert '"name": "open"' in said
    assert "search_history" not in said


def test_an_agent_searches_its_own_history(make):
    llm = make(max_tokens=1)
    search = history_tool(llm)
    llm.invoke([HumanMessage("The code of the door is 7712.")], session_id="ops")
    SessionRunnable(llm=llm, session_id="ops").invoke("What was the code of the door?", reply=False)
    said = search.invoke({"query": "code door"}, of("ops"))
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00, user\]\nThe code of the door is 7712\.", said)
    assert search.invoke({"query": "window"}, of("ops")) == "No earlier message has all the words of 'window'."
    assert "is no time" in search.invoke({"query": "door", "after": "yesterday"}, of("ops"))
    assert set(search.args) == {"query", "after", "before"}


# -- the examples, as a user runs them ---------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path, tiny_model_folder: Path) -> list[str]:
    return ["--root", str(tmp_path / "sessions"), "--model", str(tiny_model_folder)]


def test_example_agent(arguments, capsys):
    load_example("agent").main([*arguments, "--max-tokens", "64"])
    printed = capsys.readouterr().out
    assert printed.count("> ") == 2
    assert len(re.findall(r"^  (read_log|search_history)\(\{.*\[\d+ tokens kept, \d+ new\]$", printed, re.M)) == 2
    assert len(re.findall(r"^  (read_log|search_history): ", printed, re.M)) == 2


def test_example_days(arguments, capsys):
    module = load_example("days")
    few = [*arguments, "--max-tokens", "4"]
    module.main(["My name is Ada, and I look after db-3.", *few])
    module.main(["What is my name?", *few])
    first, second = re.findall(r"\[(\d+) tokens kept, (\d+) new\]", capsys.readouterr().out)
    assert first[0] == "0"
    assert int(second[0]) > int(first[1])
    module.main(["--forget", "What is my name?", *few])
    assert "[0 tokens kept" in capsys.readouterr().out


def test_example_observer(arguments, tmp_path, capsys):
    log = tmp_path / "server.log"
    log.write_text("".join(f"02:{minute:02} request served\n" for minute in range(30)))
    module = load_example("observer")
    module.main([str(log), "--every", "10", "--max-tokens", "4", *arguments])
    counts = [int(count) for count in re.findall(r"^(\d+) tokens so far", capsys.readouterr().out, re.M)]
    assert len(counts) == 3
    assert counts == sorted(counts)
    half = iter(["02:31 half", " a line\n", ""])

    class Growing:
        def readline(self) -> str:
            return next(half)

    lines = module.lines_of(Growing(), follow=True)
    assert next(lines) == "02:31 half a line\n"


def test_example_extraction(arguments, capsys):
    load_example("extraction").main([*arguments, "--max-tokens", "256"])
    assert re.search(
        r"Incident\(host='(db-3|web-1)', cause=.*, severity='(low|medium|high)', minutes=\d+\)",
        capsys.readouterr().out,
        re.S,
    )
