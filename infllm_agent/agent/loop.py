"""An agent: the model answers, its calls are made, their results come into the session, until it calls no more.

All of it stands in the session, and every message is committed when it is complete. So a run that was cut off, by
whatever, is taken up again from the session alone.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any
from weakref import WeakSet

from pydantic import BaseModel

from infllm_agent.agent.events import AgentEvent, AgentRun, CallMade, CallResult, OutputPiece, TextPiece
from infllm_agent.agent.functions import Function, StopAgent, Tool, as_tools
from infllm_agent.agent.tool_run import Outcome, ToolRun, background_loop
from infllm_agent.config import SamplingConfig
from infllm_agent.errors import Cancelled, ConfigError, InfLLMError, InvalidName, SessionBusy
from infllm_agent.platform.threads import from_thread
from infllm_agent.reply import Reply, Usage
from infllm_agent.session.answering import writer_for
from infllm_agent.session.message_stream import MessageStream
from infllm_agent.session.session import Session
from infllm_agent.tools import InvalidCall, ToolCall, ToolSpec, check_name

#: The result of a call that was not made, or not made to its end, because the run ended.
INTERRUPTED = "error: the call was interrupted"
#: So many messages back the calls of the last answer are looked for: observations may have come since.
LOOK_BACK = 256


def run_agent(session: Session, task: str | None = None, **options: Any) -> AgentRun:
    """Have the model work on a task with tools, to the end. Options and errors are those of ``stream_agent``."""
    for event in stream_agent(session, task, **options):
        last = event
    assert isinstance(last, AgentRun)
    return last


async def arun_agent(session: Session, task: str | None = None, **options: Any) -> AgentRun:
    """As ``run_agent``, in a thread. Async tools run on the caller's loop; cancelling it ends the run."""
    async with aclosing(astream_agent(session, task, **options)) as events:
        async for event in events:
            last = event
    assert isinstance(last, AgentRun)
    return last


async def astream_agent(session: Session, task: str | None = None, **options: Any) -> AsyncGenerator[AgentEvent, None]:
    """As ``stream_agent``, in a thread. Async tools run on the caller's loop."""
    loop = asyncio.get_running_loop()
    asked: Callable[[], bool] = options.pop("cancelled", None) or (lambda: False)

    def events(left: Callable[[], bool]) -> Iterator[AgentEvent]:
        return stream_agent(session, task, cancelled=lambda: left() or asked(), loop=loop, **options)

    async with aclosing(from_thread(events)) as arriving:
        async for event in arriving:
            yield event


def stream_agent(
    session: Session,
    task: str | None = None,
    *,
    tools: Iterable[Tool | Function] = (),
    system: str = "",
    max_steps: int = 10,
    tool_choice: str | Sequence[str] = "auto",
    parallel_calls: bool | None = None,
    tool_timeout: float | None = 60.0,
    schema: dict[str, Any] | type[BaseModel] | None = None,
    cancelled: Callable[[], bool] | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    **sampling: Any,
) -> Generator[AgentEvent, None, None]:
    """Have the model work on a task with tools, giving what happens as it happens; the last event is the ``AgentRun``.

    A failing tool never ends the run: its error is its result, and so is what is wrong with a call that is none.
    ``StopAgent`` ends it, and so do KeyboardInterrupt and SystemExit, which are raised. If the iterator is closed
    early, or the session's ``cancelled`` says so, every call still gets a result.

    Args:
        task: the user's message. None takes the session up as it stands: calls without a result are made (again),
            messages without an answer are answered. With a task, such calls are closed as interrupted.
        tools: functions, or ``Tool`` objects. They are announced in a system message, unless the session's last
            announcement is the same.
        system: the text of that message, or of the first message of the session.
        max_steps: rounds of calls; after them the model gives one answer without calls.
        tool_choice: as in ``Session.stream_reply``, for the first step, or a list for the first steps; afterwards the
            model decides.
        parallel_calls: whether an answer may make several calls; None: where the model decides about calls. They run
            at the same time; their results come into the session one after the other, in the order of the calls.
        tool_timeout: in seconds, for tools without their own; None: none.
        schema: a JSON schema, or a pydantic model, that the text of the answer is valid under.
        cancelled: asked besides the session's ``cancelled``, between chunks and tokens and while tools run.
        loop: on which async tools run; None: one in a thread of this package.
        sampling: fields of ``SamplingConfig``, for every reply.

    Raises:
        ConfigError: what cannot be a tool, an option out of its range, nothing to answer.
        UnsupportedSchema: a schema, or a tool's parameters, that replies cannot be held to.
        SessionBusy: another run works on the session.
    """
    if max_steps < 1:
        raise ConfigError(f"max_steps is {max_steps}; a run takes at least 1")
    if tool_timeout is not None and not tool_timeout > 0:
        raise ConfigError(f"tool_timeout is {tool_timeout}; give seconds above 0, or None")
    if isinstance(schema, type):
        schema = schema.model_json_schema()
    run = _Run(
        session,
        as_tools(tools),
        max_steps=max_steps,
        choices=(tool_choice,) if isinstance(tool_choice, str) else tuple(tool_choice),
        parallel=parallel_calls,
        timeout=math.inf if tool_timeout is None else tool_timeout,
        schema=schema,
        loop=background_loop if loop is None else lambda: loop,
        cancelled=cancelled or (lambda: False),
        sampling=sampling,
    )
    run.check(task)
    return run.events(task, system)


