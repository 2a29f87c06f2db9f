"""ChatInfLLM and SessionRunnable: whole histories and single events over sessions that last."""

from __future__ import annotations

import asyncio
import copy
import errno
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.load import dumps, loads
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda
from load_example import load_example
from pydantic import ValidationError

from infllm_agent import errors
from infllm_agent.config import MemoryConfig, default_root
from infllm_agent.errors import ConfigError, SessionBusy, StorageError
from infllm_agent.integrations.langchain import ChatInfLLM, SessionFull, SessionRunnable
from infllm_agent.model.local_model import LocalModel
from infllm_agent.runtime import AgentRuntime
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.tools import ToolCall

MEMORY = MemoryConfig(n_init=8, n_local=64, block_size=16, repr_topk=2, topk=2, chunk_size=32, max_cached_block=4)
#: So large that short histories are attended to in full, however they were cut into chunks.
WIDE = MemoryConfig(n_init=8, n_local=1024, block_size=16, repr_topk=2, topk=2, chunk_size=256, max_cached_block=4)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tmp_path: Path, tiny_model: LocalModel) -> Iterator[Callable[..., ChatInfLLM]]:
    """Makes chat models over one runtime with an empty root."""
    with AgentRuntime(tmp_path, tiny_model, MEMORY) as runtime:
        yield lambda **fields: ChatInfLLM(**{"runtime": runtime, "max_tokens": 4, **fields})


def reopened(llm: ChatInfLLM, **fields: Any) -> ChatInfLLM:
    """The chat model as another process would make it, once this one is done."""
    assert llm.runtime is not None
    llm.runtime.close()
    runtime = AgentRuntime(llm.runtime.root, llm.runtime.model, llm.runtime.memory)
    return ChatInfLLM(runtime=runtime, max_tokens=llm.max_tokens, **{"session_id": llm.session_id, **fields})


def converse(llm: ChatInfLLM, questions: list[str], messages: list[BaseMessage] | None = None, **kwargs: Any) -> Any:
    """Ask one question after the other, the list growing; the list and the answers."""
    messages, answers = list(messages or []), []
    for question in questions:
        messages.append(HumanMessage(question))
        answers.append(llm.invoke(messages, **kwargs))
        messages.append(answers[-1])
    return messages, answers


def stored(llm: ChatInfLLM, name: str) -> list[tuple[str, str]]:
    assert llm.runtime is not None
    return [(message.role, message.text) for message in llm.runtime.session(name).messages()]


def session_names(llm: ChatInfLLM) -> list[str]:
    assert llm.runtime is not None
    return [info.name for info in llm.runtime.sessions()]


def details(message: AIMessage) -> tuple[int, int]:
    """Tokens re-used, tokens newly computed."""
    assert message.usage_metadata is not None
    counts = message.usage_metadata["input_token_details"]
    assert counts["cache_read"] + counts["cache_creation"] == message.usage_metadata["input_tokens"]
    return counts["cache_read"], counts["cache_creation"]


# -- whole histories ---------------------------------------------------------------------------------------------------


def test_only_what_is_new_is_computed(make):
    llm = make(session_id="grow")
    messages: list[BaseMessage] = [SystemMessage("Answer the questions about the log. " * 10)]
    for turn in range(6):
        question = HumanMessage(f"question {turn}")
        messages.append(question)
        answer = llm.invoke(messages)
        kept, new = details(answer)
        assert answer.response_metadata["session_id"] == "grow"
        if turn:
            assert kept > 100
            assert new <= llm.get_num_tokens_from_messages([question]) + 4  # the end of the answer before it
        messages.append(answer)
    assert stored(llm, "grow") == [(m["role"], m["text"]) for m in map(as_stored, messages)]


def as_stored(message: BaseMessage) -> dict[str, str]:
    roles = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool"}
    return {"role": roles[message.type], "text": str(message.text)}


