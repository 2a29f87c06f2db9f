"""A message that comes into a session in pieces."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from infllm_agent.chat.format import TextStream
from infllm_agent.errors import SessionBusy
from infllm_agent.messages import Message
from infllm_agent.tools import ToolCall, ToolSpec

if TYPE_CHECKING:
    from infllm_agent.session.session import Session


class MessageStream:
    """A message that arrives piece by piece; what is written is ingested at once, chunk by chunk.

    Use it in a ``with`` statement. If the block fails, the message is closed with what had arrived.
    """

    def __init__(
        self,
        session: Session,
        role: str,
        name: str | None,
        call_id: str | None,
        calls: tuple[ToolCall, ...],
        tools: tuple[ToolSpec, ...],
    ) -> None:
        self._session = session
        self._role, self._name, self._call_id = role, name, call_id
        self._calls, self._tools = calls, tools
        self._start, self._time = session.token_count, time.time()
        self._pieces: list[str] = []
        self._tokens = TextStream(session.chat.encoder)
        self.message: Message | None = None

    def begin(self) -> MessageStream:
        """The message begins: what stands before its text enters the session."""
        session, first = self._session, self._start == 0
        session._take(
            session.chat.open(self._role, name=self._name, first=first, tools=self._tools, call_id=self._call_id)
        )
        return self

    @classmethod
    def resume(cls, session: Session, record: dict[str, Any]) -> MessageStream:
        """The message that ``record`` was made of, open again. The session has the tokens that it had then."""
        # Neither the assistant's messages nor the system's come in pieces: there are no calls and no tools.
        stream = cls(session, record["role"], record["name"], record["call_id"], (), ())
        stream._start, stream._time = record["start"], record["time"]
        stream._pieces = [record["text"]]
        stream._tokens.write(record["held"])  # had no place where words part, so nothing comes out
        return stream

    def record(self) -> dict[str, Any]:
        """What has arrived so far, for JSON."""
        return {
            "role": self._role,
            "name": self._name,
            "call_id": self._call_id,
            "start": self._start,
            "time": self._time,
            "text": "".join(self._pieces),
            "held": self._tokens.held,
        }

    def write(self, text: str) -> None:
        """Append text; returns when all full chunks of it have gone through the model."""
        with self._session._working():
            if self._session.open_message is not self:
                raise SessionBusy("this message is complete; open another")
            text = self._session.chat.encoder.clean(text)
            self._pieces.append(text)
            self._session._take(self._tokens.write(text))
            self._session._ingest_if_eager()

    def close(self) -> Message:
        """Complete the message; more than once does no harm."""
        with self._session._working():
            if self.message is None:
                if self._session.open_message is not self:
                    raise SessionBusy("this message was taken back, with what came after the last commit")
                text = "".join(self._pieces)
                close = self._session.chat.close(
                    self._role,
                    name=self._name,
                    tools=self._tools,
                    call_id=self._call_id,
                    calls=self._calls,
                    after_text=bool(text),
                )
                self._session._take(self._tokens.close() + close)
                self.message = self._session._record(
                    self._role, text, self._start, self._time, self._name, self._call_id, self._calls, self._tools
                )
                self._session._stream = None
                self._session._ingest_if_eager()
            return self.message

    def __enter__(self) -> MessageStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