@dataclass
class _Run:
    """One run: what is asked of it, and what has happened so far.

    Attributes:
        settled: results of calls that were interrupted, of which nobody was told yet.
        cut_off: the model was stopped while it read a result.
    """

    session: Session
    tools: dict[str, Tool]
    max_steps: int
    choices: Sequence[str]
    parallel: bool | None
    timeout: float
    schema: dict[str, Any] | None
    loop: Callable[[], asyncio.AbstractEventLoop]
    cancelled: Callable[[], bool]
    sampling: dict[str, Any]
    replies: list[Reply] = field(default_factory=list)
    results: list[CallResult] = field(default_factory=list)
    settled: list[CallResult] = field(default_factory=list)
    cut_off: bool = False

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(tool.spec for tool in self.tools.values())

    def check(self, task: str | None) -> None:
        """Refuse, before anything is said, what would fail later."""
        sampling = SamplingConfig(**self.sampling)
        for choice in {*self.choices, "auto", "none"}:
            writer_for(self.session.grammars, sampling, prefix="", **self._form(choice))
        last = self.session.messages(-1)
        if task is None and not last:
            raise ConfigError(f'session "{self.session.name}" is empty: give a task')
        if task is None and last[0].role == "assistant" and last[0].text and not last[0].calls:
            raise ConfigError(f'session "{self.session.name}" ends with an answer: give a task, be it "Go on."')

    def events(self, task: str | None, system: str) -> Generator[AgentEvent, None, None]:
        with _alone(self.session), self.session.cancelled_by(self.cancelled):
            try:
                yield from self._begin(task, system)
                finish_reason = yield from self._steps()
            except Cancelled:
                finish_reason = "cancelled"
            except StopAgent:
                finish_reason = "stopped"
            except BaseException:
                with suppress(InfLLMError):  # a session that broke cannot go on: the first error tells of it
                    self._settle()
                raise
            self._settle()
            yield from self.settled
            answer = self.replies[-1] if self.replies else None
            yield AgentRun(answer, len(self.replies), tuple(self.results), finish_reason, self._usage())

    def _begin(self, task: str | None, system: str) -> Generator[AgentEvent, None, None]:
        """All that comes before the first reply."""
        session = self.session
        left = unanswered(session)
        if task is None:
            yield from self._carry_out(left, again=True)
        else:
            yield from [self._result(call, INTERRUPTED, error=True) for call in left]
        announced = {tool.name: tool for tool in session.tools}
        if self.specs and announced != {tool.name: tool for tool in self.specs}:
            self._attempt(lambda: session.append_system(system, tools=self.specs))
        elif system and not session.message_count:
            self._attempt(lambda: session.append_system(system))
        if task is not None:
            self._attempt(lambda: session.append_user(task))
        session.commit()

    def _steps(self) -> Generator[AgentEvent, None, str]:
        """Replies and calls in turn. Returns why they ended."""
        for step in range(self.max_steps):
            reply = yield from self._reply(self.choices[step] if step < len(self.choices) else "auto")
            if not reply.tool_calls and not reply.invalid_calls:
                return reply.finish_reason
            yield from self._carry_out(reply.tool_calls)
            for invalid in reply.invalid_calls:
                yield self._result(invalid, _what_is_wrong(invalid, reply), error=True)
        yield from self._reply("none")
        return "max_steps"

    def _reply(self, choice: str) -> Generator[AgentEvent, None, Reply]:
        if self.cut_off:
            raise Cancelled(f'session "{self.session.name}": stopped before an answer')
        pieces = self.session.stream_reply(**self._form(choice), **self.sampling)
        with closing(pieces):
            for piece in pieces:
                yield TextPiece(piece)
        reply = self.session.last_reply
        assert reply is not None
        self.replies.append(reply)
        self.session.commit()
        if reply.finish_reason == "cancelled":
            raise Cancelled(f'session "{self.session.name}": stopped while answering')
        return reply

    def _form(self, choice: str) -> dict[str, Any]:
        """What a reply is held to."""
        free = choice in ("auto", "none")
        return {
            "tools": self.specs,
            "tool_choice": choice,
            # A small model that must call would not stop by itself.
            "parallel_calls": free if self.parallel is None else self.parallel,
            "schema": self.schema if free else None,
        }

    # -- calls and their results ---------------------------------------------------------------------------------------

    def _carry_out(self, calls: Sequence[ToolCall], *, again: bool = False) -> Generator[AgentEvent, None, None]:
        """Make the calls, all at the same time; take in their results in order. ``again``: they were made before."""
        for call in calls:
            yield CallMade(call)
        runs = [self._start(call, again=again) for call in calls]
        try:
            for call, run in zip(calls, runs, strict=True):
                yield from self._take_in(call, run)
        finally:
            for run in runs:
                if isinstance(run, ToolRun):
                    run.abandon()

    def _start(self, call: ToolCall, *, again: bool) -> ToolRun | Outcome:
        tool = self.tools.get(call.name)
        if tool is None:
            names = ", ".join(self.tools) or "none"
            return Outcome(
                INTERRUPTED if again else f'error: there is no tool "{call.name}"; there are: {names}', error=True
            )
        if again and not tool.repeatable:
            return Outcome(f"{INTERRUPTED}; it may have done its work, and is not repeated", error=True)
        return ToolRun(tool, call, self.timeout if tool.timeout is None else tool.timeout, self.loop)

    def _take_in(self, call: ToolCall, run: ToolRun | Outcome) -> Generator[AgentEvent, None, None]:
        if isinstance(run, Outcome):
            yield self._result(call, run.text, error=run.error)
            return
        stream: MessageStream | None = None
        try:
            for piece in run.pieces(self._cancelled):
                if stream is None:
                    stream = self._open(call)
                stream.write(piece)
                yield OutputPiece(call, piece)
        except BaseException:
            if stream is not None:
                with suppress(InfLLMError):
                    self.settled.append(self._complete(call, stream, f"\n{INTERRUPTED}", error=True))
            raise
        outcome = run.outcome
        if stream is None:
            yield self._result(call, outcome.text, error=outcome.error)
        else:
            yield self._complete(call, stream, f"\n{outcome.text}" if outcome.text else "", error=outcome.error)
        if outcome.stop is not None:
            raise outcome.stop

    def _result(self, call: ToolCall | InvalidCall, text: str, *, error: bool) -> CallResult:
        return self._complete(call, self._open(call), text, error=error)

    def _open(self, call: ToolCall | InvalidCall) -> MessageStream:
        if isinstance(call, InvalidCall):
            return self.session.stream("tool")
        try:
            name: str | None = check_name(call.name)
        except InvalidName:  # a name that the model made up
            name = None
        return self.session.stream("tool", name=name, call_id=call.id)

    def _complete(self, call: ToolCall | InvalidCall, stream: MessageStream, text: str, *, error: bool) -> CallResult:
        """Write the rest of a result and commit it, which is done even if the model is stopped while it reads."""
        self._attempt(lambda: stream.write(text))
        self._attempt(stream.close)
        assert stream.message is not None
        result = CallResult(call, stream.message.text, error)
        self.results.append(result)
        self.session.commit()
        return result

    def _attempt(self, take_in: Callable[[], object]) -> None:
        """Let the session take something in. It has it even if stopped: what the model has not read yet waits."""
        try:
            take_in()
        except Cancelled:
            self.cut_off = True

    def _settle(self) -> None:
        """Give every call that has no result one, and commit."""
        self.settled += [self._result(call, INTERRUPTED, error=True) for call in unanswered(self.session)]
        self.session.commit()

    def _cancelled(self) -> bool:
        return self.cut_off or self.session.cancelled()  # which may be set at any time

    def _usage(self) -> Usage:
        used = [reply.usage for reply in self.replies]
        return Usage(**{part.name: sum(getattr(usage, part.name) for usage in used) for part in fields(Usage)})