def test_warm_and_cold_answers_are_the_same(tmp_path, tiny_model):
    llm = ChatInfLLM(runtime=AgentRuntime(tmp_path, tiny_model, WIDE), max_tokens=6)
    messages, answers = converse(llm, ["what is it", "and then", "why", "who"], session_id="warm")
    cold = llm.invoke(messages[:-1], session_id="cold")
    # Bytes that are no text, which a random model may say, would be read again as other tokens than were said.
    asked = llm.get_num_tokens_from_messages(messages[:-1])
    warm_ids, cold_ids = (llm.runtime.session(name).token_ids() for name in ("warm", "cold"))
    assert warm_ids[:asked] == cold_ids[:asked], "choose questions whose answers are proper text"
    assert cold.text == answers[-1].text
    assert details(cold)[0] == 0
    assert details(answers[-1])[0] > 0
    assert cold.usage_metadata["input_tokens"] == llm.get_num_tokens_from_messages(messages[:-1])


def test_a_diverging_history_leaves_the_main_line_alone(make):
    llm = make(session_id="main")
    messages, _ = converse(llm, ["one", "two"])
    before = stored(llm, "main")
    edited = [HumanMessage("one, edited"), *messages[1:3]]
    assert llm.invoke(edited).response_metadata["session_id"] == "main.b2"
    assert stored(llm, "main") == before
    # Each line goes on by itself.
    on_main = llm.invoke([*messages, HumanMessage("three")])
    assert on_main.response_metadata["session_id"] == "main"
    assert details(on_main)[0] > 0
    assert session_names(llm) == ["main", "main.b2"]


def test_a_restart_goes_on_where_it_was(make):
    llm = make(session_id="days")
    messages, answers = converse(llm, ["one", "two"])
    llm.invoke([HumanMessage("a branch")])
    again = reopened(llm)
    _, (answer,) = converse(again, ["three"], messages)
    assert answer.response_metadata["session_id"] == "days"
    assert details(answer)[0] >= answers[-1].usage_metadata["total_tokens"] - 1
    assert details(answer)[1] < details(answer)[0]


def test_a_catalogue_that_is_behind_misleads_nobody(make, monkeypatch):
    llm = make(session_id="s")
    messages, _ = converse(llm, ["one"])
    monkeypatch.setattr(Catalog, "record", lambda *_: None)
    messages, _ = converse(llm, ["two"], messages)
    on_main = llm.invoke([*messages, HumanMessage("three")])
    branched = llm.invoke([*messages[:2], HumanMessage("two, edited")])
    assert on_main.response_metadata["session_id"] == "s"
    assert branched.response_metadata["session_id"] == "s.b2"


def test_answers_match_when_frameworks_have_labelled_them(make):
    llm = make(session_id="s")
    messages, _ = converse(llm, ["one"])
    labelled = AIMessage([{"type": "text", "text": messages[-1].text}], name="the agent", id="another")
    assert llm.invoke([messages[0], labelled, HumanMessage("two")]).response_metadata["session_id"] == "s"


def test_tool_results_observations_and_calls_are_stored(make):
    llm = make(session_id="tools")
    call = {"name": "lookup", "args": {"host": "db-3"}, "id": "call-1"}
    llm.invoke(
        [
            HumanMessage(["What is ", {"type": "text", "text": "wrong?"}]),
            AIMessage("Let me see.", tool_calls=[call]),
            ToolMessage("disk full", tool_call_id="call-1", name="lookup"),
            ChatMessage(content="it is night", role="observation", name="clock"),
        ]
    )
    history = llm.runtime.session("tools").messages()
    assert [(m.role, m.name, m.call_id) for m in history[:4]] == [
        ("user", None, None),
        ("assistant", None, None),
        ("tool", "lookup", "call-1"),
        ("observation", "clock", None),
    ]
    assert history[0].text == "What is wrong?"
    assert history[1].text == "Let me see."
    assert history[1].calls == (ToolCall("lookup", {"host": "db-3"}, "call-1"),)


