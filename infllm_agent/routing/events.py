"""What a call gives, as values: pieces of the answer, its calls of tools, and how it ended."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass

from infllm_agent.reply import Usage
from infllm_agent.tools import ToolCall


@dataclass(frozen=True)
class Piece:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class Called:
    """A call of a tool, which is for the caller to carry out."""

    call: ToolCall


@dataclass(frozen=True)
class Finished:
    """The end of a call, the last of its events: all of it is on disk.

    Attributes:
        session_id: the name of the session.
        model_name: the model that answered.
        finish_reason: as ``Reply``'s; None where no answer was asked for.
        usage: tokens of the answer; None where there is none. Input that an earlier call or the background had put
            through the model is ``reused``, all other input ``prefilled``.
    """

    session_id: str
    model_name: str
    finish_reason: str | None = None
    usage: Usage | None = None


Event = Piece | Called | Finished
Events = Generator[Event]


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    calls: tuple[ToolCall, ...]
    finished: Finished


def completion_of(events: Iterable[Event]) -> Completion:
    """Put all events of a call together."""
    *parts, finished = events
    assert isinstance(finished, Finished)
    text = "".join(event.text for event in parts if isinstance(event, Piece))
    return Completion(text, tuple(event.call for event in parts if isinstance(event, Called)), finished)
