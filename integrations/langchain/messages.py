"""LangChain's messages, prompts and events as turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompt_values import PromptValue

from infllm_agent.chat.format import ROLES
from infllm_agent.messages import Turn
from infllm_agent.routing.turns import NAMED_ROLES, announcing
from infllm_agent.tools import ToolCall, ToolSpec

#: What ``SessionRunnable`` takes: a user's text, a message, an event, a prompt, or a list of them.
SessionInput = (
    str | PromptValue | BaseMessage | Mapping[str, Any] | Sequence[str | PromptValue | BaseMessage | Mapping[str, Any]]
)

_ROLE_OF: list[tuple[type[BaseMessage], str]] = [
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
]
#: Content blocks of an answer that add no text to it: they repeat what ``AIMessage.tool_calls`` says, or are thoughts
#: that chat templates leave out of earlier turns.
_SILENT_BLOCKS = (
    "tool_use",
    "tool_call",
    "tool_call_chunk",
    "function_call",
    "invalid_tool_call",
    "reasoning",
    "thinking",
    "redacted_thinking",
)


def history_of(
    messages: Sequence[BaseMessage], tools: Sequence[ToolSpec], default_system: Callable[[], str]
) -> list[Turn]:
    """Convert a whole history to turns; its system message announces the tools, and is added if there is none.

    Raises:
        ValueError: there is no message, a tool's result that no call asked for, or a message that ``turn_of`` refuses.
    """
    if not messages:
        raise ValueError("the list of messages is empty: give at least one message to answer")
    turns = []
    asked: dict[str, str] = {}  # the name of the tool that each call so far is of, by the call's id
    for number, message in enumerate(messages, 1):
        turn = turn_of(message)
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in asked:
                raise ValueError(
                    f"message {number} of {len(messages)} is the result of a tool call {message.tool_call_id!r} that "
                    "no AIMessage before it made; keep the message with the call, or leave out the result"
                )
            turn = turn._replace(name=turn.name or asked[message.tool_call_id] or None)
        elif isinstance(message, AIMessage):
            asked |= {call["id"]: call["name"] for call in message.tool_calls if call["id"]}
            asked |= {call["id"]: call["name"] or "" for call in message.invalid_tool_calls if call["id"]}
        turns.append(turn)
    return announcing(turns, tools, default_system)


def turn_of(message: BaseMessage) -> Turn:
    """Convert a message to the form in which a session stores it. Raises ValueError for what is not text."""
    role = next((role for kind, role in _ROLE_OF if isinstance(message, kind)), None)
    if isinstance(message, ChatMessage) and message.role in ROLES:
        role = message.role
    if role is None:
        what = f"role {message.role!r}" if isinstance(message, ChatMessage) else f"type {type(message).__name__}"
        raise ValueError(
            f"a message of {what} has no place in a session; use System-, Human-, AI- or ToolMessage, "
            f"or ChatMessage with a role of {', '.join(ROLES)}"
        )
    calls: tuple[ToolCall, ...] = ()
    if isinstance(message, AIMessage):
        calls = tuple(ToolCall(call["name"], call["args"], call["id"]) for call in message.tool_calls)
    call_id = message.tool_call_id if isinstance(message, ToolMessage) else None
    name = message.name if role in NAMED_ROLES else None
    return Turn(role, _text(message), name, call_id, calls)


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(str(block.get("text", "")))
        elif not (isinstance(message, AIMessage) and block.get("type") in _SILENT_BLOCKS):
            raise ValueError(
                f"a content block of type {block.get('type')!r} in a {type(message).__name__}: "
                "the model reads text only"
            )
    return "".join(texts)


_EVENT_KEYS = {"role", "text", "content", "name", "call_id", "tool_call_id"}


def _event(event: Mapping[str, Any]) -> Turn:
    """Convert an event such as ``{"role": "observation", "name": "pager", "text": "disk full"}``."""
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
    """Convert what ``SessionRunnable`` is given. Raises ValueError for an invalid event."""
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