def test_anonymous_calls_keep_to_themselves(make):
    first, second = make(), make()
    messages, _ = converse(first, ["one"])
    assert details(first.invoke([*messages, HumanMessage("two")]))[0] > 0
    assert details(second.invoke([*messages, HumanMessage("two")]))[0] == 0
    assert all(name.startswith("chat-") for name in session_names(first))


# -- which session -----------------------------------------------------------------------------------------------------


def test_session_id_from_each_place_in_order(make):
    llm = make(session_id="from-constructor")
    configurable = {"session_id": "from-config", "thread_id": "from-thread"}

    def name(*args: Any, **kwargs: Any) -> str:
        return llm.invoke("hi", *args, **kwargs).response_metadata["session_id"]

    assert name({"configurable": configurable}, session_id="from-call") == "from-call"
    assert name({"configurable": configurable}) == "from-config"
    assert name({"configurable": {"thread_id": "from-thread"}}) == "from-thread"
    assert name() == "from-constructor"


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "v3", "batch"])
def test_session_id_reaches_every_way_to_call(make, way):
    llm, config = make(), {"configurable": {"thread_id": "t"}}

    async def collect() -> None:
        async for _ in llm.astream("hi", config):
            pass

    if way == "invoke":
        llm.invoke("hi", config)
    elif way == "ainvoke":
        asyncio.run(llm.ainvoke("hi", config))
    elif way == "stream":
        list(llm.stream("hi", config))
    elif way == "astream":
        asyncio.run(collect())
    elif way == "v3":
        assert llm.stream_events("hi", config, version="v3").output.text is not None
    else:
        llm.batch(["hi"], config)
    assert session_names(llm) == ["t"]


def test_inside_a_node_the_config_is_found(make):
    llm = make()
    node = RunnableLambda(lambda text: llm.invoke(text))

    async def anode(text: str) -> AIMessage:
        return await llm.ainvoke(text)

    config: RunnableConfig = {"configurable": {"thread_id": "graph"}}
    assert node.invoke("hi", config).response_metadata["session_id"] == "graph"
    answer = asyncio.run(RunnableLambda(anode).ainvoke("hello", {"configurable": {"thread_id": "agraph"}}))
    assert answer.response_metadata["session_id"] == "agraph"


# -- streams -----------------------------------------------------------------------------------------------------------


class Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.texts.append(token)


def test_a_stream_says_what_invoke_says(make):
    tokens = Tokens()
    whole = make(session_id="a", max_tokens=12).invoke("hello")
    chunks = list(make(session_id="b", max_tokens=12).stream("hello", {"callbacks": [tokens]}))
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tokens.texts == [chunk.text for chunk in chunks]
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata] == [whole.usage_metadata]
    assert [chunk.chunk_position for chunk in chunks].index("last") == len(chunks) - 1
    assert whole.response_metadata["model_name"] == chunks[-1].response_metadata["model_name"]
    assert whole.response_metadata["finish_reason"] in ("stop", "length")


def test_stop(make):
    text = make(session_id="a", max_tokens=12).invoke("hello").text
    stop = text[4:6]
    expected = text[: text.index(stop)]
    by_call = make(session_id="b", max_tokens=12).invoke("hello", stop=[stop])
    by_constructor = make(session_id="c", max_tokens=12, stop=[stop]).invoke("hello")
    assert by_call.text == by_constructor.text == expected
    assert by_call.response_metadata["finish_reason"] == "stop"
    # What the stream holds back because it may be a stop sequence is the same text in the end.
    assert "".join(c.text for c in make(session_id="d", max_tokens=12).stream("hello", stop=[stop])) == expected


