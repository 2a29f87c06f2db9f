"""LangChain's messages, and events, as turns: messages in the form in which a session stores them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompt_values import PromptValue

from infllm_agent.chat import ROLES
from infllm_agent.records import Message

#: What ``SessionRunnable`` takes: a user's text, a message, an event, a prompt, or a list of them.
SessionInput = (
    str | PromptValue | BaseMessage | Mapping[str, Any] | Sequence[str | PromptValue | BaseMessage | Mapping[str, Any]]
)


class Turn(NamedTuple):
    """A message as a session stores it."""

    role: str
    text: str
    name: str | None = None
    call_id: str | None = None


_ROLE_OF: list[tuple[type[BaseMessage], str]] = [
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
]
#: The model sees names in these messages only. Elsewhere they are labels of the caller's (agent frameworks put the
#: agent's name on answers afterwards) and must not make a history another one.
_NAMED_ROLES = ("tool", "observation")
#: Content blocks that repeat what ``AIMessage.tool_calls`` says.
_CALL_BLOCKS = ("tool_use", "tool_call")


def turn_of(message: BaseMessage) -> Turn:
    """A LangChain message as a session stores it. Raises ValueError for what cannot be given to a text model."""
    role = next((role for kind, role in _ROLE_OF if isinstance(message, kind)), None)
    if isinstance(message, ChatMessage) and message.role in ROLES:
        role = message.role
    if role is None:
        what = f"role {message.role!r}" if isinstance(message, ChatMessage) else f"type {type(message).__name__}"
        raise ValueError(
            f"a message of {what} has no place in a session; use System-, Human-, AI- or ToolMessage, "
            f"or ChatMessage with a role of {', '.join(ROLES)}"
        )
    text = _text(message)
    if isinstance(message, AIMessage):
        calls = [_tool_call(call["name"], call["args"]) for call in message.tool_calls]
        calls += [_tool_call(call["name"], call["args"]) for call in message.invalid_tool_calls]
        text = "\n".join([text, *calls] if text else calls)
    call_id = message.tool_call_id if isinstance(message, ToolMessage) else None
    return Turn(role, text, message.name if role in _NAMED_ROLES else None, call_id)


def _tool_call(name: str | None, arguments: Any) -> str:
    """A tool call in the form that most open models were trained on (Hermes)."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(str(block.get("text", "")))
        elif not (isinstance(message, AIMessage) and block.get("type") in _CALL_BLOCKS):
            raise ValueError(
                f"a content block of type {block.get('type')!r} in a {type(message).__name__}: "
                "the model reads text only"
            )
    return "".join(texts)


_EVENT_KEYS = {"role", "text", "content", "name", "call_id", "tool_call_id"}


def _event(event: Mapping[str, Any]) -> Turn:
    """An event such as ``{"role": "observation", "name": "pager", "text": "disk full"}``."""
    unknown = event.keys() - _EVENT_KEYS
    if unknown or event.get("role") not in ROLES or ("text" in event) == ("content" in event):
        raise ValueError(
            f"an event needs 'role' ({', '.join(ROLES)}) and 'text' or 'content', and may have 'name' and 'call_id'; "
            f"got {dict(event)!r:.200}"
        )
    text = event["text"] if "text" in event else event["content"]
    if not isinstance(text, str):
        raise ValueError(f"an event's text must be a string, not {type(text).__name__}")
    return Turn(event["role"], text, event.get("name"), event.get("call_id", event.get("tool_call_id")))


def turns_of(given: SessionInput) -> list[Turn]:
    if isinstance(given, str):
        return [Turn("user", given)]
    if isinstance(given, BaseMessage):
        return [turn_of(given)]
    if isinstance(given, PromptValue):
        return [turn_of(message) for message in given.to_messages()]
    if isinstance(given, Mapping):
        return [_event(given)]
    if isinstance(given, Sequence):
        return [turn for item in given for turn in turns_of(item)]
    raise ValueError(f"an event must be a string, a message, a mapping or a list of these, not {type(given).__name__}")


#: The digest of a history without messages.
BEGINNING = b""


def link(before: bytes, turn: Turn | Message) -> bytes:
    """The digest of a history, from that of all but its last message and that message."""
    name = turn.name if turn.role in _NAMED_ROLES else None
    return hashlib.sha256(before + json.dumps([turn.role, turn.text, name, turn.call_id]).encode()).digest()
