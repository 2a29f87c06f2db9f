"""Adds up what the traced queries of an answer attend to, from what the memory shows, into a ``Trace``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from infllm_agent.config import TraceMode
from infllm_agent.trace import KEPT_BLOCKS, KEPT_LAYER_BLOCKS, SHARES, LayerTrace, Trace

#: "sampled" traces the question, the first tokens of the answer and then one in ``THEN_EVERY``; and of each of them
#: every second layer in turn, the even ones and the odd ones: the heads that find something are in several layers, and
#: what they find takes more than one token to say.
FIRST_TOKENS, THEN_EVERY = 16, 16
SAMPLED_LAYERS = 2

_Rows = npt.NDArray[np.float32]


class TraceRecorder:
    """The memory's ``Recorder`` for one answer.

    What the layers of one query show stays on the device until the last of them has: then it is brought and added up
    in one go.

    Args:
        layers: the model's numbers of the layers that are recorded, in their order.
        block_size: of the memory.
        mode: which tokens of the answer are traced.
    """

    def __init__(self, layers: Sequence[int], *, block_size: int, mode: TraceMode = "sampled") -> None:
        self.layers = list(layers)
        self.block_size = block_size
        self.mode = mode
        self.queries = 0
        self._stride = min(SAMPLED_LAYERS, len(self.layers)) if mode == "sampled" else 1
        self._turn = 0
        self._shown: dict[int, tuple[Sequence[int], Sequence[Tensor]]] = {}  # by layer, of the query that is under way
        # By token, over all queries and layers: the sum of the heads' mean, and the most that any head gave it.
        self._attention, self._focus = np.zeros(0, np.float32), np.zeros(0, np.float32)
        self._layer_blocks = np.zeros((len(self.layers), 0), np.float32)
        self._parts = np.zeros((len(self.layers), 3))  # sinks, looked up, window
        self._seen = np.zeros(len(self.layers), np.int64)  # queries

    def traces(self, token: int) -> bool:
        """Tell whether the query that decides the answer's token of that number, from 0, is traced."""
        if self.mode == "sampled":
            return token < FIRST_TOKENS or token % THEN_EVERY == 0
        return self.mode == "on"

    def wants(self, layer: int) -> bool:
        """Tell whether the layer is recorded of this query; layer 0 begins a query."""
        if layer == 0:
            self._turn = self.queries % self._stride
        return (layer - self._turn) % self._stride == 0

    def record(
        self, layer: int, n_sinks: int, blocks: Sequence[int], first_token: int, logits: Sequence[Tensor]
    ) -> None:
        """Keep what a layer shows; the last layer of a query has all of them added up."""
        self._shown[layer] = blocks, logits
        if layer + self._stride >= len(self.layers):
            parts = zip(*(logits for _, logits in self._shown.values()), strict=True)
            attention = torch.cat([torch.stack(part) for part in parts], dim=-1).softmax(dim=-1)
            rows = torch.stack([attention.mean(dim=1), attention.amax(dim=1)], dim=1).cpu().numpy()
            chosen = np.array([blocks for blocks, _ in self._shown.values()], np.int64)
            self._add(list(self._shown), n_sinks, chosen, first_token, rows)
            self._shown = {}
            self.queries += 1

    def _add(
        self, layers: list[int], n_sinks: int, blocks: npt.NDArray[np.int64], first_token: int, rows: _Rows
    ) -> None:
        """Add up one query: of ``layers``, the ``blocks`` (layers, n) and ``rows`` (layers, 2, keys), the heads' mean
        and maximum."""
        size = self.block_size
        n_far = n_sinks + blocks.shape[1] * size
        self._grow(first_token + rows.shape[2] - n_far)
        far = rows[:, :, n_sinks:n_far].reshape(*rows.shape[:2], -1, size)
        near = rows[:, :, n_far:]
        attention, focus = (self._by_block(sums, n_sinks) for sums in (self._attention, self._focus))
        for layer, chosen, (mean, most) in zip(layers, blocks, far, strict=True):
            attention[chosen] += mean
            focus[chosen] = np.maximum(focus[chosen], most)
            self._layer_blocks[layer, chosen] += mean.sum(axis=1)
        for tokens, part in (
            (slice(n_sinks), rows[:, :, :n_sinks]),
            (slice(first_token, first_token + near.shape[2]), near),
        ):
            self._attention[tokens] += part[:, 0].sum(axis=0)
            self._focus[tokens] = np.maximum(self._focus[tokens], part[:, 1].max(axis=0, initial=0.0))
        self._seen[layers] += 1
        self._parts[layers] += np.stack(
            [part.sum(axis=-1) for part in (rows[:, 0, :n_sinks], rows[:, 0, n_sinks:n_far], near[:, 0])], 1
        )

    def _by_block(self, tokens: _Rows, n_sinks: int) -> _Rows:
        """View by block, (blocks, block_size), what is kept by token."""
        return tokens[n_sinks : n_sinks + (len(tokens) - n_sinks) // self.block_size * self.block_size].reshape(
            -1, self.block_size
        )

    def _grow(self, tokens: int) -> None:
        if tokens > len(self._attention):
            more = tokens // 8 + 1024 + self.block_size
            room = tokens + more - len(self._attention)
            self._attention, self._focus = np.pad(self._attention, (0, room)), np.pad(self._focus, (0, room))
            n_blocks = len(self._attention) // self.block_size
            self._layer_blocks = np.pad(self._layer_blocks, ((0, 0), (0, n_blocks - self._layer_blocks.shape[1])))

    def trace(
        self, answer: int, question: int | None, question_start: int, *, n_sinks: int, hits: int = 0, misses: int = 0
    ) -> Trace:
        """Make the value to keep.

        Args:
            answer, question: indices of messages.
            question_start: the question's first token.
            n_sinks: of the memory, as of now.
        """
        if not self.queries:
            return Trace(answer=answer, question=question)
        total = int(self._seen.sum())
        attention = self._by_block(self._attention, n_sinks) / total
        focus = self._by_block(self._focus, n_sinks)
        by_focus, by_attention = (
            _largest(rows, KEPT_BLOCKS // 2) for rows in (focus.max(axis=1), attention.sum(axis=1))
        )
        kept = np.union1d(by_focus, by_attention)
        layers = []
        for number, seen, parts, blocks in zip(self.layers, self._seen, self._parts, self._layer_blocks, strict=True):
            if seen:
                best = _largest(blocks, KEPT_LAYER_BLOCKS)
                sinks, looked_up, window = map(float, parts / seen)
                layers.append(LayerTrace(number, sinks, looked_up, window, best, _rounded(blocks[best] / seen)))
        sinks, looked_up, window = map(float, self._parts.sum(axis=0) / total)
        return Trace(
            answer=answer,
            question=question,
            queries=self.queries,
            n_sinks=n_sinks,
            block_size=self.block_size,
            sinks=sinks,
            looked_up=looked_up,
            window=window,
            own=float(self._attention[question_start:].sum()) / total,
            hits=hits,
            misses=misses,
            sink_tokens=_rounded(self._attention[:n_sinks] / total),
            blocks=kept,
            attention=_rounded(attention[kept]),
            focus=_rounded(focus[kept]),
            layers=tuple(layers),
        )


def _largest(values: _Rows, count: int) -> npt.NDArray[np.int64]:
    """Find the places of the largest values other than 0, the largest first."""
    order = np.argsort(-values, kind="stable")[:count]
    return order[values[order] > 0]


def _rounded(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Round shares as they are stored, so that a trace reads alike before and after."""
    return values.astype(SHARES).astype(np.float64)
