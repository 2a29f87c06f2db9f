"""What happens in sessions, told to whoever counts it; every event but a chunk is a line of the log too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from infllm_agent.errors import Cancelled, Stopped
from infllm_agent.memory.context import ContextMemory
from infllm_agent.messages import Message
from infllm_agent.platform.logs import event
from infllm_agent.reply import Reply

log = logging.getLogger(__name__)

_NOTHING = nullcontext()


class Load(NamedTuple):
    """What a runtime has open, and to do, at one moment.

    Attributes:
        sessions: open ones.
        running: live sessions that are worked on.
        items, chars: queued messages and requests for answers, and their text.
        waiting: threads that wait for their turn at the model.
        bytes: of the open sessions' memories by tier: ``device``, ``host``, and ``disk`` for mapped files.
    """

    sessions: int
    running: int
    items: int
    chars: int
    waiting: int
    bytes: dict[str, int]


class Observer:
    """Told of everything by a runtime's sessions, from any thread. This one writes the log.

    The log never has the text of a message. What an error says may quote a value that was given.
    """

    def opened(self, session: str, messages: int, tokens: int) -> None:
        """A session was opened or made; what it holds."""
        said = 'session "%(session)s": opened with %(messages)d messages, %(tokens)d tokens'
        event(log, logging.INFO, "opened", said, session=session, messages=messages, tokens=tokens)

    def closed(self, session: str) -> None:
        event(log, logging.INFO, "closed", 'session "%(session)s": closed', session=session)

    def forked(self, session: str, source: str, read_again: int) -> None:
        """A session was made from another; tokens that went through the model again for it."""
        said = 'session "%(session)s": made from "%(source)s", %(read_again)d tokens read again'
        event(log, logging.INFO, "forked", said, session=session, source=source, read_again=read_again)

    def message(self, session: str, message: Message) -> None:
        """A message is complete, and in the session's history."""
        tokens = message.end - message.start
        said = 'session "%(session)s": message %(number)d of the %(role)s, %(tokens)d tokens'
        event(
            log, logging.INFO, "message", said, session=session, number=message.index, role=message.role, tokens=tokens
        )

    def reading(self, memory: ContextMemory, tokens: int) -> AbstractContextManager[None]:
        """Around one forward of so many tokens."""
        return _NOTHING

    def answer_begins(self, queued_s: float) -> None:
        """An answer that was asked of a live session so many seconds ago."""

    def answered(self, session: str, reply: Reply) -> None:
        said = (
            'session "%(session)s": answer of %(output_tokens)d tokens in %(seconds).2f s, the first after '
            "%(first_token_s).2f s (%(finish_reason)s); %(prefilled_tokens)d tokens read for it"
        )
        event(
            log,
            logging.INFO,
            "answered",
            said,
            session=session,
            output_tokens=reply.usage.output_tokens,
            prefilled_tokens=reply.usage.prefilled_tokens,
            input_tokens=reply.usage.input_tokens,
            finish_reason=reply.finish_reason,
            first_token_s=round(reply.first_token_s, 6),
            seconds=round(reply.seconds, 6),
        )

    def committed(self, session: str, generation: int, tokens: int, seconds: float) -> None:
        """All is on disk; the session's tokens, and how long it took."""
        said = 'session "%(session)s": committed as generation %(generation)d, %(tokens)d tokens, in %(seconds).3f s'
        seconds = round(seconds, 6)
        event(
            log, logging.INFO, "committed", said, session=session, generation=generation, tokens=tokens, seconds=seconds
        )

    def failed(self, session: str, error: BaseException) -> None:
        """Somebody's work failed. An error that passes several hands on its way out is told once; a wish to stop is
        none."""
        if not isinstance(error, Exception) or isinstance(error, (Cancelled, Stopped)) or hasattr(error, "_told"):
            return
        error._told = True  # type: ignore[attr-defined]
        kind = type(error).__name__
        said = 'session "%(session)s": %(error)s: %(reason)s'
        event(log, logging.WARNING, "failed", said, session=session, error=kind, reason=str(error))
        self.count_failure(kind)

    def count_failure(self, kind: str) -> None:
        """An error of this class was told."""

    @contextmanager
    def watching(self, session: str) -> Iterator[None]:
        """Tell of what fails inside."""
        try:
            yield
        except BaseException as error:
            self.failed(session, error)
            raise
