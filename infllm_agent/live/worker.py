"""The work on one live session: what is queued goes into the log, the log through the model, answers come out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing, suppress

from infllm_agent.config import RuntimeConfig
from infllm_agent.errors import Cancelled, InfLLMError, Stopped, StorageError
from infllm_agent.live.inbox import Flush, Inbox, Loan, PendingReply, Post, Receipt
from infllm_agent.messages import Message
from infllm_agent.session.session import Session

log = logging.getLogger(__name__)

#: Seconds that a worker waits for the next piece of a message before it leaves.
LINGER = 0.2


class Worker:
    """Works through one session's inbox, in one thread.

    Messages are taken as soon as possible: into the log, and to disk, whereupon they are acknowledged; the model reads
    them later, chunk by chunk, and between two chunks whatever has come is taken. Only an answer that was asked for at
    once goes before the disk.

    Args:
        stopping: whether to take what is queued, finish nothing else, and leave.
        give_way: told how many seconds this has taken; whether others need the place.
    """

    def __init__(
        self,
        session: Session,
        inbox: Inbox,
        config: RuntimeConfig,
        *,
        stopping: Callable[[], bool],
        give_way: Callable[[float], bool],
    ) -> None:
        self.session = session
        self.inbox = inbox
        self.config = config
        self.stopping = stopping
        self.give_way = give_way
        self._taken: list[tuple[Receipt, Message]] = []  # not on disk yet
        self._asked: PendingReply | None = None  # that is being given

    def work(self) -> bool:
        """Until there is nothing to do; returns whether there is, because others need the place.

        Raises:
            Exception: the session is unusable, or its files are; ``fail_taken`` tells those whose messages are lost.
        """
        session, began = self.session, time.monotonic()
        session.eager, session.cancelled = False, self._is_cancelled
        try:
            if session.open_message is not None and not self._is_arriving():
                session.abandon_stream()  # of a process that ended in the middle of it
            while not self.stopping():
                self._take_messages()
                head = self.inbox.head()
                if isinstance(head, Loan):
                    self._commit()
                    return False
                if isinstance(head, PendingReply):
                    self._answer(head)
                elif session.pending_tokens >= session.config.chunk_size:
                    self._read()
                    if self.give_way(time.monotonic() - began):
                        self._commit()
                        return True
                elif isinstance(head, Flush):
                    self._commit()
                    if head.set_running_or_notify_cancel():
                        head.set_result(None)
                    self.inbox.drop(head)
                elif not self._more_comes():
                    if not self._is_arriving() or self.session.is_due:
                        self._commit()
                    if not self.inbox.has_work:
                        return False
            self._drain()
            return False
        finally:
            session.eager = True
            session.cancelled = lambda: False

    def fail_taken(self, error: BaseException) -> None:
        """What was taken and is not on disk is lost."""
        for receipt, _ in self._taken:
            receipt.set_exception(error)

    def _take_messages(self, *, all_of_them: bool = False) -> None:
        """Move messages from the queue to the session's log, as far as not too much waits for the model already."""
        session = self.session
        while all_of_them or session.pending_tokens < self.config.waiting_tokens:
            post = self.inbox.head()
            if not isinstance(post, Post):
                break
            try:
                if post.streamed:
                    if not self._take_pieces(post):
                        break
                else:
                    text = self.inbox.take_text(post)
                    message = session.add(post.turn._replace(text=text))
                    self._taken.append((post.receipt, message))
            except (InfLLMError, ValueError) as error:  # of this message: a role or a name that there is not
                session.observer.failed(session.name, error)
                if session.closed:
                    raise
                post.fail(error)
            self.inbox.drop(post)
        if self._taken and not isinstance(self.inbox.head(), PendingReply):  # which is committed with what it answers
            self._commit()

    def _take_pieces(self, post: Post) -> bool:
        """Whether the message is complete."""
        stream = self.session.open_message if post.begun else None
        if stream is None:
            stream = self.session.stream(post.turn.role, name=post.turn.name, call_id=post.turn.call_id)
            post.begun = True
        over = self.inbox.is_over(post)
        if not over and (text := self.inbox.take_text(post)):
            stream.write(text)
            over = self.inbox.is_over(post)
        if over:
            self._taken.append((post.receipt, stream.close()))
        return over

    def _answer(self, answer: PendingReply) -> None:
        session, self._asked = self.session, answer
        session.observer.answer_begins(time.perf_counter() - answer.asked)
        try:
            with closing(session.stream_reply(**answer.options)) as pieces:
                for piece in pieces:
                    answer.put(piece)
            self._commit()
            assert session.last_reply is not None
            answer.reply.set_result(session.last_reply)
        except Exception as error:
            if self.stopping() and isinstance(error, Cancelled):
                error = Stopped(f'session "{session.name}": the runtime stopped before there was an answer')
            session.observer.failed(session.name, error)
            answer.fail(error)
            if session.closed or isinstance(error, StorageError):
                raise
            self._commit()
        finally:
            self._asked = None
            self.inbox.drop(answer)

    def _read(self) -> None:
        with suppress(Cancelled):
            self.session.ingest(chunks=1)
        if self.session.is_due:
            self._commit()

    def _commit(self) -> None:
        self.session.commit()
        taken, self._taken = self._taken, []
        for receipt, message in taken:
            receipt.set_result(message)

    def _is_cancelled(self) -> bool:
        return self.stopping() or (self._asked is not None and self._asked.cancelled)

    def _is_arriving(self) -> bool:
        head = self.inbox.head()
        return isinstance(head, Post) and head.begun

    def _more_comes(self) -> bool:
        """Wait a little for the next piece of a message that is arriving."""
        if not self._is_arriving():
            return False
        self.inbox.news.clear()
        return self.inbox.has_work or self.inbox.news.wait(LINGER)

    def _drain(self) -> None:
        """Take what is queued before the next loan, without the model; what is arriving ends with what has come."""
        self._take_messages(all_of_them=True)
        while (item := self.inbox.head()) is not None and not isinstance(item, Loan):
            if isinstance(item, Post):
                self.session.abandon_stream()
            item.fail(Stopped(f'session "{self.session.name}": the runtime stopped'))
            self.inbox.drop(item)
            self._take_messages(all_of_them=True)
        self._commit()
