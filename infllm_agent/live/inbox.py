"""What is on its way into a session, in order: messages, requests for answers, and callers who want it alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

from infllm_agent.errors import QueueFull
from infllm_agent.messages import Message, Turn
from infllm_agent.reply import Reply


class Receipt(Future[Message]):
    """Of a message that was handed in: done as soon as the message is on disk, so that no crash loses it.

    ``result(timeout)`` waits for the message as it stands in the history; ``await`` does the same.
    """

    def __await__(self) -> Generator[Any, None, Message]:
        return asyncio.wrap_future(self).__await__()

    def cancel(self) -> bool:
        """No: a message that was handed in is not taken back when nobody waits for its receipt any more."""
        return False


@dataclass(eq=False)
class Post:
    """A message on its way, whole or in pieces."""

    turn: Turn
    pieces: deque[str] = field(default_factory=deque)
    streamed: bool = False
    complete: bool = False  # nothing will be added to it
    begun: bool = False  # a part of it is in the session
    receipt: Receipt = field(default_factory=Receipt)

    def fail(self, error: BaseException) -> None:
        if not self.receipt.done():
            self.receipt.set_exception(error)


class PendingReply:
    """An answer that was asked for: its pieces as they come, then the reply. One reader at a time."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.asked = time.perf_counter()
        self.cancelled = False
        self._mutex = threading.RLock()
        self._pieces: deque[str] = deque()
        self._reader: Future[None] | None = None
        self.reply: Future[Reply] = Future()
        self.reply.add_done_callback(lambda _: self._wake())

    def put(self, piece: str) -> None:
        with self._mutex:
            self._pieces.append(piece)
        self._wake()

    def fail(self, error: BaseException) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)

    def next_piece(self) -> str | None:
        """What has come and was not taken yet; None if nothing has."""
        with self._mutex:
            text = "".join(self._pieces)
            self._pieces.clear()
            return text or None

    def more(self) -> Future[None]:
        """Done when there is a piece, or the reply is there."""
        with self._mutex:
            self._reader = Future()
            if self._pieces or self.reply.done():
                self._reader.set_result(None)
            return self._reader

    def _wake(self) -> None:
        with self._mutex:
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)


class Flush(Future[None]):
    """A wish to know when all that was queued before has gone through the model and is on disk."""

    def fail(self, error: BaseException) -> None:
        if self.set_running_or_notify_cancel():
            self.set_exception(error)


class Loan(Future[None]):
    """A wish to have the session alone, in the thread that asks; done when it is lent."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.thread = threading.get_ident()


Item = Post | PendingReply | Flush | Loan


class Inbox:
    """The queue of one session. Any thread puts in, one worker takes out.

    Args:
        limit: characters queued from which on there is no room.
        changed: called, without any lock, when there is something new for the worker.
    """

    def __init__(self, limit: int, changed: Callable[[], None]) -> None:
        self.limit = limit
        self._changed = changed
        self._mutex = threading.RLock()
        self._queue: deque[Item] = deque()
        self._chars = 0
        self._writers: list[Future[None]] = []
        self._refusal: BaseException | None = None
        self.news = threading.Event()

    @property
    def chars(self) -> int:
        """Characters queued."""
        return self._chars

    def __len__(self) -> int:
        return len(self._queue)

    def head(self) -> Item | None:
        with self._mutex:
            return self._queue[0] if self._queue else None

    @property
    def asks(self) -> bool:
        """Whether somebody waits for an answer."""
        with self._mutex:
            return any(isinstance(item, PendingReply) for item in self._queue)

    @property
    def has_work(self) -> bool:
        """Whether the worker could do something now."""
        head = self.head()
        return head is not None and not (isinstance(head, Post) and not head.pieces and not head.complete)

    def put(self, item: Item) -> None:
        with self._mutex:
            if self._refusal is not None and not isinstance(item, Loan):
                raise self._refusal
            self._queue.append(item)
            if isinstance(item, Post):
                self._chars += sum(map(len, item.pieces))
        self._tell()

    def write(self, post: Post, text: str) -> None:
        """Add a piece to a message that is queued."""
        with self._mutex:
            if post.receipt.done() and (error := post.receipt.exception()) is not None:
                raise error
            post.pieces.append(text)
            self._chars += len(text)
        self._tell()

    def complete(self, post: Post) -> None:
        with self._mutex:
            post.complete = True
        self._tell()

    def take_text(self, post: Post) -> str:
        """The pieces of the message so far; they are in the inbox no longer."""
        with self._mutex:
            text = "".join(post.pieces)
            post.pieces.clear()
            self._chars -= len(text)
            self._let_in()
            return text

    def is_over(self, post: Post) -> bool:
        """Whether all of the message has been taken."""
        with self._mutex:
            return post.complete and not post.pieces

    def drop(self, item: Item) -> None:
        """The head has been dealt with."""
        with self._mutex:
            self._queue.remove(item)
            if isinstance(item, Post):
                self._chars -= sum(map(len, item.pieces))
                item.pieces.clear()
            self._let_in()

    def refuse(self, error: BaseException) -> None:
        """Take no more messages and requests in. Callers who wait for the session get it when all that is queued has
        been dealt with."""
        with self._mutex:
            self._refusal = error
            self._let_in(all_of_them=True)  # to be refused
            self._queue = deque(sorted(self._queue, key=lambda item: isinstance(item, Loan)))

    def withdraw(self, loan: Loan) -> None:
        """Take a wish back, if it is still queued."""
        with self._mutex:
            if loan in self._queue:
                self._queue.remove(loan)

    def fail_all(self, error: BaseException) -> None:
        """Nothing of what is queued will be done, but for loans. What comes after is another matter."""
        with self._mutex:
            queued = [item for item in self._queue if not isinstance(item, Loan)]
            for item in queued:
                self.drop(item)
        for item in queued:
            item.fail(error)

    def room(self) -> Future[None]:
        """Done when there is room for more text."""
        future: Future[None] = Future()
        with self._mutex:
            if self._chars < self.limit:
                future.set_result(None)
            else:
                self._writers.append(future)
        return future

    def wait_for_room(self, timeout: float | None) -> None:
        """Raises QueueFull if there is none in time."""
        future = self.room()
        try:
            future.result(timeout)
        except FutureTimeout:
            future.cancel()
            raise QueueFull(
                f"{self._chars} characters are queued, and there was no room for more within {timeout} s: the model "
                "reads slower than this is written; wait longer, or raise queued_chars"
            ) from None

    def _let_in(self, *, all_of_them: bool = False) -> None:
        if all_of_them or self._chars < self.limit:
            for future in self._writers:
                if future.set_running_or_notify_cancel():
                    future.set_result(None)
            self._writers.clear()

    def _tell(self) -> None:
        self.news.set()
        self._changed()
