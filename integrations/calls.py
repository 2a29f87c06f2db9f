"""One call: turns go into a session, and the chunks of an answer come out."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TypeVar

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk

from infllm_agent.config import SamplingConfig
from infllm_agent.errors import Cancelled
from infllm_agent.integrations.desk import CancelCheck, all_or_nothing, desk_of
from infllm_agent.integrations.turns import Turn
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session import Session

T = TypeVar("T")


def never() -> bool:
    """The check of a call that nobody cancels."""
    return False


def answer_history(
    runtime: AgentRuntime, base: str, turns: Sequence[Turn], sampling: SamplingConfig, cancelled: CancelCheck
) -> Iterator[ChatGenerationChunk]:
    """Answer a whole history, in the session of the family ``base`` that holds most of it."""
    turns = [turn._replace(text=runtime.chat.encoder.clean(turn.text)) for turn in turns]
    with desk_of(runtime).by_history(runtime, base, turns, cancelled) as session:
        yield from _answer(session, turns[session.message_count :], sampling, cancelled)


def answer_events(
    runtime: AgentRuntime, name: str, turns: Sequence[Turn], sampling: SamplingConfig | None, cancelled: CancelCheck
) -> Iterator[ChatGenerationChunk]:
    """Append to a session as it stands, and answer, if ``sampling`` says how."""
    with desk_of(runtime).by_name(runtime, name, cancelled) as session:
        if sampling is not None:
            yield from _answer(session, turns, sampling, cancelled)
        else:
            with all_or_nothing(session, cancelled):
                _append(session, turns)
            yield _last_chunk(session)


def _answer(
    session: Session, turns: Sequence[Turn], sampling: SamplingConfig, cancelled: CancelCheck
) -> Iterator[ChatGenerationChunk]:
    """Append messages and answer: pieces of text, then a chunk without text that says what it took."""
    kept = session.memory.length
    with all_or_nothing(session, cancelled):
        _append(session, turns)
        with closing(session.stream_reply(**sampling.model_dump())) as pieces:
            for piece in pieces:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        reply = session.last_reply
        assert reply is not None
        if reply.finish_reason == "cancelled":
            raise Cancelled(f'session "{session.name}": stopped while answering')
    usage = UsageMetadata(
        input_tokens=reply.usage.input_tokens,
        output_tokens=reply.usage.output_tokens,
        total_tokens=reply.usage.input_tokens + reply.usage.output_tokens,
        input_token_details=InputTokenDetails(
            cache_read=kept,
            # More than the reply's own count: what was appended may have gone through the model already then.
            cache_creation=reply.usage.input_tokens - kept,
        ),
    )
    yield _last_chunk(session, finish_reason=reply.finish_reason, usage=usage)


def _append(session: Session, turns: Sequence[Turn]) -> None:
    for turn in turns:
        session.append(turn.role, turn.text, name=turn.name, call_id=turn.call_id)


def _last_chunk(
    session: Session, *, finish_reason: str | None = None, usage: UsageMetadata | None = None
) -> ChatGenerationChunk:
    info = {"finish_reason": finish_reason} if finish_reason else {}
    metadata = {"model_name": session.model.name, "session_id": session.name}
    message = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata | info, chunk_position="last")
    return ChatGenerationChunk(message=message, generation_info=info)


@contextmanager
def time_limit(seconds: float | None, cancelled: CancelCheck) -> Iterator[CancelCheck]:
    """A check that also says yes when the time is up, which then is a TimeoutError."""
    end = time.monotonic() + (math.inf if seconds is None else seconds)

    def is_over() -> bool:
        return time.monotonic() > end

    try:
        yield lambda: cancelled() or is_over()
    except Cancelled as error:
        if is_over() and not cancelled():
            raise TimeoutError(f"no answer within timeout={seconds} s ({error})") from None
        raise


async def from_thread(produce: Callable[[CancelCheck], Iterator[T]]) -> AsyncGenerator[T, None]:
    """What ``produce`` yields in a thread of its own.

    Closed early, or cancelled, it tells ``produce`` to stop and waits until it has.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[tuple[T, ...] | None] = asyncio.Queue()  # None: the end
    left = threading.Event()
    failure: BaseException | None = None

    def hand_over(item: tuple[T, ...] | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits any more
            left.set()

    def work() -> None:
        nonlocal failure
        try:
            for item in produce(left.is_set):
                hand_over((item,))
        except BaseException as error:
            failure = error
        hand_over(None)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), name="infllm-agent-reply").start()
    items: tuple[T, ...] | None = ()
    try:
        while (items := await arrived.get()) is not None:
            for item in items:
                yield item
    finally:
        left.set()
        while items is not None:
            items = await arrived.get()
    if failure is not None:
        raise failure