def test_astream_leaves_the_event_loop_free(make, monkeypatch):
    llm = make(session_id="s")
    go_on = threading.Event()
    forward = LocalModel.forward

    def waiting(*args: Any, **kwargs: Any) -> Any:
        assert go_on.wait(20), "the event loop was blocked by the model"
        return forward(*args, **kwargs)

    monkeypatch.setattr(LocalModel, "forward", waiting)

    async def main() -> list[AIMessageChunk]:
        async def collect() -> list[AIMessageChunk]:
            return [chunk async for chunk in llm.astream("hello")]

        task = asyncio.create_task(collect())
        await asyncio.sleep(0.1)
        go_on.set()
        return await task

    chunks = asyncio.run(main())
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_a_left_async_stream_leaves_the_session_as_it_was(make, how):
    llm = make(session_id="s")
    messages, _ = converse(llm, ["one"])
    before, ids = stored(llm, "s"), llm.runtime.session("s").token_ids()
    question = [*messages, HumanMessage("two")]

    async def close() -> None:
        async with aclosing(llm.astream(question, max_tokens=100_000)) as chunks:
            async for _ in chunks:
                break

    async def cancel() -> None:
        task = asyncio.create_task(llm.ainvoke(question, max_tokens=100_000))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(close() if how == "closed" else cancel())
    answer = llm.invoke(question)  # queues until the other has let go
    assert answer.response_metadata["session_id"] == "s"
    assert stored(llm, "s")[: len(before) + 1] == [*before, ("user", "two")]
    assert llm.runtime.session("s").token_ids()[: len(ids)] == ids
    assert session_names(llm) == ["s"]


def test_a_left_stream_leaves_the_session_as_it_was(make):
    llm = make(session_id="s", max_tokens=50)
    messages, _ = converse(llm, ["one"])
    before = stored(llm, "s")
    with closing(llm.stream([*messages, HumanMessage("two")])) as chunks:
        next(chunks)
    assert stored(llm, "s") == before


def test_a_failed_call_leaves_the_session_as_it_was(make, monkeypatch):
    llm = make(session_id="s")
    messages, _ = converse(llm, ["one"])
    before, count = stored(llm, "s"), 0
    forward = LocalModel.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if (count := count + 1) > 3:
            raise MemoryError("no memory left")
        return forward(*args, **kwargs)

    monkeypatch.setattr(LocalModel, "forward", failing)
    with pytest.raises(MemoryError):
        llm.invoke([*messages, HumanMessage("two")])
    with pytest.raises(MemoryError):
        asyncio.run(llm.ainvoke([*messages, HumanMessage("two")]))
    monkeypatch.undo()
    assert stored(llm, "s") == before
    assert llm.invoke([*messages, HumanMessage("two")]).response_metadata["session_id"] == "s"


def test_a_timeout_is_an_error_and_leaves_the_session_as_it_was(make):
    llm = make(session_id="s")
    messages, _ = converse(llm, ["one"])
    before = stored(llm, "s")
    with pytest.raises(TimeoutError, match="within timeout"):
        make(session_id="s", timeout=0.1, max_tokens=100_000).invoke([*messages, HumanMessage("two")])
    assert stored(llm, "s") == before


def test_what_others_appended_survives_a_failure(make, monkeypatch):
    llm = make(session_id="s")
    llm.runtime.session("s").append_user("from elsewhere")
    monkeypatch.setattr(LocalModel, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.invoke([HumanMessage("from elsewhere"), HumanMessage("hi")])
    assert stored(llm, "s") == [("user", "from elsewhere")]


# -- at once -----------------------------------------------------------------------------------------------------------


def test_threads_with_sessions_of_their_own(make):
    llm = make()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: converse(llm, ["a", "b", "c"], session_id=f"s{n}"), range(4)))
    for number, (messages, answers) in enumerate(results):
        assert stored(llm, f"s{number}") == [tuple(as_stored(m).values()) for m in messages]
        assert all(details(answer)[0] for answer in answers[1:])
    assert session_names(llm) == ["s0", "s1", "s2", "s3"]


