"""A session beside its users: what comes in, from any thread or task, is queued and read in the background."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Generator, Sequence
from os import PathLike
from typing import Any, Protocol

from infllm_agent.live.inbox import Flush, Inbox, PendingReply, Post, Receipt
from infllm_agent.messages import Message, Turn
from infllm_agent.reply import Reply
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.tools import ToolCall, ToolSpec


class Home(Protocol):
    """Where the session is; ``AgentRuntime`` is one."""

    root: str | PathLike[str]


class LiveSession:
    """A session of an ``AgentRuntime``, for many users at once. Made by ``AgentRuntime.live``.

    Messages and requests for answers are queued, and done in the order in which they came. A message is acknowledged
    when it is on disk; the model reads it in the background, so that the context is in the memory before it is asked.
    When more text is queued than ``RuntimeConfig.queued_chars``, writers wait.

    Every method that waits has a face for asyncio, with an ``a`` in front. The object holds nothing of the session and
    may be kept for ever.
    """

    def __init__(self, home: Home, name: str, inbox: Inbox) -> None:
        self.name = name
        self._home = home
        self._inbox = inbox

    # -- what comes in -----------------------------------------------------------------------------------------------

    def append(
        self,
        role: str,
        text: str,
        *,
        name: str | None = None,
        call_id: str | None = None,
        calls: Sequence[ToolCall] = (),
        tools: Sequence[ToolSpec] = (),
        timeout: float | None = None,
    ) -> Receipt:
        """Queue a whole message; arguments as for ``Session.append``.

        Args:
            timeout: seconds to wait for room in the queue; None waits for ever.

        Returns:
            Its receipt, done when the message is on disk. What is wrong with the message stands there.

        Raises:
            QueueFull: no room in time; the message was not taken.
            Stopped: the runtime is stopping.
        """
        self._inbox.wait_for_room(timeout)
        return self._put(Turn(role, text, name, call_id, tuple(calls), tuple(tools)))

    def append_system(self, text: str, *, tools: Sequence[ToolSpec] = ()) -> Receipt:
        return self.append("system", text, tools=tools)

    def append_user(self, text: str) -> Receipt:
        return self.append("user", text)

    def append_observation(self, text: str, name: str | None = None) -> Receipt:
        return self.append("observation", text, name=name)

    def append_tool_result(self, name: str, text: str, *, call_id: str | None = None) -> Receipt:
        return self.append("tool", text, name=name, call_id=call_id)

    async def aappend(
        self,
        role: str,
        text: str,
        *,
        name: str | None = None,
        call_id: str | None = None,
        calls: Sequence[ToolCall] = (),
        tools: Sequence[ToolSpec] = (),
    ) -> Receipt:
        """As ``append``; waits for room without holding up the loop. Await the receipt to know it on disk."""
        await asyncio.wrap_future(self._inbox.room())
        return self._put(Turn(role, text, name, call_id, tuple(calls), tuple(tools)))

    def stream(self, role: str, *, name: str | None = None, call_id: str | None = None) -> LiveStream:
        """A message that arrives in pieces, and is read while it arrives. What is queued after it waits for its end.

        Raises:
            Stopped: the runtime is stopping.
        """
        post = Post(Turn(role, "", name, call_id), streamed=True)
        self._inbox.put(post)
        return LiveStream(self._inbox, post)

    def stream_tool_result(self, name: str, *, call_id: str | None = None) -> LiveStream:
        return self.stream("tool", name=name, call_id=call_id)

    def stream_observation(self, name: str | None = None) -> LiveStream:
        return self.stream("observation", name=name)

    def _put(self, turn: Turn) -> Receipt:
        post = Post(turn, deque([turn.text]), complete=True)
        self._inbox.put(post)
        return post.receipt

    # -- what goes out -----------------------------------------------------------------------------------------------

    def stream_reply(self, **options: Any) -> Generator[str, None, Reply]:
        """The model's answer to all that was queued before, piece by piece; options as for ``Session.stream_reply``.

        It is asked for at once, not when the first piece is taken. The generator's value is the reply, committed. If it
        is closed early, the answer so far is kept as the message.

        Raises:
            Stopped: the runtime is stopping, and the answer had not begun.
            InfLLMError: what ``Session.stream_reply`` raises, when the first piece is taken.
        """
        answer = self._ask(options)
        return self._pieces(answer)

    def reply(self, **options: Any) -> Reply:
        """As ``stream_reply``, waiting for all of it."""
        return self._ask(options).reply.result()

    async def astream_reply(self, **options: Any) -> AsyncIterator[str]:
        """As ``stream_reply``; asked for when the first piece is."""
        answer = self._ask(options)
        try:
            while not answer.reply.done():
                await asyncio.wrap_future(answer.more())
                if piece := answer.next_piece():
                    yield piece
            if piece := answer.next_piece():
                yield piece
            answer.reply.result()
        finally:
            answer.cancelled = True

    async def areply(self, **options: Any) -> Reply:
        """As ``reply``. If the task is cancelled, the answer ends as it stands."""
        answer = self._ask(options)
        try:
            return await asyncio.shield(asyncio.wrap_future(answer.reply))
        finally:
            answer.cancelled = True

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all that was queued before has gone through the model, as far as it fills chunks, and is on disk.

        Raises:
            TimeoutError, Stopped.
        """
        flush = Flush()
        self._inbox.put(flush)
        flush.result(timeout)

    async def aflush(self) -> None:
        flush = Flush()
        self._inbox.put(flush)
        await asyncio.wrap_future(flush)

    def _ask(self, options: dict[str, Any]) -> PendingReply:
        answer = PendingReply(options)
        self._inbox.put(answer)
        return answer

    def _pieces(self, answer: PendingReply) -> Generator[str, None, Reply]:
        try:
            while not answer.reply.done():
                answer.more().result()
                if piece := answer.next_piece():
                    yield piece
            if piece := answer.next_piece():
                yield piece
            return answer.reply.result()
        finally:
            answer.cancelled = True

    # -- what is stored ----------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Messages and requests that are not done yet."""
        return len(self._inbox)

    def messages(self, start: int = 0, stop: int | None = None) -> list[Message]:
        """The history as it is on disk, as ``list[start:stop]`` means it.

        Raises:
            UnknownSession: no message has come yet.
        """
        with SessionStore.open(self._home.root, self.name, readonly=True) as store:
            return store.messages(start, stop)


class LiveStream:
    """A message that arrives in a live session piece by piece. Use it in a ``with`` or an ``async with`` statement.

    If the block fails, the message ends with what had arrived.

    Attributes:
        receipt: done when the message is complete and on disk.
    """

    def __init__(self, inbox: Inbox, post: Post) -> None:
        self._inbox = inbox
        self._post = post

    @property
    def receipt(self) -> Receipt:
        return self._post.receipt

    def write(self, text: str, *, timeout: float | None = None) -> None:
        """Queue a piece; returns when there is room for more.

        Raises:
            QueueFull: no room within ``timeout`` seconds; the piece was not taken.
            Stopped: the runtime is stopping; the message stands with what had arrived.
        """
        self._inbox.wait_for_room(timeout)
        self._inbox.write(self._post, text)

    async def awrite(self, text: str) -> None:
        """As ``write``, without holding up the loop."""
        await asyncio.wrap_future(self._inbox.room())
        self._inbox.write(self._post, text)

    def close(self) -> Receipt:
        """The message is complete; more than once does no harm."""
        self._inbox.complete(self._post)
        return self.receipt

    def __enter__(self) -> LiveStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> LiveStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()
