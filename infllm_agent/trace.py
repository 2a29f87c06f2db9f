"""What an answer attended to: attention by token, summed to messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from infllm_agent.records import Message

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Attended:
    """One message's share of the attention that was paid to messages at all."""

    message: int
    share: float


class Trace:
    """Adds up, over the steps and layers it is shown, the attention that each token of the session got.

    It is the memory's ``Recorder``. Attention to the sinks is kept apart: it is where a model's attention rests when
    it looks for nothing.
    """

    def __init__(self, n_sinks: int, block_size: int) -> None:
        self.n_sinks = n_sinks
        self.block_size = block_size
        self.sinks = 0.0
        self.looked_up: dict[int, dict[int, float]] = {}  # layer -> block -> attention
        self._blocks: dict[int, Shares] = {}
        self._near: dict[int, Shares] = {}  # first token -> attention of the tokens from there

    def far(self, layer: int, sinks: Tensor, blocks: Sequence[int], shares: Tensor) -> None:
        """Attention to the sinks (n_sinks,) and to looked-up blocks (len(blocks), block_size)."""
        self.sinks += float(sinks.sum())
        per_layer = self.looked_up.setdefault(layer, {})
        for block, row in zip(blocks, shares.double().cpu().numpy(), strict=True):
            per_layer[block] = per_layer.get(block, 0.0) + float(row.sum())
            if block in self._blocks:
                self._blocks[block] += row
            else:
                self._blocks[block] = row.copy()

    def near(self, layer: int, first_token: int, shares: Tensor) -> None:
        """Attention to the window, from token ``first_token`` of the session on."""
        row = shares.double().cpu().numpy()
        before = self._near.get(first_token)
        if before is None:
            self._near[first_token] = row.copy()
        elif len(before) >= len(row):
            before[: len(row)] += row
        else:
            grown = row.copy()
            grown[: len(before)] += before
            self._near[first_token] = grown

    def by_message(self, messages: Sequence[Message], limit: int | None = None) -> list[Attended]:
        """Messages by the attention they got, most first. Shares of all given messages sum to 1.

        Args:
            messages: those to consider, such as all before the question.
        """
        end = max((message.end for message in messages), default=0)
        running = np.concatenate([[0.0], np.cumsum(self._tokens(end))])
        sums = [(float(running[message.end] - running[message.start]), message.index) for message in messages]
        total = sum(share for share, _ in sums) or 1.0
        ranked = sorted(sums, key=lambda pair: (-pair[0], pair[1]))[:limit]
        return [Attended(index, share / total) for share, index in ranked if share > 0]

    def _tokens(self, end: int) -> Shares:
        tokens = np.zeros(end)
        for block, row in self._blocks.items():
            _add(tokens, self.n_sinks + block * self.block_size, row)
        for first, row in self._near.items():
            _add(tokens, first, row)
        return tokens


def _add(tokens: Shares, start: int, row: Shares) -> None:
    stop = min(start + len(row), len(tokens))
    if stop > start:
        tokens[start:stop] += row[: stop - start]
