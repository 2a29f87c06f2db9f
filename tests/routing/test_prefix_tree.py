"""Branches of a LangChain history: each answers as a cold session would, shares what it can, and disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage

from infllm_agent.config import MemoryConfig, RuntimeConfig
from infllm_agent.integrations.langchain import ChatInfLLM, DivergedHistory
from infllm_agent.messages import Turn
from infllm_agent.model.local_model import LocalModel
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.prefix_tree import PrefixTree, beginnings
from infllm_agent.routing.session_pool import pool_of
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session

#: So small that most of a short history is in blocks.
MEMORY = MemoryConfig(
    n_init=4, n_local=16, block_size=4, topk=4, candidates=8, chunk_size=16, question_chunk=4, max_cached_block=8
)
#: So large that a short history is attended to in full, however it was cut into chunks.
WIDE = MemoryConfig(n_init=8, n_local=2048, block_size=16, topk=2, candidates=4, chunk_size=256, max_cached_block=4)
PAPER = {"n_init": 4, "n_local": 16, "block_size": 8, "topk": 2, "chunk_size": 16, "max_cached_block": 4}
TALK = ["Which host is down?", "Since when?", "Who has been told?"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["blocks", "window"])
def make(request: Any, tmp_path: Path, tiny_model: LocalModel) -> Iterator[Callable[..., ChatInfLLM]]:
    """Makes chat models over one runtime; its memory puts most of the history into blocks, or keeps it all near."""
    memory = MEMORY if request.param == "blocks" else WIDE
    with AgentRuntime(tmp_path, tiny_model, memory) as runtime:
        yield lambda **fields: ChatInfLLM(**{"runtime": runtime, "max_tokens": 6, "session_id": "main", **fields})


def converse(llm: ChatInfLLM, questions: list[str]) -> list[BaseMessage]:
    messages: list[BaseMessage] = [SystemMessage("You look after servers.")]
    for question in questions:
        messages.append(HumanMessage(question))
        messages.append(llm.invoke(messages))
    return messages


def session_of(llm: ChatInfLLM, answer: AIMessage) -> Session:
    assert llm.runtime is not None
    return llm.runtime.session(answer.response_metadata["session_id"])


def kept(answer: AIMessage) -> int:
    assert answer.usage_metadata is not None
    return answer.usage_metadata["input_token_details"]["cache_read"]


def check(llm: ChatInfLLM, messages: list[BaseMessage], answer: AIMessage) -> bool:
    """The answer is that of a cold session: by the same chunks in any memory, by any chunks where all is near.

    Returns:
        Whether a cold session was asked, and had read the same tokens: what a model wrote itself, in pieces of its own
        choice, may be other tokens when it is read.
    """
    session = session_of(llm, answer)
    assert session.messages(-1)[0].text == answer.text
    ids, memory = session.token_ids(), session.model.new_memory(session.config)
    last = session.messages(-1)[0]
    first = last.start + len(session.chat.generation_prompt())
    for start, length in session.chunks():
        logits = session.model.forward(ids[start : start + length], memory)
        if first <= start + length < first + answer.usage_metadata["output_tokens"]:
            assert int(logits.argmax()) == ids[start + length]
    if session.config != WIDE:
        return False
    cold = llm.model_copy(update={"session_id": f"cold-{len(llm.runtime.sessions())}"}).invoke(messages)
    assert kept(cold) == 0
    if session_of(llm, cold).token_ids()[:first] != ids[:first]:
        return False
    assert (cold.text, cold.tool_calls) == (answer.text, answer.tool_calls)
    return True


def main_line(llm: ChatInfLLM) -> tuple[list[Any], list[int], list[tuple[int, int]]]:
    session = llm.runtime.session("main")
    return session.messages(), session.token_ids(), session.chunks()


def test_an_edit_shares_what_came_before_it(make):
    llm = make()
    messages = converse(llm, TALK)
    before = main_line(llm)
    edited = [*messages[:5], HumanMessage("Who must be told?")]
    answer = llm.invoke(edited)
    assert answer.response_metadata["session_id"] == "main.b2"
    assert kept(answer) > 0.6 * answer.usage_metadata["input_tokens"]
    check(llm, edited, answer)
    assert main_line(llm) == before
    more = [*messages, HumanMessage("And now?")]  # the main line goes on
    answer = llm.invoke(more)
    assert answer.response_metadata["session_id"] == "main"
    check(llm, more, answer)


def test_an_edit_of_a_history_that_others_wrote(make):
    llm = make()
    messages = [HumanMessage(TALK[0]), AIMessage("db-3 is."), HumanMessage(TALK[1]), AIMessage("Since two.")]
    llm.invoke([*messages, HumanMessage(TALK[2])])
    edited = [*messages, HumanMessage("Who must be told?")]
    answer = llm.invoke(edited)
    assert answer.response_metadata["session_id"] == "main.b2"
    assert kept(answer) > 0
    assert check(llm, edited, answer) == (llm.memory == WIDE)


@pytest.mark.model
def test_branches_of_the_packaged_model(tmp_path, smollm2_path):
    llm = ChatInfLLM(root=tmp_path, session_id="main", dtype="float32", max_tokens=8, memory=WIDE)
    llm.runtime = llm.opened()
    messages = converse(llm, ["What is the capital of France?", "And of Italy?"])
    for question in ("And of Spain?", "And of Poland?"):
        edited = [*messages[:3], HumanMessage(question)]
        answer = llm.invoke(edited)
        assert kept(answer) > 20
        assert check(llm, edited, answer)
    llm.close()


def test_time_travel_to_each_message(make):
    llm = make()
    messages = converse(llm, TALK)
    before = main_line(llm)
    for number in (2, 4, 6):  # ask again what was asked there
        again = messages[:number]
        answer = llm.invoke(again)
        assert answer.text == messages[number].text
        assert answer.response_metadata["session_id"] != "main"
        check(llm, again, answer)
    assert main_line(llm) == before


def test_a_branch_of_a_branch(make):
    llm = make()
    messages = converse(llm, TALK)
    first = [*messages[:5], HumanMessage("Who must be told?")]
    first.append(llm.invoke(first))
    second = [*first, HumanMessage("How?")]
    second.append(llm.invoke(second))
    assert second[-1].response_metadata["session_id"] == "main.b2"
    third = [*first, HumanMessage("By whom?")]
    answer = llm.invoke(third)
    assert answer.response_metadata["session_id"] == "main.b3"
    check(llm, third, answer)


def test_a_summary_on_the_side(make):
    """What a summariser asks has nothing in common with the thread it is called in."""
    llm = make()
    messages = converse(llm, TALK)
    before = main_line(llm)
    side: list[BaseMessage] = [HumanMessage("Summarise: " + " ".join(message.text for message in messages))]
    check(llm, side, llm.invoke(side))
    assert main_line(llm) == before
    follow_up = [*messages, HumanMessage("And now?")]
    assert llm.invoke(follow_up).response_metadata["session_id"] == "main"


def test_eight_threads_of_one_session(make):
    llm = make(max_tokens=3)
    messages = converse(llm, TALK[:1])
    before = main_line(llm)
    questions = [[*messages[:2], HumanMessage(f"Again, number {number}")] for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(llm.invoke, questions))
    names = {answer.response_metadata["session_id"] for answer in answers}
    assert len(names) == 8
    assert "main" not in names
    for question, answer in zip(questions, answers, strict=True):
        check(llm, question, answer)
    assert main_line(llm) == before


def test_a_branch_while_its_main_line_answers(make):
    llm = make(max_tokens=12)
    messages = converse(llm, TALK[:2])
    with closing(llm.stream([*messages, HumanMessage("And now?")])) as stream:
        next(stream)
        edited = [*messages[:3], HumanMessage("Until when?")]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(llm.invoke, edited).result(timeout=60)
        assert answer.response_metadata["session_id"] == "main.b2"
        rest = list(stream)
    assert rest[-1].response_metadata["session_id"] == "main"
    check(llm, edited, answer)


def test_a_cancelled_stream_leaves_its_line_as_it_was(make):
    llm = make(max_tokens=40)
    messages = converse(llm, TALK[:2])
    before = main_line(llm)
    more = [*messages, HumanMessage("And now?")]
    with closing(llm.stream(more)) as stream:
        next(stream)
    assert main_line(llm) == before
    answer = llm.invoke(more)
    assert answer.response_metadata["session_id"] == "main"
    check(llm, more, answer)


def test_a_failed_tool(make):
    llm = make()
    messages = converse(llm, TALK[:1])
    call = {"name": "page", "args": {"who": "Ada"}, "id": "call00001"}
    called = [*messages, HumanMessage("Page Ada."), AIMessage("", tool_calls=[call])]
    failed = [*called, ToolMessage("Error: no such number", tool_call_id="call00001", status="error")]
    check(llm, failed, llm.invoke(failed))
    before = main_line(llm)
    mended = [*called, ToolMessage("Paged.", tool_call_id="call00001")]
    answer = llm.invoke(mended)
    assert answer.response_metadata["session_id"] == "main.b2"
    check(llm, mended, answer)
    assert main_line(llm) == before


def test_a_hit_of_the_llm_cache_skips_the_session_and_does_no_harm(make):
    llm = make(cache=InMemoryCache())
    messages = converse(llm, TALK[:1])
    before = main_line(llm)
    hit = llm.invoke(messages[:-1])
    assert hit.text == messages[-1].text
    assert main_line(llm) == before
    plain = make()
    more = [*messages[:-1], hit, HumanMessage("And now?")]
    answer = plain.invoke(more)
    assert answer.response_metadata["session_id"] == "main"
    check(plain, more, answer)


def test_relabelled_calls_are_the_same_history(make):
    llm = make()
    call = {"name": "page", "args": {"who": "Ada"}, "id": "call00001"}
    asked = [HumanMessage("Page Ada."), AIMessage("", tool_calls=[call]), ToolMessage("ok", tool_call_id="call00001")]
    first = llm.invoke(asked)
    labelled = [HumanMessage("Page Ada.", id="x"), AIMessage("", tool_calls=[call], name="agent"), asked[2], first]
    again = llm.invoke([*labelled, HumanMessage("Thanks.")])
    assert again.response_metadata["session_id"] == "main"
    assert kept(again) > 0


def test_divergence_can_be_refused_or_told(make, caplog):
    llm = make(on_divergence="error")
    messages = converse(llm, TALK[:2])
    names = [info.name for info in llm.runtime.sessions()]
    with pytest.raises(DivergedHistory, match=r'message 4 of the 4 given is not .* session "main"'):
        llm.invoke([*messages[:3], HumanMessage("Until when?")])
    assert [info.name for info in llm.runtime.sessions()] == names
    with pytest.raises(DivergedHistory, match=r'ends after 2 messages, and session "main" has 5'):
        llm.invoke(messages[:2])
    llm.invoke([*messages, HumanMessage("And now?")])  # what continues is no divergence
    told = make(on_divergence="warn")
    told.invoke([*messages[:3], HumanMessage("Until when?")])
    assert 'message 4 of the 4 given is not the one that session "main" has there' in caplog.text


def test_branches_are_bounded_and_can_be_pruned(make):
    llm = make(max_branches=2, max_tokens=2)
    messages = converse(llm, TALK[:2])
    for number in range(4):
        llm.invoke([*messages[:3], HumanMessage(f"Try {number}")])
    names = sorted(info.name for info in llm.runtime.sessions())
    assert names[0] == "main"
    assert len(names) == 3
    assert llm.invoke([*messages, HumanMessage("And now?")]).response_metadata["session_id"] == "main"
    branches = sorted((info for info in llm.runtime.sessions() if info.name != "main"), key=lambda info: info.updated)
    assert llm.prune(keep=1) == [branches[0].name]
    assert sorted(llm.delete_session()) == ["main", branches[1].name]
    assert list(llm.runtime.sessions()) == []
    assert llm.delete_session() == []


def test_idle_sessions_of_calls_are_closed(make, tiny_model):
    llm = make(max_tokens=1)
    mine = llm.runtime.session("mine")
    for number in range(RuntimeConfig().kept_open + 3):
        llm.invoke("hello", session_id=f"s{number}")
    assert not mine.closed
    open_now = [info.name for info in llm.runtime.sessions() if llm.runtime.is_open(info.name)]
    assert len(open_now) <= RuntimeConfig().kept_open + 1
    assert llm.invoke("hello", session_id="s0").response_metadata["session_id"] == "s0.b2"


def test_another_process_has_the_main_line(make, monkeypatch):
    """What cannot be forked from is computed again."""
    from infllm_agent.errors import SessionLocked

    llm = make()
    messages = converse(llm, TALK[:2])

    def locked(*arguments: Any, **more: Any) -> Session:
        raise SessionLocked("open elsewhere")

    monkeypatch.setattr(AgentRuntime, "fork", locked)
    edited = [*messages[:3], HumanMessage("Until when?")]
    answer = llm.invoke(edited)
    assert kept(answer) == 0
    check(llm, edited, answer)


def test_a_damaged_branch_is_passed_over(make, caplog):
    llm = make()
    messages = converse(llm, TALK[:2])
    llm.invoke([*messages[:3], HumanMessage("Until when?")])
    runtime = llm.runtime
    folder = runtime.session("main.b2").store.folder
    runtime.close()
    pool_of(runtime).tree = PrefixTree()  # as another process would begin
    database = (folder / "session.db").read_bytes()
    (folder / "session.db").write_bytes(database[:4096] + b"\xff" * (len(database) - 4096))
    edited = [*messages[:3], HumanMessage("By whom?")]
    answer = llm.invoke(edited)
    assert answer.response_metadata["session_id"] == "main.b3"
    assert kept(answer) > 0
    assert '"main.b2" is passed over' in caplog.text


def test_what_a_failed_call_made_is_gone(make):
    """Else an empty session would stand in the way of the longest beginning."""
    llm = make(on_divergence="branch")
    messages = converse(llm, TALK)
    with closing(llm.stream("Something else entirely.")) as stream:
        next(stream)
    with closing(llm.stream([*messages[:5], HumanMessage("Left early.")])) as stream:
        next(stream)
    assert [info.name for info in llm.runtime.sessions()] == ["main"]
    answer = llm.invoke([*messages[:5], HumanMessage("Who must be told?")])
    assert kept(answer) > 0.6 * answer.usage_metadata["input_tokens"]


def test_a_shallow_end_is_no_better_than_a_deep_place(make):
    llm = make()
    messages = converse(llm, TALK)
    llm.runtime.session("main.b2").close()  # made, and empty
    edited = [*messages[:5], HumanMessage("Who must be told?")]
    answer = llm.invoke(edited)
    assert answer.response_metadata["session_id"] == "main.b3"
    assert kept(answer) > 0.6 * answer.usage_metadata["input_tokens"]
    check(llm, edited, answer)


def test_another_model_on_the_same_thread_begins_anew(make, tiny_model):
    llm = make()
    messages = converse(llm, TALK[:1])
    other = AgentRuntime(llm.runtime.root, tiny_model, MEMORY.changed(topk=2))
    theirs = ChatInfLLM(runtime=other, session_id="main", max_tokens=4)
    more = [*messages, HumanMessage("And now?")]
    answer = theirs.invoke(more)
    assert (answer.response_metadata["session_id"], kept(answer)) == ("main.b2", 0)
    assert llm.invoke(more).response_metadata["session_id"] == "main"
    assert theirs.invoke([*more, answer, HumanMessage("So?")]).response_metadata["session_id"] == "main.b2"
    other.close()


def test_a_fork_that_reads_again_obeys_its_own_call(tmp_path, tiny_model):
    """Where the memory cannot go back, the log is read anew: at the new call's cost, and while it wants."""
    with AgentRuntime(tmp_path, tiny_model, MemoryConfig.paper(**PAPER)) as runtime:
        llm = ChatInfLLM(runtime=runtime, session_id="main", max_tokens=4)
        messages = converse(llm, ["word " * 300, "And?"])
        edited = [*messages[:3], HumanMessage("Or?")]
        with pytest.raises(TimeoutError):
            llm.invoke(edited, timeout=1e-3)
        assert [info.name for info in runtime.sessions()] == ["main"]
        answer = llm.invoke(edited)
        assert kept(answer) == 0
        assert answer.usage_metadata["input_token_details"]["cache_creation"] > 300