def test_threads_on_one_session_queue_and_branch(make):
    llm = make(session_id="s")
    messages, _ = converse(llm, ["one"])
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: llm.invoke([*messages, HumanMessage(f"then {n}")]), range(4)))
    names = [answer.response_metadata["session_id"] for answer in answers]
    assert sorted(names) == ["s", "s.b2", "s.b3", "s.b4"]
    for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
        assert stored(llm, name)[2:] == [("user", f"then {number}"), ("assistant", answer.text)]


def test_streams_taken_in_turns_by_one_thread(make):
    llm = make()
    pairs = list(zip(llm.stream("one"), llm.stream("two"), strict=False))
    assert len(pairs) > 2


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty"),
        ([HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}])], "image"),
        ([FunctionMessage(content="x", name="f")], "FunctionMessage"),
        ([ChatMessage(content="x", role="narrator")], "narrator"),
    ],
)
def test_messages_that_no_session_can_hold(make, messages, said):
    llm = make(session_id="s")
    with pytest.raises(ValueError, match=said):
        llm.invoke(messages)
    assert session_names(llm) == []


def test_arguments_that_cannot_work(make):
    llm = make()
    with pytest.raises(ConfigError, match="temprature"):
        llm.invoke("hi", temprature=1)
    with pytest.raises(ValueError, match="another model"):
        llm.invoke("hi", model="gpt-5")
    with pytest.raises(ConfigError, match="temperature"):
        llm.invoke("hi", temperature=-1)
    for fields in ({"temperature": -1}, {"sesion_id": "x"}, {"stop": [""]}, {"root": "/tmp"}):
        with pytest.raises(ValidationError):
            make(**fields)


@pytest.mark.parametrize("thread_id", ["ada@example.com", "../x", "user/1", "\u00e4", "x" * 200, "ops.b2", "-"])
def test_threads_of_any_name(make, thread_id):
    """LangGraph's thread ids are any text; a session's name is made of them."""
    llm = make()
    messages, _ = converse(llm, ["one", "two"], session_id=thread_id)
    llm.invoke([*messages[:2], HumanMessage("three")], session_id=thread_id)
    name = llm.latest_line(thread_id)
    assert session_names(llm) == [name.removesuffix(".b2"), name]
    assert llm.latest_line("ops") is None
    assert len(llm.delete_session(thread_id)) == 2


def test_a_call_may_leave_settings_to_the_object(make):
    llm = make(timeout=60)
    assert llm.invoke("hi", max_tokens=None, temperature=None).usage_metadata["output_tokens"] <= 4
    with pytest.raises(TimeoutError):
        llm.invoke("hi", timeout=1e-9)


def test_a_full_disk_is_a_context_overflow(make, monkeypatch):
    llm = make(session_id="full")
    messages, _ = converse(llm, ["one"])

    def full(*arguments: Any, **more: Any) -> int:
        raise StorageError("session.db: no space left on device") from OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SessionStore, "commit", full)
        said = r'session "full" of \d+ tokens cannot grow: .*no space'
        with pytest.raises(ContextOverflowError, match=said) as raised:
            llm.invoke([*messages, HumanMessage("two")])
        assert isinstance(raised.value, errors.SessionFull)
        assert isinstance(raised.value, SessionFull)
    assert llm.invoke([*messages, HumanMessage("two")]).response_metadata["session_id"] == "full"


# -- as a LangChain object ---------------------------------------------------------------------------------------------


def test_serialised_without_its_runtime(make):
    llm = make(session_id="s", temperature=0.5, seed=1)
    text = dumps(llm)
    assert "not_implemented" not in text
    again = loads(text, valid_namespaces=["infllm_agent"], allowed_objects=[ChatInfLLM])
    assert again.model_dump() == llm.model_dump()
    assert again.memory == MEMORY
    assert again.runtime is None


