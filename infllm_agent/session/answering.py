"""One answer of a session: from the request to the message that stands in the history."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from infllm_agent.chat.call_form import short_id
from infllm_agent.config import SamplingConfig
from infllm_agent.errors import Cancelled, ConfigError
from infllm_agent.generation.constraint import Constraint
from infllm_agent.generation.grammar import Grammars
from infllm_agent.generation.writer import Writer
from infllm_agent.memory.trace_recorder import TraceRecorder
from infllm_agent.messages import Message
from infllm_agent.reply import Reply, Usage
from infllm_agent.tools import ToolCall, ToolSpec
from infllm_agent.trace import Trace

if TYPE_CHECKING:
    from infllm_agent.session.session import Session


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
    """What writes the answer; ``Session.stream_reply`` says what the arguments mean.

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


def generate(session: Session, writer: Writer, prefix: str) -> Generator[str, None, None]:
    """Let the model speak: the answer's text piece by piece; at the end it is the session's last message and reply.

    If the iterator is closed early, or the session's ``cancelled`` says so, the answer so far is kept.
    """
    # The lock is not held between pieces: the caller may take them from different threads.
    with session._working():
        session._idle()
        session._generating = True
    began, written = time.perf_counter(), time.time()
    start = session.token_count
    recorder = _Recording(session)
    try:
        with session._working():
            fed_before = session.memory.length
            # The last message and the request to answer go through the model as a chunk of their own: the lookup
            # is then asked by the question alone. What waits before it goes first.
            session._feed(max(0, session._last_start - session.memory.length), first=True)
            session._take(session.chat.generation_prompt() + session.chat.encoder.encode_text(prefix))
            recorder.attend(0)  # the answer's first token is decided by the question's last
            logits = session._feed(len(session._pending), before_answer=True)
    except BaseException:
        session.memory.recorder = None
        session._generating = False
        if session.token_count > start:  # the turn was opened: close it, so that the next message stands well
            session._take(session.chat.close("assistant"))
            session._record("assistant", prefix, start, written, None, None)
        raise
    input_tokens, prefilled = session.token_count, session.memory.length - fed_before
    first_token_s = 0.0
    try:
        if prefix:
            yield prefix
        tokens, piece = writer.begin()
        while True:
            if not tokens and not writer.finish_reason:
                assert logits is not None
                tokens, piece = writer.write(logits)
            first_token_s = first_token_s or time.perf_counter() - began
            session._take(tokens)
            if piece:
                yield piece
            if writer.finish_reason or session.cancelled():
                break
            with session._working():
                recorder.attend(len(writer.generated))
                try:
                    logits = session._feed(len(tokens))
                except Cancelled:  # between chunks of forced tokens
                    break
            tokens = []
        if piece := writer.finish("cancelled"):
            yield piece
    finally:
        # Also when the caller leaves early: the turn is closed with what was said.
        session.memory.recorder = None
        session._generating = False
        writer.finish("cancelled")
        ended = bool(writer.generated) and writer.generated[-1] in session.chat.stop_ids
        session._take(session.chat.after_stop(writer.generated[-1]) if ended else session.chat.close("assistant"))
        calls = _with_ids(session, writer.calls)
        message = session._record("assistant", writer.text, start, written, None, None, calls)
        trace = recorder.trace(message)
        if trace.queries:
            session._new_traces.append(trace)
        session.last_reply = Reply(
            text=message.text,
            usage=Usage(input_tokens, prefilled, input_tokens - prefilled, len(writer.generated)),
            finish_reason=writer.finish_reason,
            first_token_s=first_token_s,
            seconds=time.perf_counter() - began,
            trace=trace,
            message=message,
            tool_calls=calls,
            invalid_calls=writer.invalid_calls,
        )
        session.observer.answered(session.name, session.last_reply)


class _Recording:
    """What an answer attends to, for the tokens that the session traces."""

    def __init__(self, session: Session) -> None:
        memory, config = session.memory, session.config
        self._session = session
        self._recorder = TraceRecorder(list(memory.layers), block_size=config.block_size, mode=session.trace)
        self._counters = memory.cache_counters()
        self._question_start = session._last_start

    def attend(self, token: int) -> None:
        """What is fed next decides the answer's token of that number."""
        self._session.memory.recorder = self._recorder if self._recorder.traces(token) else None

    def trace(self, answer: Message) -> Trace:
        memory = self._session.memory
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


def _with_ids(session: Session, calls: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
    """The calls, each with an id of its own: results must say what they answer."""
    named: list[ToolCall] = []
    for number, call in enumerate(calls):
        if call.id is None or call.id in [other.id for other in named]:
            call = replace(call, id=short_id(f"{session.store.id} {session.message_count} {number}"))
        named.append(call)
    return tuple(named)