def test_many_edits_of_many_sessions_at_once(make):
    """Sessions are closed when idle, never under a call that forks from them."""
    llm = make(max_tokens=1)
    threads = [f"s{number}" for number in range(RuntimeConfig().kept_open + 2)]
    asked = [HumanMessage("hello"), AIMessage("hello"), HumanMessage("and?")]
    for thread in threads:
        llm.invoke(asked, session_id=thread)
    jobs = [(thread, number) for number in range(4) for thread in threads]
    with ThreadPoolExecutor(8) as pool:
        edits = [
            pool.submit(llm.invoke, [*asked[:2], HumanMessage(f"or {number}?")], session_id=thread)
            for thread, number in jobs
        ]
        for (thread, _), edit in zip(jobs, edits, strict=True):
            assert edit.result(timeout=60).response_metadata["session_id"].startswith(f"{thread}.b")
    assert len(llm.runtime.sessions()) == len(threads) + len(jobs)


def test_an_async_stream_that_is_left_is_taken_back(make):
    llm = make(max_tokens=6)
    messages = converse(llm, TALK[:1])
    before = main_line(llm)
    more, sampling = [*messages, HumanMessage("And now?")], {"max_tokens": 60, "temperature": 1.5}
    # The thread that writes is a piece or two ahead: with so few the answer might be there already.
    tries = (len(list(llm.stream(more, **sampling, seed=seed, session_id="try"))) for seed in count())
    seed = next(seed for seed, pieces in enumerate(tries) if pieces > 8)

    async def leave() -> None:
        async with aclosing(llm.astream(more, **sampling, seed=seed)) as stream:
            async for _ in stream:
                break

    asyncio.run(leave())
    with pool_of(llm.runtime).by_name("main", Cancellation()):  # once the other has let go
        assert main_line(llm) == before


