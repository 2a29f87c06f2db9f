"""A message that comes into a session in pieces."""

from __future__ import annotations

import time
from typing import Any

from infllm_agent.chat.format import ChatFormat, TextStream
from infllm_agent.errors import SessionBusy
from infllm_agent.messages import Message, Turn
from infllm_agent.session.working_copy import State, WorkingCopy


class MessageStream:
    """A message that arrives piece by piece; what is written is ingested at once, chunk by chunk.

    Use it in a ``with`` statement. If the block fails, the message is closed with what had arrived.
    """

    def __init__(self, working: WorkingCopy, chat: ChatFormat, turn: Turn) -> None:
        self._working, self._chat, self._turn = working, chat, turn
        self._around: dict[str, Any] = {"name": turn.name, "call_id": turn.call_id, "tools": turn.tools}
        self._start, self._time = working.token_count, time.time()
        self._pieces: list[str] = []
        self._tokens = TextStream(chat.encoder)
        self.message: Message | None = None

    def begin(self) -> MessageStream:
        """Open the message: what stands before its text enters the session."""
        with self._working.use():
            self._working.check_idle()
            opening = self._chat.open(self._turn.role, first=self._start == 0, **self._around)
            self._working.begin(State.ARRIVING, self)
            self._working.take(opening)
        return self

    @classmethod
    def resume(cls, working: WorkingCopy, chat: ChatFormat, record: dict[str, Any]) -> MessageStream:
        """Open the message that ``record`` was made of again. The session has the tokens that it had then."""
        # Neither the assistant's messages nor the system's come in pieces: there are no calls and no tools.
        stream = cls(working, chat, Turn(record["role"], "", record["name"], record["call_id"]))
        stream._start, stream._time = record["start"], record["time"]
        stream._pieces = [record["text"]]
        stream._tokens.write(record["held"])  # had no place where words part, so nothing comes out
        working.begin(State.ARRIVING, stream)
        return stream

    def record(self) -> dict[str, Any]:
        """Describe what has arrived so far, for JSON."""
        return {
            "role": self._turn.role,
            "name": self._turn.name,
            "call_id": self._turn.call_id,
            "start": self._start,
            "time": self._time,
            "text": "".join(self._pieces),
            "held": self._tokens.held,
        }

    def write(self, text: str) -> None:
        """Append text; returns when all full chunks of it have gone through the model.

        Raises:
            SessionClosed: the session was closed meanwhile.
            SessionBusy: the message is complete, or was taken back.
        """
        with self._working.use():
            if self._working.turn is not self:
                raise SessionBusy("this message is complete; open another")
            text = self._chat.encoder.clean(text)
            self._pieces.append(text)
            self._working.take(self._tokens.write(text))
            if self._working.eager:
                self._working.ingest()

    def close(self, *, read: bool = True) -> Message:
        """Complete the message; more than once does no harm.

        Args:
            read: False leaves what has not gone through the model waiting in the log, even in an eager session.

        Raises:
            SessionClosed: the session was closed meanwhile.
            SessionBusy: the message was taken back.
        """
        with self._working.use():
            if self.message is None:
                self.message = self._complete()
                if read and self._working.eager:
                    self._working.ingest()
            return self.message

    def _complete(self) -> Message:
        working = self._working
        if working.turn is not self:
            raise SessionBusy("this message was taken back, with what came after the last commit")
        text = "".join(self._pieces)
        close = self._chat.close(self._turn.role, calls=self._turn.calls, after_text=bool(text), **self._around)
        working.take(self._tokens.close() + close)
        message = working.record(self._turn._replace(text=text), self._start, self._time)
        working.end()
        return message

    def __enter__(self) -> MessageStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