def test_copies_pickles_and_configurable_fields(make, tmp_path, tiny_model_folder, monkeypatch):
    llm = ChatInfLLM(root=tmp_path / "own", model=str(tiny_model_folder), max_tokens=2)
    first = llm.invoke("hi")
    loads_of_model = []
    monkeypatch.setattr(LocalModel, "load", lambda *arguments, **more: loads_of_model.append(arguments))
    for copied in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
        assert copied.invoke("hi").text == first.text
    other = llm.configurable_fields(max_tokens=ConfigurableField("limit"))
    answers = [other.invoke("hi", {"configurable": {"limit": limit}}) for limit in (1, 3)]
    assert [answer.usage_metadata["output_tokens"] for answer in answers] == [1, 3]
    assert loads_of_model == []
    given = make().configurable_fields(temperature=ConfigurableField("heat"))
    assert given.invoke("hi", {"configurable": {"heat": 0.5}})
    llm.close()
    assert list(Catalog(tmp_path / "own").list()) == []  # nobody could name the anonymous session


def test_an_object_that_closes_waits_for_the_calls_of_others(tmp_path, tiny_model_folder):
    one, other = (ChatInfLLM(root=tmp_path, model=str(tiny_model_folder), session_id="s", max_tokens=30) for _ in "ab")
    with ThreadPoolExecutor(1) as pool:
        with closing(one.stream("hi")) as stream:  # type: ignore[type-var]
            next(stream)
            closed = pool.submit(other.close)
            pieces = list(stream)
        closed.result(timeout=30)
    assert pieces[-1].response_metadata["finish_reason"]
    one.close()


def test_the_root_is_the_users_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("INFLLM_ROOT", str(tmp_path))
    assert ChatInfLLM().root == str(default_root()) == str(tmp_path)
    monkeypatch.delenv("INFLLM_ROOT")
    assert Path(ChatInfLLM().root) == Path(os.path.expanduser("~/.local/share/infllm-agent"))
    assert ChatInfLLM(root=tmp_path / "x", api_key="none", max_retries=2).root == str(tmp_path / "x")  # type: ignore[call-arg]


def test_equal_chat_models_share_what_they_load(tmp_path, tiny_model_folder):
    first = ChatInfLLM(model=str(tiny_model_folder), root=tmp_path, session_id="s", max_tokens=2)
    messages, _ = converse(first, ["one"])
    second = ChatInfLLM(model=str(tiny_model_folder), root=tmp_path, session_id="s", max_tokens=2)
    messages, (answer,) = converse(second, ["two"], messages)  # no SessionLocked: it is one runtime
    assert details(answer)[0] > 0
    second.close()
    _, (answer,) = converse(first, ["three"], messages)
    assert details(answer)[0] > 0
    first.close()


# -- events ------------------------------------------------------------------------------------------------------------


def test_events_go_in_and_answers_come_out(make):
    ops = SessionRunnable(llm=make(), session_id="ops")
    quiet = ops.invoke({"role": "observation", "name": "pager", "text": "disk full on db-3"}, reply=False)
    assert quiet.text == ""
    assert quiet.usage_metadata is None
    ops.invoke(
        [ToolMessage("ok", tool_call_id="1", name="df"), {"role": "system", "content": "Be brief."}], reply=False
    )
    answer = ops.invoke("What happened?", max_tokens=3)
    assert isinstance(answer, AIMessage)
    assert not isinstance(answer, AIMessageChunk)
    assert answer.usage_metadata["output_tokens"] <= 3
    assert [role for role, _ in stored(ops.llm, "ops")] == ["observation", "tool", "system", "user", "assistant"]
    kept, new = details(ops.invoke("And then?"))
    assert kept > new


