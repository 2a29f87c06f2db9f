"""Histories as turns, and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from infllm_agent.messages import Message, Turn
from infllm_agent.tools import ToolSpec

#: The model sees names in these messages only. Elsewhere they are labels of the caller's (agent frameworks put the
#: agent's name on answers afterwards) and must not make a history another one.
NAMED_ROLES = ("tool", "observation")


def announcing(turns: Sequence[Turn], tools: Sequence[ToolSpec], default_system: Callable[[], str]) -> list[Turn]:
    """Have the first message of a history announce the tools, if there are any."""
    turns = list(turns)
    if tools and (not turns or turns[0].role != "system"):
        turns.insert(0, Turn("system", default_system()))
    if tools:
        turns[0] = turns[0]._replace(tools=tuple(tools))
    return turns


#: The digest of a history without messages.
BEGINNING = b""


def link(before: bytes, turn: Turn | Message) -> bytes:
    """Digest a history, given the digest of all but its last message, and that message.

    Ids of an answer's calls are left out: they are labels, which frameworks may exchange for their own.
    """
    name = turn.name if turn.role in NAMED_ROLES else None
    calls = [[call.name, call.arguments] for call in turn.calls]
    tools = [tool.to_json() for tool in turn.tools]
    content = [turn.role, turn.text, name, turn.call_id, calls, tools]
    return hashlib.sha256(before + json.dumps(content, sort_keys=True).encode()).digest()
