"""What a stored session says about its answers: messages, traces, and which of the words were attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from infllm_agent.errors import InfLLMError, UnknownMessage
from infllm_agent.inspector.places import Places, open_tokenizer
from infllm_agent.messages import Message
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.trace import Attended, Trace

#: A report has the traces of at most so many answers, the latest.
LAST_ANSWERS = 50
#: Tokens with less focus than this are not shaded.
SHADE_FLOOR = 0.01
#: Shares are given to so many digits.
DIGITS = 4


@dataclass(frozen=True)
class Shade:
    """Some characters [start, end) of a message's text, and what their token got of all attention, and as focus."""

    start: int
    end: int
    share: float
    focus: float


@dataclass(frozen=True)
class Answer:
    """A traced answer.

    Attributes:
        trace: what it attended to.
        attended: the messages before the question, by focus, most first; their shares sum to 1.
        shades: by message, what to shade in its text, in its order.
        approximate: messages whose shades are where the tokens stand in proportion, as their exact places are unknown.
    """

    trace: Trace
    attended: tuple[Attended, ...]
    shades: Mapping[int, tuple[Shade, ...]]
    approximate: frozenset[int]

    @property
    def message(self) -> int:
        return self.trace.answer

    @property
    def question(self) -> int | None:
        return self.trace.question


@dataclass(frozen=True)
class Report:
    """A session as of its last commit.

    Attributes:
        model: the name of the model that it was made with.
        updated: unix seconds of the last commit.
        traced: how many of its answers have a trace; ``answers`` are the latest of them, or the one asked for.
    """

    session: str
    model: str
    updated: float
    messages: tuple[Message, ...]
    answers: tuple[Answer, ...]
    traced: int

    def data(self) -> dict[str, Any]:
        """The report for programs: what JSON can say."""
        return {
            "session": self.session,
            "model": self.model,
            "updated": self.updated,
            "traced": self.traced,
            "messages": [_message_data(message) for message in self.messages],
            "answers": [answer_data(answer) for answer in self.answers],
        }


def gather(root: str | PathLike[str], name: str, answer: int | None = None, last: int = LAST_ANSWERS) -> Report:
    """Read a stored session; another process may have it open.

    Args:
        answer: only this one: the number of its message, or if negative its place among the traced ones from the end.
        last: else so many of the latest ones.

    Raises:
        UnknownMessage: ``answer`` is none with a trace.
        InfLLMError: the session has no answers, or none was traced; and what ``SessionStore.open`` raises.
    """
    with SessionStore.open(root, name, readonly=True) as store:
        traced = store.traced()  # before the messages: a writer may add to both meanwhile
        messages = store.messages()
        wanted = _chosen(name, traced, messages, answer, last)
        traces = [trace for number in wanted for trace in store.traces(number, number + 1)]
        model = str(store.fingerprint["model"])
        places = Places(messages, store.token_ids, open_tokenizer(model))
        return Report(
            session=name,
            model=model,
            updated=store.updated,
            messages=tuple(messages),
            answers=tuple(_answer(trace, messages, places) for trace in traces),
            traced=len(traced),
        )


def _chosen(
    name: str, traced: Sequence[int], messages: Sequence[Message], answer: int | None, last: int
) -> Sequence[int]:
    if not traced:
        if not any(message.role == "assistant" for message in messages):
            raise InfLLMError(f'session "{name}" has no answers yet: ask it something')
        raise InfLLMError(
            f'session "{name}" has no trace of any answer: its answers were given with tracing off, or not by the model'
        )
    if answer is None:
        return traced[-last:]
    if answer in traced:
        return [answer]
    if -len(traced) <= answer < 0:
        return [traced[answer]]
    latest = ", ".join(map(str, traced[-8:]))
    raise UnknownMessage(f'answer {answer} of session "{name}" has no trace; the latest with one: {latest}')


def _answer(trace: Trace, messages: Sequence[Message], places: Places) -> Answer:
    before = trace.answer if trace.question is None else trace.question
    attended = tuple(trace.by_message(messages[:before]))
    tokens, shares, focus = trace.tokens, trace.attention.ravel(), trace.focus.ravel()
    order = np.argsort(tokens)
    tokens, shares, focus = tokens[order], shares[order], focus[order]
    shades: dict[int, tuple[Shade, ...]] = {}
    approximate = set()
    for one in attended:
        message = messages[one.message]
        first, stop = np.searchsorted(tokens, [message.start, message.end])
        kept = [i for i in range(first, stop) if focus[i] >= SHADE_FLOOR]
        if not kept:
            continue
        ranges, exact = places.of(message, [int(tokens[i]) for i in kept])
        shades[one.message] = tuple(
            Shade(start, end, float(shares[i]), float(focus[i]))
            for (start, end), i in zip(ranges, kept, strict=True)
            if start < end
        )
        if not exact:
            approximate.add(one.message)
    return Answer(trace, attended, shades, frozenset(approximate))


def answer_data(answer: Answer) -> dict[str, Any]:
    """A traced answer for programs."""
    trace = answer.trace
    return {
        "message": trace.answer,
        "question": trace.question,
        "queries": trace.queries,
        "n_sinks": trace.n_sinks,
        "block_size": trace.block_size,
        "sinks": _short(trace.sinks),
        "looked_up": _short(trace.looked_up),
        "window": _short(trace.window),
        "own": _short(trace.own),
        "hits": trace.hits,
        "misses": trace.misses,
        "attended": [
            {"message": one.message, "share": _short(one.share), "focus": _short(one.focus)} for one in answer.attended
        ],
        "shades": {
            str(number): [[one.start, one.end, _short(one.share), _short(one.focus)] for one in shades]
            for number, shades in answer.shades.items()
        },
        "approximate": sorted(answer.approximate),
        "layers": [
            {
                "layer": layer.layer,
                "sinks": _short(layer.sinks),
                "looked_up": _short(layer.looked_up),
                "window": _short(layer.window),
                "blocks": layer.blocks.tolist(),
                "attention": [_short(share) for share in layer.attention],
            }
            for layer in trace.layers
        ],
    }


def _message_data(message: Message) -> dict[str, Any]:
    return {
        "index": message.index,
        "role": message.role,
        "name": message.name,
        "call_id": message.call_id,
        "time": message.time,
        "text": message.text,
        "start": message.start,
        "end": message.end,
        "calls": [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in message.calls],
    }


def _short(share: float) -> float:
    return float(f"{share:.{DIGITS}g}")
