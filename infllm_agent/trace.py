"""What an answer attended to, as a value: kept with the session, read without its model.

Tokens are counted in the blocks in which the memory looks them up: block ``b`` is the ``block_size`` tokens from
``n_sinks + b · block_size`` on, whether it is stored by now or still in the window. Attention is in shares: that of
all traced queries, layers and heads together is 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

#: Most blocks whose tokens a trace keeps, and most looked-up blocks of each layer: those with most attention.
KEPT_BLOCKS = 256
KEPT_LAYER_BLOCKS = 32

#: How shares are stored: to three digits, which is more than they mean.
SHARES = np.dtype("<f2")
_IDS = np.dtype("<i4")

_FORMAT = 1


class Span(Protocol):
    """What ``by_message`` needs of a message."""

    @property
    def index(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class Attended:
    """One message, and how much of an answer's attention it got.

    Attributes:
        share: of the attention that was paid to the messages considered.
        focus: how far single heads turned to it (``Trace.focus``): the most that one of its tokens got.
    """

    message: int
    share: float
    focus: float = 0.0


@dataclass(frozen=True)
class LayerTrace:
    """What one layer looked up.

    Attributes:
        layer: the model's number of it.
        sinks, looked_up, window: shares of the layer's attention; they sum to 1.
        blocks: the looked-up blocks with most attention (at most ``KEPT_LAYER_BLOCKS``), most first.
        attention: what each of them got, as a share of the layer's attention.
    """

    layer: int
    sinks: float
    looked_up: float
    window: float
    blocks: Ids
    attention: Floats


@dataclass(frozen=True)
class Trace:
    """What the traced queries of one answer attended to.

    Attributes:
        answer: the index of the answer's message; ``question`` that of the message before it, or None.
        queries: how many were traced; 0: tracing was off, and all else is empty.
        n_sinks, block_size: how tokens are counted.
        sinks, looked_up, window: shares of all attention; they sum to 1.
        own: the part of it that went to the question and the answer itself.
        hits, misses: looked-up blocks, over all layers, that were on the device already, and that were brought.
        sink_tokens: (n_sinks,) shares of the session's first tokens.
        blocks: the blocks with most focus or attention (at most ``KEPT_BLOCKS``), in their order.
        attention: (len(blocks), block_size) shares of their tokens.
        focus: (len(blocks), block_size): the largest share of its attention that any head of any layer gave the token
            for any of the queries. A few heads find what the answer repeats; the mean over all heads, most of which
            look at what is near, hides them.
    """

    answer: int = -1
    question: int | None = None
    queries: int = 0
    n_sinks: int = 0
    block_size: int = 1
    sinks: float = 0.0
    looked_up: float = 0.0
    window: float = 0.0
    own: float = 0.0
    hits: int = 0
    misses: int = 0
    sink_tokens: Floats = field(default_factory=lambda: np.zeros(0))
    blocks: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    attention: Floats = field(default_factory=lambda: np.zeros((0, 1)))
    focus: Floats = field(default_factory=lambda: np.zeros((0, 1)))
    layers: tuple[LayerTrace, ...] = ()

    def by_message(self, messages: Iterable[Span], limit: int | None = None) -> list[Attended]:
        """List the messages that got attention, by focus, most first. Their shares sum to 1, sinks left aside.

        Args:
            messages: those to consider, such as all before the question.
        """
        messages = list(messages)
        starts = np.array([message.start for message in messages], np.int64)
        ends = np.array([message.end for message in messages], np.int64)
        order = np.argsort(self.tokens)
        tokens = self.tokens[order]
        running = np.concatenate([[0.0], np.cumsum(self.attention.ravel()[order])])
        focus = self.focus.ravel()[order]
        first, stop = np.searchsorted(tokens, starts), np.searchsorted(tokens, ends)
        sums = running[stop] - running[first]
        total = float(sums.sum()) or 1.0
        found = [
            Attended(message.index, float(share) / total, float(focus[i:j].max()))
            for message, share, i, j in zip(messages, sums, first, stop, strict=True)
            if i < j and share > 0
        ]
        return sorted(found, key=lambda one: (-one.focus, -one.share, one.message))[:limit]

    @property
    def tokens(self) -> Ids:
        """The numbers in the session of the tokens that ``attention`` and ``focus`` are about, in their order, flat."""
        return (self.n_sinks + self.blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()

    def pack(self) -> tuple[str, bytes]:
        """Pack the figures as JSON and the arrays as little-endian bytes."""
        head = {name: getattr(self, name) for name in _FIGURES} | {
            "format": _FORMAT,
            "blocks": len(self.blocks),
            "layers": [
                {name: getattr(layer, name) for name in _LAYER_FIGURES} | {"blocks": len(layer.blocks)}
                for layer in self.layers
            ],
        }
        arrays: list[npt.NDArray[Any]] = [self.sink_tokens, self.blocks, self.attention, self.focus]
        for layer in self.layers:
            arrays += [layer.blocks, layer.attention]
        packed = [array.astype(_IDS if array.dtype.kind == "i" else SHARES).tobytes() for array in arrays]
        return json.dumps(head, allow_nan=False), b"".join(packed)

    @classmethod
    def unpack(cls, head: str, arrays: bytes) -> Trace:
        """Unpack what was packed, its shares rounded to ``SHARES``. Raises ValueError for anything else."""
        figures = json.loads(head)
        if figures["format"] != _FORMAT:
            raise ValueError(f"a trace of format {figures['format']}; upgrade infllm-agent")
        at = 0

        def take(kind: np.dtype[Any], *shape: int) -> npt.NDArray[Any]:
            nonlocal at
            count = math.prod(shape)
            array = np.frombuffer(arrays, kind, count, at).reshape(shape)
            at += array.nbytes
            return array.astype(np.int64 if kind.kind == "i" else np.float64)

        n_blocks, size = figures["blocks"], figures["block_size"]
        sink_tokens, blocks = take(SHARES, figures["n_sinks"]), take(_IDS, n_blocks)
        attention, focus = take(SHARES, n_blocks, size), take(SHARES, n_blocks, size)
        layers = []
        for layer in figures["layers"]:
            ids, shares = take(_IDS, layer["blocks"]), take(SHARES, layer["blocks"])
            layers.append(LayerTrace(**{name: layer[name] for name in _LAYER_FIGURES}, blocks=ids, attention=shares))
        return cls(
            **{name: figures[name] for name in _FIGURES},
            sink_tokens=sink_tokens,
            blocks=blocks,
            attention=attention,
            focus=focus,
            layers=tuple(layers),
        )


_FIGURES = tuple(
    f.name for f in fields(Trace) if f.name not in ("sink_tokens", "blocks", "attention", "focus", "layers")
)
_LAYER_FIGURES = ("layer", "sinks", "looked_up", "window")
