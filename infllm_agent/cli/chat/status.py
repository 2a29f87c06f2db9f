"""What a chat shows of its session's memory, and how far the work of the moment has come."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from infllm_agent.platform.text import counted, printable
from infllm_agent.reply import Reply
from infllm_agent.session.session import Session

BETWEEN = " · "


@dataclass(frozen=True)
class Gauge:
    """The sizes of a session between two turns.

    Attributes:
        waiting: tokens that are stored and have not gone through the model yet.
        bytes: by tier: device, host, disk.
        hits, misses: of the device cache since the session was opened, in blocks.
    """

    name: str
    model: str
    messages: int
    tokens: int
    waiting: int
    blocks: int
    bytes: dict[str, int]
    hits: int
    misses: int

    @classmethod
    def of(cls, session: Session) -> Gauge:
        usage = session.usage
        hits, misses = session.memory.cache_counters()
        return cls(
            name=session.name,
            model=model_name(session),
            messages=usage["messages"],
            tokens=usage["tokens"],
            waiting=session.pending_tokens,
            blocks=usage["blocks"],
            bytes=usage["bytes"],
            hits=hits,
            misses=misses,
        )

    def fields(self) -> list[str]:
        """The most wanted first."""
        return [
            self.name,
            "idle",
            counted(self.tokens, "token") + (f" ({self.waiting:,} wait)" if self.waiting else ""),
            counted(self.blocks, "block"),
            *(f"{tier} {decimal(size)}" for tier, size in self.bytes.items()),
            cache(self.hits, self.misses),
            counted(self.messages, "message"),
            self.model,
        ]


class Progress:
    """How far the work on a session has come. Asked while another thread works, so it waits for no lock."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._began = time.perf_counter()
        self._read_before = session.memory.length
        self._answer: tuple[int, float] | None = None  # tokens stored when the answer began, and the time

    def answering(self) -> None:
        """The first token of the answer is there."""
        if self._answer is None:
            self._answer = self._session.token_count, time.perf_counter()

    def line(self) -> str:
        """What is being done, then the memory: as much of it as the terminal is wide is shown."""
        session, memory = self._session, self._session.memory
        sizes = [counted(session.token_count, "token"), counted(memory.store.count, "block")]
        return BETWEEN.join([self._doing(), *sizes, cache(*memory.cache_counters()), "Ctrl-C stops"])

    def _doing(self) -> str:
        now = time.perf_counter()
        if self._answer is not None:
            before, began = self._answer
            return "answering" + rate(self._session.token_count - before, now - began)
        waiting, read = self._session.pending_tokens, self._session.memory.length - self._read_before
        if waiting:
            return f"reading {read:,} of {counted(read + waiting, 'token')}{rate(read, now - self._began)}"
        return "working"


def rate(tokens: int, seconds: float) -> str:
    """``, 12.3 tok/s``, or nothing while there is nothing to divide."""
    if tokens < 1 or seconds < 0.1:
        return ""
    speed = tokens / seconds
    return f", {speed:,.0f} tok/s" if speed >= 100 else f", {speed:.1f} tok/s"


def cache(hits: int, misses: int) -> str:
    return f"cache {hits / (hits + misses):.0%} hits" if hits + misses else "cache unused"


def model_name(session: Session) -> str:
    """The model as people call it: the alias or hub id, of a folder its last part."""
    name = session.model.name
    return printable(Path(name).name if Path(name).is_absolute() else name)


def wrapped(fields: Iterable[str], width: int) -> list[str]:
    """The fields in as many lines as it takes, none of them wider than ``width`` unless one field is."""
    lines: list[str] = []
    for field in fields:
        if lines and len(lines[-1]) + len(BETWEEN) + len(field) <= width:
            lines[-1] += BETWEEN + field
        else:
            lines.append(field)
    return lines


def closing(reply: Reply) -> list[str]:
    """Lines for the end of an answer: what of it is no text, how it ended unless by itself, and what it cost."""
    lines = [f"calls {call.name} {call.arguments}" for call in reply.tool_calls]
    lines += [f"not a call: {call.reason}" for call in reply.invalid_calls]
    if reply.finish_reason not in ("stop", "tool_calls"):
        ends = {"length": "cut off at max_tokens", "cancelled": "stopped; kept as it stands"}
        lines.append(ends.get(reply.finish_reason, reply.finish_reason))
    usage = reply.usage
    written = counted(usage.output_tokens, "token")
    speed = rate(usage.output_tokens - 1, reply.seconds - reply.first_token_s)
    lines.append(
        f"read {usage.prefilled_tokens:,} tokens, re-used {usage.reused_tokens:,};"
        f" {written}{speed}, the first after {reply.first_token_s:.1f} s"
    )
    return [" ".join(printable(line).split()) for line in lines]
