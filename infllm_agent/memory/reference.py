"""The whole method, slow and plain: InfLLM (arXiv 2402.04617) written from its equations.

The memory is tested against it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.rotary import Rotary


class ReferenceLayer:
    """InfLLM over one layer, from the whole history at every chunk. Nothing is incremental, nothing is cached.

    Args:
        rotary: how positions rotate queries and keys, or None.
        sliding_window: for layers that the model limits to their latest tokens.
    """

    def __init__(self, config: MemoryConfig, rotary: Rotary | None, sliding_window: int | None) -> None:
        self.config = config
        self.rotary = rotary
        self.sliding_window = sliding_window
        self.q: list[Tensor] = []  # one (heads, head_dim) each token, without rotary
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attend with a chunk (heads, n, head_dim) to everything before it and itself; returns (q_heads, n,
        head_dim)."""
        past = len(self.k)
        self.q.extend(q.unbind(1))
        self.k.extend(k.unbind(1))
        self.v.extend(v.unbind(1))
        if self.sliding_window is not None:
            far, near_from = [], 0
        else:
            n_sinks, n_blocks = self.evicted(past)
            blocks = self.look_up(range(past, len(self.k)), n_sinks, n_blocks, scale)
            far = list(range(n_sinks)) + [token for block in blocks for token in self.tokens(block, n_sinks)]
            near_from = n_sinks + n_blocks * self.config.block_size
        return torch.stack([self.one(token, far, near_from, scale, softcap) for token in range(past, len(self.k))], 1)

    def evicted(self, past: int) -> tuple[int, int]:
        """Divide ``past`` tokens: (sinks, blocks), all that can leave while ``n_local`` tokens stay."""
        config = self.config
        if past < config.n_init + config.n_local:
            return 0, 0
        return config.n_init, (past - config.n_init - config.n_local) // config.block_size

    def tokens(self, block: int, n_sinks: int) -> range:
        """Number the tokens of a block."""
        start = n_sinks + block * self.config.block_size
        return range(start, start + self.config.block_size)

    def representatives(self, block: int, n_sinks: int) -> list[list[int]]:
        """Find, for each key head, the ``repr_topk`` tokens m of the block with the highest r_m = 1/l Σ_j
        q_{m+j}·k_m."""
        chosen = []
        for head in range(self.k[0].shape[0]):
            scores = []
            for m in self.tokens(block, n_sinks):
                received = [
                    float(self.shared_query(m + j, head) @ self.k[m][head]) for j in range(1, self.config.n_local + 1)
                ]
                scores.append((sum(received) / self.config.n_local, m))
            chosen.append([m for _, m in sorted(scores, reverse=True)[: self.config.repr_topk]])
        return chosen

    def look_up(self, queries: range, n_sinks: int, n_blocks: int, scale: float) -> list[int]:
        """Choose the ``topk`` blocks by their scores; with ``candidates``, by the exact mass of the best
        ``candidates``."""
        config = self.config
        topk = config.topk_for(len(queries))
        if n_blocks <= topk:
            return list(range(n_blocks))
        keys = [self.block_key(block, n_sinks) for block in range(n_blocks)]
        if config.lookup == "similarity":
            scores = [self.similarity(queries, key) for key in keys]
        else:
            scores = self.votes(queries, keys, scale)
        best = sorted(range(n_blocks), key=lambda block: -scores[block])
        if config.candidates:
            best = best[: config.candidates]
            mass = self.attention_mass(queries, [self.tokens(block, n_sinks) for block in best], scale)
            best = [block for _, block in sorted(zip(mass, best, strict=True), reverse=True)]
        return sorted(best[:topk])

    def block_key(self, block: int, n_sinks: int) -> Tensor:
        """Compute what stands for a block: for each key head the mean of its representatives, or of all its keys."""
        heads = range(self.k[0].shape[0])
        if self.config.block_key == "representatives":
            tokens = self.representatives(block, n_sinks)
        else:
            tokens = [list(self.tokens(block, n_sinks)) for _ in heads]
        return torch.stack([torch.stack([self.k[m][head] for m in tokens[head]]).mean(0) for head in heads])

    def similarity(self, queries: range, key: Tensor) -> float:
        """Compute sim(X, B) = Σ_i Σ_j q_i·k_{r_j}, summed over heads."""
        return sum(float(self.shared_query(i, head) @ key[head]) for i in queries for head in range(len(key)))

    def voters(self, queries: range) -> list[Tensor]:
        """Average runs of the chunk's neighbouring queries, so that there are at most ``max_votes``."""
        run = math.ceil(len(queries) / self.config.max_votes)
        runs = [queries[start : start + run] for start in range(0, len(queries), run)]
        return [torch.stack([self.q[token] for token in tokens]).mean(0) for tokens in runs]

    def votes(self, queries: range, keys: list[Tensor], scale: float) -> list[float]:
        """Divide one vote of every head of every voter among the blocks."""
        total = torch.zeros(len(keys))
        for voter in self.voters(queries):
            for head, q in enumerate(voter):
                shared = head * len(keys[0]) // len(voter)
                total += torch.softmax(torch.stack([q @ key[shared] * scale for key in keys]), 0)
        return [float(score) for score in total]

    def attention_mass(self, queries: range, blocks: list[range], scale: float) -> list[float]:
        """Divide the votes among every key of every block: what attention, among these keys, goes to each block."""
        tokens = [m for block in blocks for m in block]
        each = torch.tensor(self.votes(queries, [self.k[m] for m in tokens], scale))
        return [float(mass) for mass in each.view(len(blocks), -1).sum(1)]

    def shared_query(self, token: int, head: int) -> Tensor:
        """Average the token's query over the query heads that share a key head."""
        return self.q[token].view(self.k[0].shape[0], -1, self.q[token].shape[-1])[head].mean(0)

    def one(self, token: int, far: list[int], near_from: int, scale: float, softcap: float | None) -> Tensor:
        """Attend with one query to far keys, window, and the chunk up to itself."""
        near = [m for m in range(near_from, token + 1) if m not in far]
        if self.sliding_window is not None:
            near = near[-self.sliding_window :]
        logits, values = [], []
        for m in far + near:
            # Each pair of query and key is rotated by its own distance: rotating the query alone suffices.
            distance = token - m
            if m in far:
                if self.config.positions == "one_angle":
                    distance = self.config.n_local
                else:  # as if far keys and window were one text
                    distance = token - near_from + len(far) - far.index(m)
            q = self.q[token]
            if self.rotary is not None:
                q = self.rotary.rotate(q.unsqueeze(1), self.rotary.angles(torch.tensor([distance])))[:, 0]
            group = q.shape[0] // self.k[m].shape[0]
            logit = (q * self.k[m].repeat_interleave(group, 0)).sum(-1) * scale
            if softcap is not None:
                logit = softcap * torch.tanh(logit / softcap)
            logits.append(logit)
            values.append(self.v[m].repeat_interleave(group, 0))
        weights = torch.softmax(torch.stack(logits), 0)
        return (weights.unsqueeze(-1) * torch.stack(values)).sum(0)


class ReferenceMemory:
    """Stands where a ``ContextMemory`` stands: a ``ReferenceLayer`` for every attention layer."""

    def __init__(self, config: MemoryConfig, layers: dict[int, tuple[Rotary | None, int | None]]) -> None:
        self.layers = {number: ReferenceLayer(config, rotary, window) for number, (rotary, window) in layers.items()}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None
    ) -> Tensor:
        return self.layers[layer].attend(q, k, v, scale, softcap)

    def reserve(self, n: int) -> None:
        """Do nothing: there is room."""

    def advance(self, n: int) -> None:
        """Do nothing: what has left the window follows from the number of tokens."""