def test_events_stream(make):
    llm = make()
    ops = SessionRunnable(llm=llm)
    whole = ops.invoke("hello", session_id="a")

    async def collect() -> list[AIMessage]:
        return [chunk async for chunk in ops.astream("hello", {"configurable": {"thread_id": "c"}})]

    streams = [list(ops.stream("hello", {"configurable": {"session_id": "b"}})), asyncio.run(collect())]
    for chunks in streams:
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1
    assert asyncio.run(ops.ainvoke("hello", session_id="d")).text == whole.text
    assert session_names(llm) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="which session"):
        ops.invoke("hello")


def test_events_after_a_prompt_and_in_a_node(make):
    ops = SessionRunnable(llm=make(), session_id="ops")
    chain = ChatPromptTemplate.from_messages([("human", "Look at {host}.")]) | ops
    chain.invoke({"host": "db-3"})
    RunnableLambda(lambda text: ops.invoke(text)).invoke("hi", {"configurable": {"thread_id": "node"}})  # type: ignore[arg-type]
    assert stored(ops.llm, "ops")[0] == ("user", "Look at db-3.")
    assert stored(ops.llm, "node")[0] == ("user", "hi")


def test_events_and_histories_may_share_a_session(make):
    llm = make(session_id="s")
    messages, _ = converse(llm, ["one"])
    SessionRunnable(llm=llm, session_id="s").invoke("two")
    history = [AIMessage(text) if role == "assistant" else HumanMessage(text) for role, text in stored(llm, "s")]
    assert history[: len(messages)] == [type(m)(m.text) for m in messages]
    answer = llm.invoke([*history, HumanMessage("three")])
    assert answer.response_metadata["session_id"] == "s"
    assert details(answer)[0] > 0


def test_a_failed_event_is_taken_back(make, monkeypatch):
    ops = SessionRunnable(llm=make(), session_id="ops")
    ops.invoke("one")
    before = stored(ops.llm, "ops")
    monkeypatch.setattr(LocalModel, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ops.invoke("two")
    assert stored(ops.llm, "ops") == before


def test_one_thread_cannot_wait_for_itself(make):
    ops = SessionRunnable(llm=make(), session_id="ops")
    with closing(ops.stream("one")) as chunks:  # type: ignore[type-var]
        next(chunks)
        with pytest.raises(SessionBusy, match="this thread"):
            ops.invoke("two")


@pytest.mark.parametrize(
    "event",
    [
        {"role": "narrator", "text": "x"},
        {"role": "user"},
        {"role": "user", "text": "x", "content": "y"},
        {"role": "user", "text": "x", "nmae": "y"},
        {"role": "user", "text": 3},
        7,
        ["x", None],
    ],
)
def test_events_that_are_none(make, event):
    with pytest.raises(ValueError, match="event"):
        SessionRunnable(llm=make(), session_id="s").invoke(event)


# -- the packaged model ------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_packaged_model_end_to_end(tmp_path, smollm2_path):
    llm = ChatInfLLM(root=tmp_path, session_id="talk", dtype="float32", max_tokens=6)
    system: list[BaseMessage] = [SystemMessage("Answer in one word.")]
    messages, answers = converse(llm, ["The capital of France?", "And of Italy?"], system)
    assert "Paris" in answers[0].text
    assert details(answers[1])[1] < details(answers[0])[1]
    cold = llm.invoke(messages[:-1], session_id="cold", max_tokens=3)
    assert cold.text
    assert answers[1].text.startswith(cold.text)
    llm.close()

    again = ChatInfLLM(root=tmp_path, session_id="talk", dtype="float32", max_tokens=2)
    _, (answer,) = converse(again, ["And of Spain?"], messages)
    assert details(answer)[0] > details(answer)[1] > 0
    again.close()


def test_the_example(tmp_path, tiny_model_folder, capsys):
    example = load_example("langchain_chat")
    arguments = ["--root", str(tmp_path), "--model", str(tiny_model_folder), "--max-tokens", "4"]
    example.main(arguments)
    first = capsys.readouterr().out
    example.main(arguments)
    assert "[0 tokens kept" in first
    assert "> Which machine needs attention?" in first
