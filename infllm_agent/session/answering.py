"""One answer of a session: from the request to the message that stands in the history."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from infllm_agent.chat.call_form import short_id
from infllm_agent.chat.format import ChatFormat
from infllm_agent.config import SamplingConfig, TraceMode
from infllm_agent.errors import Cancelled, ConfigError, SessionBusy
from infllm_agent.generation.constraint import Constraint
from infllm_agent.generation.grammar import Grammars
from infllm_agent.generation.writer import Writer
from infllm_agent.memory.trace_recorder import TraceRecorder
from infllm_agent.messages import Message, Turn
from infllm_agent.reply import Reply, Usage
from infllm_agent.session.working_copy import State, WorkingCopy
from infllm_agent.tools import ToolCall, ToolSpec
from infllm_agent.trace import Trace


def writer_for(
    grammars: Grammars,
    config: SamplingConfig,
    *,
    prefix: str,
    tools: Sequence[ToolSpec],
    tool_choice: str,
    parallel_calls: bool,
    schema: dict[str, Any] | None,
) -> Writer:
    """Make what writes the answer; ``Session.stream_reply`` says what the arguments mean.

    Raises:
        ConfigError: arguments that contradict each other, or a prefix with which the answer cannot begin.
        UnsupportedSchema.
    """
    chat = grammars.chat
    constraint = _constraint(grammars, tools, tool_choice, parallel_calls, schema)
    if constraint is not None and not constraint.start_with(chat.encoder.encode_text(prefix)):
        raise ConfigError(f"the answer cannot begin with the prefix {prefix!r:.60}: its form does not allow it")
    names = frozenset(tool.name for tool in tools) if tools else None
    return Writer(chat, config, prefix=prefix, constraint=constraint, names=names)


class Answer:
    """An answer that is being generated.

    Args:
        working: the session it is given in.
        chat: the model's.
        writer: what writes it.
        prefix: the words it begins with.
        trace: of which of its tokens it is recorded what they attend to.
        finished: told of it once it stands in the history.
    """

    def __init__(
        self,
        working: WorkingCopy,
        chat: ChatFormat,
        writer: Writer,
        *,
        prefix: str,
        trace: TraceMode,
        finished: Callable[[Reply], None],
    ) -> None:
        self._working, self._chat, self._writer, self._prefix = working, chat, writer, prefix
        self._trace, self._finished = trace, finished
        self._first_token_s = 0.0

    def pieces(self) -> Generator[str, None, None]:
        """Let the model speak: give the answer's text piece by piece, then enter it in the history.

        If the iterator is closed early, or the session's ``cancelled`` says so, the answer so far is kept.

        Raises:
            SessionClosed: the session was closed meanwhile; the answer is lost.
            SessionBusy: the session was rolled back meanwhile; likewise.
        """
        # The lock is not held between pieces: the caller may take them from different threads.
        working, writer = self._working, self._writer
        logits = self._begin()
        try:
            if self._prefix:
                yield self._prefix
            tokens, piece = writer.begin()
            while True:
                if not tokens and not writer.finish_reason:
                    assert logits is not None
                    tokens, piece = writer.write(logits)
                self._first_token_s = self._first_token_s or time.perf_counter() - self._began
                with working.use():
                    self._check_open()
                    working.take(tokens)
                if piece:
                    yield piece
                if writer.finish_reason or working.cancelled():
                    break
                with working.use():
                    self._check_open()
                    self._recording.attend(len(writer.generated))
                    try:
                        logits = working.feed(len(tokens))
                    except Cancelled:  # between chunks of forced tokens
                        break
                tokens = []
            if piece := writer.finish("cancelled"):
                yield piece
        except BaseException:
            # Also when the caller leaves early: the turn is closed with what was said.
            with working.lock:
                if working.turn is self:
                    self._complete()
            raise
        with working.use():
            self._check_open()
            self._complete()

    def _begin(self) -> Tensor | None:
        """Open the turn and have the model read everything up to it; give the logits of its first token."""
        working, chat = self._working, self._chat
        with working.use():
            working.begin(State.GENERATING, self)
            self._began, self._time = time.perf_counter(), time.time()
            self._start, fed_before = working.token_count, working.memory.length
            try:
                self._recording = _Recording(working, self._trace)
                # The last message and the request to answer go through the model as a chunk of their own: the lookup
                # is then asked by the question alone. What waits before it goes first.
                working.feed(max(0, working.last_start - fed_before), first=True)
                working.take(chat.generation_prompt() + chat.encoder.encode_text(self._prefix))
                self._recording.attend(0)  # the answer's first token is decided by the question's last
                logits = working.feed(len(working.pending), before_answer=True)
            except BaseException:
                working.memory.recorder = None
                if working.token_count > self._start:  # the turn was opened: close it, so that the next message fits
                    working.take(chat.close("assistant"))
                    working.record(Turn("assistant", self._prefix), self._start, self._time)
                working.end()
                raise
            self._input_tokens, self._prefilled = working.token_count, working.memory.length - fed_before
            return logits

    def _check_open(self) -> None:
        if self._working.turn is not self:
            raise SessionBusy("this answer was taken back, with what came after the last commit")

    def _complete(self) -> None:
        """Close the turn and enter the answer in the history."""
        working, writer, chat = self._working, self._writer, self._chat
        working.memory.recorder = None
        working.end()
        writer.finish("cancelled")
        ended = bool(writer.generated) and writer.generated[-1] in chat.stop_ids
        working.take(chat.after_stop(writer.generated[-1]) if ended else chat.close("assistant"))
        calls = _with_ids(writer.calls, f"{working.store.id} {working.message_count}")
        message = working.record(Turn("assistant", writer.text, calls=calls), self._start, self._time)
        trace = self._recording.trace(message)
        if trace.queries:
            working.keep_trace(trace)
        self._finished(
            Reply(
                text=message.text,
                usage=Usage(
                    self._input_tokens, self._prefilled, self._input_tokens - self._prefilled, len(writer.generated)
                ),
                finish_reason=writer.finish_reason,
                first_token_s=self._first_token_s,
                seconds=time.perf_counter() - self._began,
                trace=trace,
                message=message,
                tool_calls=calls,
                invalid_calls=writer.invalid_calls,
            )
        )


class _Recording:
    """What an answer attends to, for the tokens that the session traces."""

    def __init__(self, working: WorkingCopy, mode: TraceMode) -> None:
        self._memory = working.memory
        self._recorder = TraceRecorder(list(self._memory.layers), block_size=working.config.block_size, mode=mode)
        self._counters = self._memory.cache_counters()
        self._question_start = working.last_start

    def attend(self, token: int) -> None:
        """Record, if it is traced, what is fed next: it decides the answer's token of that number."""
        self._memory.recorder = self._recorder if self._recorder.traces(token) else None

    def trace(self, answer: Message) -> Trace:
        """Sum up what was recorded of an answer."""
        memory = self._memory
        hits, misses = (now - before for now, before in zip(memory.cache_counters(), self._counters, strict=True))
        return self._recorder.trace(
            answer.index, answer.index - 1, self._question_start, n_sinks=memory.n_sinks, hits=hits, misses=misses
        )


def _constraint(
    grammars: Grammars,
    tools: Sequence[ToolSpec],
    tool_choice: str,
    parallel_calls: bool,
    schema: dict[str, Any] | None,
) -> Constraint | None:
    if schema is not None:
        if tool_choice not in ("auto", "none"):
            raise ConfigError(f'schema and tool_choice "{tool_choice}" contradict each other: give one of them')
        if tools and tool_choice == "auto":
            return grammars.calls_or_schema(tools, schema, parallel=parallel_calls)
        return grammars.schema(schema)
    if not tools and tool_choice in ("auto", "none"):
        return None
    return grammars.calls(tools, tool_choice, parallel=parallel_calls)


def _with_ids(calls: Sequence[ToolCall], answer: str) -> tuple[ToolCall, ...]:
    """Give each call an id of its own, made from the answer's: results must say which call they are of."""
    named: list[ToolCall] = []
    for number, call in enumerate(calls):
        if call.id is None or call.id in [other.id for other in named]:
            call = replace(call, id=short_id(f"{answer} {number}"))
        named.append(call)
    return tuple(named)
