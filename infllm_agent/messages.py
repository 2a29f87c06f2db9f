"""A message as a session holds it."""

from __future__ import annotations

from dataclasses import dataclass

from infllm_agent.tools import ToolCall, ToolSpec


@dataclass(frozen=True)
class Message:
    """A message as it was given; ``start`` and ``end`` are its span [start, end) in the session's token log.

    ``index`` counts from 0 and ``time`` is in unix seconds (UTC). ``calls`` are made by an assistant's message, whose
    text is without them: a text may spell what is no call. ``tools`` are announced by a system message.
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
