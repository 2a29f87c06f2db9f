"""What happens in an agent's run, as values."""

from __future__ import annotations

from dataclasses import dataclass

from infllm_agent.reply import Reply, Usage
from infllm_agent.tools import InvalidCall, ToolCall


@dataclass(frozen=True)
class TextPiece:
    """A piece of what the model says."""

    text: str


@dataclass(frozen=True)
class CallMade:
    """A call that the model made and that is about to be carried out."""

    call: ToolCall


@dataclass(frozen=True)
class OutputPiece:
    """A piece of a running tool's output, which the model has read already."""

    call: ToolCall
    text: str


@dataclass(frozen=True)
class CallResult:
    """What stands in the session as a call's result. ``error``: it says what went wrong."""

    call: ToolCall | InvalidCall
    text: str
    error: bool = False


@dataclass(frozen=True)
class AgentRun:
    """A run that has ended.

    Attributes:
        answer: the model's last reply; None if the run ended before there was one.
        steps: how many times the model replied.
        calls: the calls of this run with their results, in the order of the session.
        finish_reason: ``stop`` or ``length`` (of the answer), ``max_steps`` (the model would go on calling; the answer
            is what it said when it was allowed no more calls), ``stopped`` (a tool raised ``StopAgent``), or
            ``cancelled``.
        usage: the sums over all replies.
    """

    answer: Reply | None
    steps: int
    calls: tuple[CallResult, ...]
    finish_reason: str
    usage: Usage

    @property
    def text(self) -> str:
        """What the answer says."""
        return self.answer.text if self.answer else ""


AgentEvent = TextPiece | CallMade | OutputPiece | CallResult | AgentRun
