"""The agent's loop: every call gets its result, in order, in the session, whatever the tools and the user do."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import pytest
from load_example import load_example
from pydantic import BaseModel

from infllm_agent.agent.events import AgentRun, CallMade, CallResult, OutputPiece, TextPiece
from infllm_agent.agent.functions import StopAgent, Tool
from infllm_agent.agent.loop import INTERRUPTED, unanswered
from infllm_agent.agent.tool_run import MOST_AHEAD
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError, SessionBusy, UnsupportedSchema
from infllm_agent.model.local_model import LocalModel
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session
from infllm_agent.tools import ToolCall

MEMORY = MemoryConfig(
    n_init=4, n_local=128, block_size=8, topk=4, candidates=8, chunk_size=64, question_chunk=8, max_cached_block=8
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def runtime(tmp_path: Path, tiny_model: LocalModel) -> Iterator[AgentRuntime]:
    with AgentRuntime(tmp_path / "root", tiny_model, MEMORY) as runtime:
        yield runtime


@pytest.fixture
def run(runtime: AgentRuntime) -> Callable[..., AgentRun]:
    """Runs whose answers are short."""
    return lambda *arguments, **options: runtime.run_agent(*arguments, **{"max_tokens": 8, **options})


def with_calls(session: Session, *calls: ToolCall) -> Session:
    """A session as a process leaves it that dies while its calls are under way."""
    session.append_user("Go.")
    session.append_assistant("", calls=calls)
    session.commit()
    return session


def told(session: Session) -> list[tuple[str, str | None, str]]:
    """Its results: role, name, text."""
    return [(m.role, m.call_id, m.text) for m in session.messages() if m.role == "tool"]


def ping(host: Literal["db-3", "web-1"]) -> str:
    """Whether a host answers.

    Args:
        host: its name.
    """
    return f"{host} answers"


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_a_run_stands_in_the_session(runtime: AgentRuntime) -> None:
    events = list(
        runtime.stream_agent(
            "ops", "Is db-3 up?", tools=[ping], system="Be brief.", tool_choice=["any", "none"], max_tokens=90
        )
    )
    session = runtime.session("ops")
    system, user, asked, result, answer = session.messages()
    assert (system.text, user.text) == ("Be brief.", "Is db-3 up?")
    assert [tool.name for tool in session.tools] == ["ping"]
    (call,) = asked.calls
    assert (result.role, result.name, result.call_id, result.text) == (
        "tool",
        "ping",
        call.id,
        f"{call.arguments['host']} answers",
    )
    run = events[-1]
    assert isinstance(run, AgentRun)
    assert run.answer is not None
    assert run.answer.message == answer
    assert (run.steps, run.finish_reason, run.text) == (2, run.answer.finish_reason, answer.text)
    assert [event for event in events if not isinstance(event, TextPiece)] == [CallMade(call), *run.calls, run]
    assert "".join(event.text for event in events if isinstance(event, TextPiece)) == answer.text
    assert run.usage.input_tokens == run.usage.prefilled_tokens + run.usage.reused_tokens
    assert run.usage.output_tokens > run.answer.usage.output_tokens
    assert session.store.message_count == session.message_count  # committed, the answer too


def test_tools_are_announced_when_they_change(runtime: AgentRuntime, run: Callable[..., AgentRun]) -> None:
    def restart() -> None: ...

    for tools, announced in [([ping, restart], 1), ([restart, ping], 1), ([ping], 2), ([], 2)]:
        run("ops", "Go.", tools=tools, system="Be brief.")
        systems = [message for message in runtime.session("ops").messages() if message.role == "system"]
        assert len(systems) == announced
    run("bare", "Go.", system="Be brief.")
    assert [message.role for message in runtime.session("bare").messages()] == ["system", "user", "assistant"]


def test_the_limit_of_steps_ends_in_an_answer(run: Callable[..., AgentRun], runtime: AgentRuntime) -> None:
    result = run("ops", "Go.", tools=[ping], tool_choice=["ping"] * 9, max_steps=3, max_tokens=90)
    assert (result.finish_reason, result.steps, len(result.calls)) == ("max_steps", 4, 3)
    assert result.answer is not None
    assert result.answer.tool_calls == ()
    assert runtime.session("ops").messages(-1)[0].role == "assistant"


def test_the_answer_is_held_to_a_schema(run: Callable[..., AgentRun]) -> None:
    class Verdict(BaseModel):
        up: bool

    result = run("ops", "Up?", tools=[ping], tool_choice=["any", "none"], schema=Verdict, max_tokens=90)
    assert len(result.calls) == 1
    assert isinstance(Verdict.model_validate_json(result.text).up, bool)
    result = run("ops", "Up?", schema=Verdict.model_json_schema(), max_tokens=90)
    assert Verdict.model_validate_json(result.text)


def test_what_is_no_call_is_answered_with_the_reason(run: Callable[..., AgentRun], runtime: AgentRuntime) -> None:
    result = run("ops", "Go.", tools=[ping], tool_choice="any", max_steps=1, max_tokens=12)
    assert [each.error for each in result.calls] == [True]
    assert re.match("error: this is no call: the answer was cut off .*You wrote: ", result.calls[0].text)
    assert told(runtime.session("ops")) == [("tool", None, result.calls[0].text)]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tools": [ping, ping]}, ConfigError, 'two tools are named "ping"'),
        ({"tools": [lambda: ""]}, ConfigError, "lambda"),
        ({"tools": [ping], "tool_choice": "pong"}, ConfigError, "pong"),
        ({"tool_choice": "any"}, ConfigError, "no such tool"),
        ({"max_steps": 0}, ConfigError, "max_steps is 0"),
        ({"tool_timeout": -1}, ConfigError, "tool_timeout is -1"),
        ({"temperature": -1}, ConfigError, "temperature"),
        ({"schema": {"type": "nonesuch"}}, UnsupportedSchema, "nonesuch"),
        ({"task": None}, ConfigError, "is empty: give a task"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_said(
    runtime: AgentRuntime, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        runtime.run_agent("ops", **{"task": "Go.", **options})
    assert runtime.session("ops").message_count == 0


def test_one_run_at_a_time(runtime: AgentRuntime) -> None:
    first = runtime.stream_agent("ops", "Go.", tools=[ping], tool_choice="any", max_tokens=90)
    next(first)
    with pytest.raises(SessionBusy, match="an agent works on it"):
        runtime.run_agent("ops", "Go.")
    first.close()
    runtime.run_agent("ops", "Go.", max_tokens=4)


# -- results -----------------------------------------------------------------------------------------------------------


def call_of(runtime: AgentRuntime, tool: Tool | Callable[..., Any], arguments: dict[str, Any], **options: Any) -> Any:
    """The result of one call, which a session already holds."""
    tool = tool if isinstance(tool, Tool) else Tool(tool)
    session = with_calls(runtime.session(f"s{len(runtime.sessions())}"), ToolCall(tool.name, arguments, "c1"))
    run = runtime.run_agent(session, tools=[tool], max_tokens=2, **options)
    ((_, call_id, text),) = told(session)
    assert (call_id, text) == ("c1", run.calls[0].text)
    return run.calls[0]


class Load(BaseModel):
    host: str
    load: float


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ("as it is\n", "as it is\n"),
        ("", ""),
        (None, "(no output)"),
        (Load(host="düne", load=0.5), '{"host": "düne", "load": 0.5}'),
        ([{"a": 1}, Load(host="x", load=1)], '[{"a": 1}, {"host": "x", "load": 1.0}]'),
        (3, "3"),
        (True, "true"),
        (b"x", "error: TypeError: the tool returned bytes, which is neither text nor JSON"),
        (object(), "error: TypeError: the tool returned object, which is neither text nor JSON"),
        (iter(()), "(no output)"),
        (iter(["a", 1]), "a\nerror: TypeError: the tool yielded int, not text"),
    ],
)
def test_results_as_text(runtime: AgentRuntime, returned: Any, text: str) -> None:
    def tool() -> Any:
        return returned

    result = call_of(runtime, tool, {})
    assert (result.text, result.error) == (text, "error" in text)


def test_arguments_are_converted_and_what_is_wrong_with_them_is_said(runtime: AgentRuntime) -> None:
    def scale(load: Load, times: int = 2) -> float:
        return load.load * times

    assert call_of(runtime, scale, {"load": {"host": "x", "load": "1.5"}}).text == "3.0"
    wrong = call_of(runtime, scale, {"load": {"host": "x"}, "times": "many", "factor": 1})
    assert wrong.error
    assert wrong.text == (
        "error: the arguments of scale are not valid. load.load: Field required; times: Input should be a valid "
        "integer, unable to parse string as an integer; factor: Extra inputs are not permitted. Mend them and call "
        "again."
    )


def test_a_failing_tool_does_not_end_the_run(runtime: AgentRuntime) -> None:
    def broken() -> str:
        raise KeyError("db-3")

    def breaks_off() -> Iterator[str]:
        yield "first line\n"
        raise OSError("connection lost")

    assert call_of(runtime, broken, {}).text == "error: KeyError: 'db-3'"
    assert call_of(runtime, breaks_off, {}).text == "first line\n\nerror: OSError: connection lost"


def test_calls_of_unknown_tools_are_answered(runtime: AgentRuntime) -> None:
    """A free answer is not held to names where the model's form of calls has no marker; nor is an old session."""
    session = with_calls(runtime.session("ops"), ToolCall("no such tool!", {}, "c1"), ToolCall("gone", {}))
    runtime.run_agent(session, tools=[ping], max_tokens=2)
    assert told(session) == [("tool", "c1", INTERRUPTED), ("tool", None, INTERRUPTED)]
    assert unanswered(session) == []