_texts = st.sampled_from("abc")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.lists(_texts, max_size=6), min_size=1, max_size=5), history=st.lists(_texts, max_size=6))
def test_the_deepest_place_is_found(lines, history):
    """Against a comparison message by message."""

    class Info:
        def __init__(self, number: int, line: list[str]) -> None:
            self.id, self.name = str(number), "main" if number == 0 else f"main.b{number + 1}"
            self.generation = self.messages = len(line)
            self.updated = float(number)

    infos = [Info(number, line) for number, line in enumerate(lines)]
    tree = PrefixTree()
    for number, line in enumerate(lines):
        tree._lines[str(number)] = tree._lines.get(str(number)) or _line(line)
    places = tree.places(None, infos, beginnings([Turn("user", text) for text in history]))  # type: ignore[arg-type]
    for place in places:
        line = lines[0 if place.name == "main" else int(place.name.removeprefix("main.b")) - 1]
        shared = 0
        while shared < min(len(line), len(history)) and line[shared] == history[shared]:
            shared += 1
        assert (place.messages, place.known) == (shared, len(line))
    assert [place.messages for place in places] == sorted((place.messages for place in places), reverse=True)


def _line(texts: list[str]) -> Any:
    from infllm_agent.routing.prefix_tree import _Line

    return _Line(len(texts), beginnings([Turn("user", text) for text in texts]))


def test_streams_of_one_thread_do_not_wait_for_each_other(make):
    llm = make(max_tokens=8)
    messages = converse(llm, TALK[:1])
    with closing(llm.stream([*messages, HumanMessage("And now?")])) as stream:
        next(stream)
        answer = llm.invoke([*messages, HumanMessage("And then?")])
    assert answer.response_metadata["session_id"] == "main.b2"
    check(llm, [*messages, HumanMessage("And then?")], answer)
