"""A message, as it is given and as a session holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from infllm_agent.tools import ToolCall, ToolSpec


class Turn(NamedTuple):
    """A message as it is given to a session.

    Attributes:
        role: ``system``, ``user``, ``assistant``, ``observation`` or ``tool``.
        name: of the tool, or of the source of an observation.
        call_id: of the call that a tool's result answers.
        calls: that an assistant's message makes. Its text is without them: a text may spell what is no call.
        tools: that a system message announces.
    """

    role: str
    text: str
    name: str | None = None
    call_id: str | None = None
    calls: tuple[ToolCall, ...] = ()
    tools: tuple[ToolSpec, ...] = ()


@dataclass(frozen=True)
class Message:
    """A message as it was given; ``start`` and ``end`` are its span [start, end) in the session's token log.

    ``index`` counts from 0 and ``time`` is in unix seconds (UTC). The rest is as in ``Turn``.
    """

    index: int
    role: str
    name: str | None
    call_id: str | None
    text: str
    time: float
    start: int
    end: int
    calls: tuple[ToolCall, ...] = ()
    tools: tuple[ToolSpec, ...] = ()

    @property
    def turn(self) -> Turn:
        """The message as it was given."""
        return Turn(self.role, self.text, self.name, self.call_id, self.calls, self.tools)