@pytest.mark.parametrize("stop", [StopAgent("enough"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_may_end_the_run(runtime: AgentRuntime, stop: BaseException, is_async: bool) -> None:
    def sync_stops() -> str:
        raise stop

    async def async_stops() -> str:
        raise stop

    tool = Tool(async_stops if is_async else sync_stops, name="stops")
    calls = [ToolCall("ping", {"host": "db-3"}, "c1"), ToolCall("stops", {}, "c2"), ToolCall("ping", {}, "c3")]
    session = with_calls(runtime.session("ops"), *calls)
    if isinstance(stop, StopAgent):
        run = runtime.run_agent(session, tools=[ping, tool])
        assert (run.finish_reason, run.answer, run.text, run.steps) == ("stopped", None, "", 0)
        assert [result.call for result in run.calls] == calls
    else:
        with pytest.raises(type(stop)):
            runtime.run_agent(session, tools=[ping, tool])
    texts = [text for _, _, text in told(session)]
    assert texts == ["db-3 answers", "enough" if isinstance(stop, StopAgent) else INTERRUPTED, INTERRUPTED]
    runtime.run_agent(session, tools=[ping, tool], max_tokens=2)  # goes on from there, and the loop still lives
    assert session.messages(-1)[0].role == "assistant"


# -- output while it runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_output_is_in_the_memory_before_the_tool_ends(runtime: AgentRuntime, is_async: bool) -> None:
    session = with_calls(runtime.session("ops"), ToolCall("tail", {}, "c1"))
    read, goes_on = [], threading.Event()
    line = "02:14 the disk is full\n" * 40

    def sync_tail() -> Iterator[str]:
        yield line
        assert goes_on.wait(10)
        yield "the end"

    async def async_tail() -> AsyncIterator[str]:
        yield line
        while not goes_on.is_set():
            await asyncio.sleep(0.01)
        yield "the end"

    for event in runtime.stream_agent(session, tools=[Tool(async_tail if is_async else sync_tail, name="tail")]):
        if isinstance(event, OutputPiece):
            read.append((event.text, session.memory.length))
            goes_on.set()
        if isinstance(event, CallResult):
            break
    (first, length), (second, _) = read
    assert (first, second) == (line, "the end")
    assert length > len(session.chat.encoder.encode_text(line)) > 2 * MEMORY.chunk_size
    assert told(session) == [("tool", "c1", line + "the end")]


def test_parallel_calls_run_together_and_their_results_stand_in_order(runtime: AgentRuntime) -> None:
    meeting = threading.Barrier(3, timeout=10)

    def first() -> Iterator[str]:
        meeting.wait()
        for number in range(3):
            time.sleep(0.02)
            yield f"a{number} "

    def second() -> str:
        meeting.wait()
        return "b"

    async def third() -> AsyncIterator[str]:
        await asyncio.to_thread(meeting.wait)
        for number in range(3):
            yield f"c{number} "

    calls = [ToolCall(name, {}, name) for name in ("first", "second", "third")]
    session = with_calls(runtime.session("ops"), *calls)
    run = runtime.run_agent(session, tools=[third, second, first], max_tokens=2)
    assert [result.call for result in run.calls] == calls
    assert told(session) == [("tool", "first", "a0 a1 a2 "), ("tool", "second", "b"), ("tool", "third", "c0 c1 c2 ")]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_that_is_far_ahead_waits_and_its_time_stands_still(runtime: AgentRuntime, is_async: bool) -> None:
    yielded = 0
    ended = threading.Event()
    piece = "a" * (MOST_AHEAD // 2)

    def slow() -> str:
        time.sleep(0.9)
        assert yielded <= 3  # two fit, and one waits
        return "slept"

    def sync_fast() -> Iterator[str]:
        nonlocal yielded
        for _ in range(6):
            yielded += 1
            yield piece
        ended.set()

    async def async_fast() -> AsyncIterator[str]:
        for each in sync_fast():
            yield each

    tools = [slow, Tool(async_fast if is_async else sync_fast, name="fast", timeout=0.6)]
    session = with_calls(runtime.session("ops"), ToolCall("slow", {}, "c1"), ToolCall("fast", {}, "c2"))
    run = runtime.run_agent(session, tools=tools, max_tokens=2)
    assert [result.text for result in run.calls] == ["slept", piece * 6]
    assert ended.is_set()


# -- time --------------------------------------------------------------------------------------------------------------


class Witness:
    """Tools that would run for long, and what became of them."""

    def __init__(self) -> None:
        self.left = threading.Event()

    def plain(self) -> str:
        self.left.wait(5)
        return "late"

    def lines(self) -> Iterator[str]:
        try:
            while True:
                yield "line\n"
                time.sleep(0.02)
        finally:
            self.left.set()

    async def waits(self) -> str:
        try:
            await asyncio.sleep(30)
        finally:
            self.left.set()
        return "late"

    async def async_lines(self) -> AsyncIterator[str]:
        try:
            yield "line\n"
            await asyncio.sleep(30)
        finally:
            self.left.set()


@pytest.mark.parametrize("kind", ["plain", "lines", "waits", "async_lines"])
def test_a_tool_that_runs_over_its_time_is_left(runtime: AgentRuntime, kind: str) -> None:
    witness = Witness()
    began = time.monotonic()
    result = call_of(runtime, Tool(getattr(witness, kind), timeout=0.2), {}, tool_timeout=None)
    assert time.monotonic() - began < 4
    assert result.error
    assert re.fullmatch(
        r"((line\n)+\n)?error: the tool took more than 0.2 s and was left; it may still do its work", result.text
    )
    assert ("line" in result.text) == ("lines" in kind)
    assert kind == "plain" or witness.left.wait(4)
    witness.left.set()


def test_the_default_time_holds_for_tools_without_their_own(runtime: AgentRuntime) -> None:
    def sleep(seconds: float) -> str:
        time.sleep(seconds)
        return "woke"

    assert "more than 0.1 s" in call_of(runtime, sleep, {"seconds": 0.5}, tool_timeout=0.1).text
    assert call_of(runtime, Tool(sleep, timeout=5), {"seconds": 0.3}, tool_timeout=0.1).text == "woke"
    # Later in the order, it is late although its result is there by the time that it is looked at.
    session = with_calls(
        runtime.session("ops"), ToolCall("sleep", {"seconds": 0.6}, "c1"), ToolCall("brief", {"seconds": 0.3}, "c2")
    )
    tools = [sleep, Tool(sleep, name="brief", timeout=0.1)]
    first, second = runtime.run_agent(session, tools=tools, max_tokens=2).calls
    assert (first.text, second.error) == ("woke", True)


# -- stopping and going on ---------------------------------------------------------------------------------------------


def test_closing_the_iterator_answers_every_call(runtime: AgentRuntime) -> None:
    closed = threading.Event()

    def lines() -> Iterator[str]:
        try:
            while True:
                yield "line\n"
                time.sleep(0.01)
        finally:
            closed.set()

    session = with_calls(runtime.session("ops"), ToolCall("lines", {}, "c1"), ToolCall("ping", {}, "c2"))
    events = runtime.stream_agent(session, tools=[lines, ping])
    for event in events:
        if isinstance(event, OutputPiece):
            break
    events.close()
    assert closed.wait(5)
    (_, _, first), (_, _, second) = told(session)
    assert re.fullmatch(rf"(line\n)+\n{INTERRUPTED}", first)
    assert second == INTERRUPTED
    assert session.store.message_count == session.message_count  # committed


@pytest.mark.parametrize("moment", [TextPiece, CallMade, OutputPiece, CallResult])
def test_left_at_any_moment_the_session_is_whole(runtime: AgentRuntime, moment: type) -> None:
    def lines() -> Iterator[str]:
        yield "line\n" * 30
        time.sleep(0.05)
        yield "last"

    options = {"tools": [lines, ping], "tool_choice": ["lines", "any", "none"], "max_tokens": 90}
    events = runtime.stream_agent("ops", "Go.", **options)
    assert any(isinstance(event, moment) for event in events)
    events.close()
    session = runtime.session("ops")
    assert unanswered(session) == []
    assert session.store.message_count == session.message_count
    session.store.verify()
    runtime.run_agent(session, "Go on.", **options)


@pytest.mark.parametrize("where", ["session", "argument"])
def test_cancelling_ends_the_run_with_every_call_answered(runtime: AgentRuntime, where: str) -> None:
    stop = threading.Event()

    def hangs() -> Iterator[str]:
        yield "x" * 2000
        stop.set()
        time.sleep(5)
        yield "y"

    session = with_calls(runtime.session("ops"), ToolCall("hangs", {}, "c1"), ToolCall("ping", {}, "c2"))
    if where == "session":
        session.cancelled = stop.is_set
    before = session.cancelled
    options: dict[str, Any] = {"cancelled": stop.is_set} if where == "argument" else {}
    *events, run = runtime.stream_agent(session, tools=[hangs, ping], **options)
    assert (run.finish_reason, run.answer) == ("cancelled", None)
    assert session.cancelled is before
    assert [event for event in events if isinstance(event, CallResult)] == list(run.calls)
    assert [text[-len(INTERRUPTED) :] for _, _, text in told(session)] == [INTERRUPTED, INTERRUPTED]
    assert session.store.message_count == session.message_count
    stop.clear()
    assert runtime.run_agent(session, tools=[hangs, ping], max_tokens=2).steps == 1


@pytest.mark.parametrize("after", range(0, 90, 15))
def test_cancelled_after_any_number_of_questions_the_task_is_there(runtime: AgentRuntime, after: int) -> None:
    """Between chunks of the task, of the prompt, and between tokens of the answer."""
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    def long() -> str:
        return "word " * 100

    task = "Look at it. " * 40
    options = {"tools": [long], "tool_choice": ["any", "none"], "max_tokens": 90}
    run = runtime.run_agent("ops", task, cancelled=cancelled, **options)
    session = runtime.session("ops")
    assert run.finish_reason == "cancelled"
    assert [message.text for message in session.messages() if message.role == "user"] == [task]
    assert unanswered(session) == []
    assert session.store.message_count == session.message_count
    assert runtime.run_agent(session, "Go on.", **options).finish_reason != "cancelled"


KILLED = """
import os, signal, sys
from infllm_agent.runtime import AgentRuntime

def dies() -> str:
    os.kill(os.getpid(), signal.SIGKILL)

with AgentRuntime.open(sys.argv[1], sys.argv[2], dtype="float32") as runtime:
    runtime.run_agent("ops", "Go.", tools=[dies], tool_choice="any", max_tokens=60)
"""


def test_a_run_killed_in_a_tool_is_taken_up_again(tmp_path: Path, tiny_model_folder: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "root"), str(tiny_model_folder)]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    def dies() -> str:
        return "lived"

    with AgentRuntime.open(tmp_path / "root", str(tiny_model_folder), dtype="float32") as runtime:
        session = runtime.session("ops")
        (call,) = unanswered(session)
        careful = runtime.fork("ops", "careful")
        asked_anew = runtime.fork("ops", "anew")
        run = runtime.run_agent("ops", tools=[dies], max_tokens=4)
        assert [result.text for result in run.calls] == ["lived"]
        assert [message.role for message in session.messages()][-4:] == ["user", "assistant", "tool", "assistant"]
        assert told(session) == [("tool", call.id, "lived")]

        run = runtime.run_agent(careful, tools=[Tool(dies, repeatable=False)], max_tokens=4)
        assert run.calls[0].text == f"{INTERRUPTED}; it may have done its work, and is not repeated"
        run = runtime.run_agent(asked_anew, "Something else.", tools=[dies], max_tokens=4)
        assert [result.text for result in run.calls] == [INTERRUPTED]
        assert [message.role for message in asked_anew.messages()][-3:] == ["tool", "user", "assistant"]


def test_what_a_session_without_a_task_goes_on_with(runtime: AgentRuntime, run: Callable[..., AgentRun]) -> None:
    session = with_calls(runtime.session("ops"), ToolCall("ping", {"host": "db-3"}, "c1"), ToolCall("ping", {}, "c2"))
    session.append_tool_result("ping", "yes", call_id="c1")
    session.append_observation("It rains.")  # something else came between
    assert [call.id for call in unanswered(session)] == ["c2"]
    assert [result.call.id for result in run(session, tools=[ping]).calls] == ["c2"]
    session.append_user("And now?")
    assert run(session, tools=[ping]).calls == ()
    session.append_assistant("All is well.")
    with pytest.raises(ConfigError, match="ends with an answer"):
        run(session, tools=[ping])
    session = with_calls(runtime.session("old"), ToolCall("ping", {}, "c1"))
    session.append_user("Never mind.")
    assert unanswered(session) == []


# -- asyncio -----------------------------------------------------------------------------------------------------------


async def test_async_tools_run_on_their_callers_loop(runtime: AgentRuntime) -> None:
    ran_on = []

    async def look() -> str:
        ran_on.append(asyncio.get_running_loop())
        return "seen"

    run = await runtime.arun_agent("ops", "Go.", tools=[look], tool_choice=["any", "none"], max_tokens=90)
    assert [result.text for result in run.calls] == ["seen"]
    assert ran_on == [asyncio.get_running_loop()]


async def test_cancelling_the_awaiting_task_ends_the_run(runtime: AgentRuntime) -> None:
    begun = asyncio.Event()

    async def hangs() -> str:
        begun.set()
        await asyncio.sleep(30)
        return "late"

    session = with_calls(runtime.session("ops"), ToolCall("hangs", {}, "c1"))
    before = session.cancelled
    work = asyncio.create_task(runtime.arun_agent(session, tools=[hangs]))
    await asyncio.wait_for(begun.wait(), 10)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(work, 10)
    assert told(session) == [("tool", "c1", INTERRUPTED)]
    assert session.cancelled is before


async def test_leaving_an_async_iterator_ends_the_run(runtime: AgentRuntime) -> None:
    closed = []

    async def lines() -> AsyncIterator[str]:
        try:
            while True:
                yield "line\n"
                await asyncio.sleep(0.01)
        finally:
            closed.append(asyncio.get_running_loop())

    session = with_calls(runtime.session("ops"), ToolCall("lines", {}, "c1"))
    async with aclosing(runtime.astream_agent("ops", tools=[lines], tool_timeout=None)) as events:
        async for event in events:
            if isinstance(event, OutputPiece):
                break
    ((_, _, text),) = told(session)
    assert re.fullmatch(rf"(line\n)+\n{INTERRUPTED}", text)
    assert unanswered(session) == []
    for _ in range(100):
        await asyncio.sleep(0 if closed else 0.02)
    assert closed == [asyncio.get_running_loop()]


# -- as a user has it --------------------------------------------------------------------------------------------------


def test_example_plain_agent(tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(tmp_path), "--model", str(tiny_model_folder), "--max-tokens", "96"]
    example = load_example("plain_agent")
    example.main(arguments)
    example.main(["And web-1?", *arguments])
    printed = capsys.readouterr().out
    assert printed.count("> ") == 2
    assert len(re.findall(r"^  read_log\(\{'host': '(db-3|web-1)'\}\)$", printed, re.MULTILINE)) == 2
    assert len(re.findall(r"^    02:1\d ", printed, re.MULTILINE)) >= 4


@pytest.mark.model
def test_the_packaged_model_works_with_a_tool(tmp_path: Path) -> None:
    with AgentRuntime.open(tmp_path) as runtime:
        run = runtime.run_agent(
            "ops", "Does db-3 answer?", tools=[ping], tool_choice=["ping", "none"], max_tokens=40, system="Be brief."
        )
        (result,) = run.calls
        assert json.dumps(result.call.arguments) == '{"host": "db-3"}'
        assert result.text == "db-3 answers"
        assert run.text