def unanswered(session: Session) -> list[ToolCall]:
    """The calls of the last answer that have no result, unless the dialogue has gone on without them."""
    answered: list[str | None] = []
    for message in reversed(session.messages(-LOOK_BACK)):
        if message.role == "tool":
            answered.append(message.call_id or message.name)
        elif message.role == "assistant":
            return [call for call in message.calls if not _taken_from(answered, call.id or call.name)]
        elif message.role == "user":
            break
    return []


def _taken_from(answered: list[str | None], key: str) -> bool:
    if key in answered:
        answered.remove(key)
        return True
    return False


def _what_is_wrong(invalid: InvalidCall, reply: Reply) -> str:
    cut = "the answer was cut off by its limit of tokens, and " if reply.finish_reason == "length" else ""
    return f"error: this is no call: {cut}{invalid.reason}. You wrote: {invalid.text:.200}"


_at_work: WeakSet[Session] = WeakSet()
_at_work_lock = threading.Lock()


@contextmanager
def _alone(session: Session) -> Iterator[None]:
    """One run at a time: the messages of two would be mixed."""
    with _at_work_lock:
        if session in _at_work:
            raise SessionBusy(f'session "{session.name}": an agent works on it; wait for its end, or fork the session')
        _at_work.add(session)
    try:
        yield
    finally:
        with _at_work_lock:
            _at_work.discard(session)
