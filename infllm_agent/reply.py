"""What an answer comes back as."""

from __future__ import annotations

from dataclasses import dataclass

from infllm_agent.messages import Message
from infllm_agent.tools import InvalidCall, ToolCall
from infllm_agent.trace import Trace


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply. ``input_tokens = prefilled_tokens + reused_tokens``: the whole session is the input."""

    input_tokens: int
    prefilled_tokens: int
    reused_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: without the calls; what was to be a call and is none stands in it as it was written.
        finish_reason: ``stop`` (the model ended its turn, the structure it was held to is complete, or a stop
            sequence), ``tool_calls`` (the same, and there are calls), ``length`` (cut off by max_tokens), or
            ``cancelled``.
        first_token_s: seconds from the call to the first generated token.
        trace: what the answer attended to; ``Session.trace`` says which tokens are looked at.
        message: the answer as it stands in the session's history.
    """

    text: str
    usage: Usage
    finish_reason: str
    first_token_s: float
    seconds: float
    trace: Trace
    message: Message
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_calls: tuple[InvalidCall, ...] = ()
