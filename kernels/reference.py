"""Plain, slow references, written from the equations: what the fast paths are tested against."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.decode_attention.plain import DecodeKeys
from infllm_agent.kernels.rotary import Rotary


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``kernels.attention.attend`` head by head in float64: outputs (q_heads, n, head_dim), lse (q_heads, n)."""
    group = q.shape[0] // k.shape[0]
    outs, lses = [], []
    for head in range(q.shape[0]):
        logits = q[head].double() @ k[head // group].double().T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        outs.append(torch.softmax(logits, -1) @ v[head // group].double())
        lses.append(torch.logsumexp(logits, -1))
    return torch.stack(outs).to(q.dtype), torch.stack(lses).float()


def votes_among(q: Tensor, block_keys: Tensor, others: Tensor, scale: float) -> Tensor:
    """``kernels.lookup.votes_among`` query by query in float64."""
    votes = torch.zeros(len(block_keys), dtype=torch.float64)
    for query, shared, row in _by_query(q, block_keys.shape[1]):
        logits = [float(query @ key[shared].double()) * scale for key in block_keys] + [float(others[shared, row])]
        votes += torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)[:-1]
    return votes.float()


def cell_shares(q: Tensor, centres: Tensor, sizes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``kernels.lookup.cell_shares`` query by query in float64."""
    kv_heads, cells = sizes.shape
    shares = torch.zeros(kv_heads, q[..., 0].numel() // kv_heads, cells)
    totals = torch.zeros(*shares.shape[:2], 1)
    for query, shared, row in _by_query(q, kv_heads):
        weights = [
            int(size) * math.exp(float(query @ centre.double()) * scale)
            for size, centre in zip(sizes[shared], centres[shared], strict=True)
        ]
        shares[shared, row] = torch.tensor(weights) / sum(weights)
        totals[shared, row] = math.log(sum(weights))
    return shares, totals


def decode_attention(
    q: Tensor, keys: DecodeKeys, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """``kernels.decode.decode_attention_plain`` key by key in float64; keys are rotated pair of channels by pair."""
    n_sinks, n_blocks, start, stop = keys.bounds.tolist()
    kv_heads, _, block_size, _ = keys.cache_k.shape
    far = [(keys.sink_k[:, i], keys.sink_v[:, i]) for i in range(n_sinks)]
    for slot in keys.slots[:n_blocks].tolist():
        far += [(keys.cache_k[:, slot, i], keys.cache_v[:, slot, i]) for i in range(block_size)]
    near = [(keys.near_k[:, i], keys.near_v[:, i]) for i in range(start, stop)]
    end = len(far) + len(near) - 1
    far_position, contiguous = end, True
    if keys.angles is not None and keys.angles.far_distance is not None:
        far_position, contiguous = keys.angles.far_distance, False
    outs, lses = [], []
    for head in range(len(q)):
        shared = head * kv_heads // len(q)
        q_far, q_near = _turned(q[head], far_position, keys), _turned(q[head], stop - 1, keys)
        logits = [
            q_far @ _turned(k[shared], position if contiguous else 0, keys) for position, (k, _) in enumerate(far)
        ] + [q_near @ k[shared].double() for k, _ in near]
        each = torch.stack(logits) * scale
        if softcap is not None:
            each = softcap * torch.tanh(each / softcap)
        outs.append(torch.softmax(each, 0) @ torch.stack([v[shared].double() for _, v in far + near]))
        lses.append(torch.logsumexp(each, 0))
    return torch.stack(outs).unsqueeze(1).to(q.dtype), torch.stack(lses).unsqueeze(1).float()


def _turned(x: Tensor, position: int, keys: DecodeKeys) -> Tensor:
    """A query or key (head_dim,) at a position, in float64."""
    out = x.double().clone()
    if keys.angles is None or position == 0:
        return out
    cos, sin, half = keys.angles.cos[position].double(), keys.angles.sin[position].double(), keys.angles.cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if keys.angles.interleaved else (i, i + half)
        first, second = out[a].clone(), out[b].clone()
        out[a], out[b] = first * cos[i] - second * sin[i], second * cos[i] + first * sin[i]
    return out


def representative_keys(k: Tensor, queries: Tensor, n_local: int, repr_topk: int) -> Tensor:
    """``kernels.dispatch.representative_keys`` token by token in float64."""
    heads, count, size, _ = k.shape
    out = torch.zeros(heads, count, k.shape[3], dtype=torch.float64)
    for head in range(heads):
        for block in range(count):
            received = []
            for i in range(size):
                m = block * size + i
                after = queries[head, m + 1 : m + 1 + n_local].double()
                received.append(float((after @ k[head, block, i].double()).sum()))
            best = sorted(range(size), key=lambda i: -received[i])[:repr_topk]
            out[head, block] = k[head, block, best].double().mean(0)
    return out.float()


def _by_query(q: Tensor, kv_heads: int) -> Iterator[tuple[Tensor, int, int]]:
    """Every query of every head, with the key head that it asks and its number among those that ask it."""
    group = q.shape[0] // kv_heads
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            yield q[head, i].double(), head // group, head % group * q.shape[1] + i


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
        """One chunk (heads, n, head_dim) after everything before it; returns (q_heads, n, head_dim)."""
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
        """(sinks, blocks) after ``past`` tokens: all that can leave while ``n_local`` tokens stay."""
        config = self.config
        if past < config.n_init + config.n_local:
            return 0, 0
        return config.n_init, (past - config.n_init - config.n_local) // config.block_size

    def tokens(self, block: int, n_sinks: int) -> range:
        """The tokens of a block."""
        start = n_sinks + block * self.config.block_size
        return range(start, start + self.config.block_size)

    def representatives(self, block: int, n_sinks: int) -> list[list[int]]:
        """For each key head, the ``repr_topk`` tokens m of the block with the highest r_m = 1/l Σ_j q_{m+j}·k_m."""
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
        """The ``topk`` blocks by their scores; with ``candidates``, by the exact mass of the best ``candidates``."""
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
        """What stands for a block: for each key head the mean of its representatives, or of all its keys."""
        heads = range(self.k[0].shape[0])
        if self.config.block_key == "representatives":
            tokens = self.representatives(block, n_sinks)
        else:
            tokens = [list(self.tokens(block, n_sinks)) for _ in heads]
        return torch.stack([torch.stack([self.k[m][head] for m in tokens[head]]).mean(0) for head in heads])

    def similarity(self, queries: range, key: Tensor) -> float:
        """sim(X, B) = Σ_i Σ_j q_i·k_{r_j}, summed over heads."""
        return sum(float(self.shared_query(i, head) @ key[head]) for i in queries for head in range(len(key)))

    def voters(self, queries: range) -> list[Tensor]:
        """The chunk's queries, runs of neighbours averaged so that there are at most ``max_votes``."""
        run = math.ceil(len(queries) / self.config.max_votes)
        runs = [queries[start : start + run] for start in range(0, len(queries), run)]
        return [torch.stack([self.q[token] for token in tokens]).mean(0) for tokens in runs]

    def votes(self, queries: range, keys: list[Tensor], scale: float) -> list[float]:
        """Every head of every voter divides one vote among the blocks."""
        total = torch.zeros(len(keys))
        for voter in self.voters(queries):
            for head, q in enumerate(voter):
                shared = head * len(keys[0]) // len(voter)
                total += torch.softmax(torch.stack([q @ key[shared] * scale for key in keys]), 0)
        return [float(score) for score in total]

    def attention_mass(self, queries: range, blocks: list[range], scale: float) -> list[float]:
        """The same with every key of every block: what attention, among these keys, goes to each block."""
        tokens = [m for block in blocks for m in block]
        each = torch.tensor(self.votes(queries, [self.k[m] for m in tokens], scale))
        return [float(mass) for mass in each.view(len(blocks), -1).sum(1)]

    def shared_query(self, token: int, head: int) -> Tensor:
        """The token's query averaged over the query heads that share a key head."""
        return self.q[token].view(self.k[0].shape[0], -1, self.q[token].shape[-1])[head].mean(0)

    def one(self, token: int, far: list[int], near_from: int, scale: float, softcap: float | None) -> Tensor:
        """One softmax of one query over far keys, window, and chunk up to itself."""
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
        """There is room."""

    def advance(self, n: int) -> None:
        """Nothing to do: what has left the window follows from the number of tokens."""


def rounded(x: Tensor) -> Tensor:
    """What becomes of a head's numbers in eight bits: each to the nearest multiple of the 127th part of the largest."""
    out = torch.empty_like(x, dtype=torch.float32)
    for block in range(x.shape[0]):
        for head in range(x.shape[1]):
            numbers = x[block, head].float()
            step = numbers.abs().max() / 127
            out[block, head] = torch.round(numbers / step) * step if step > 0 else 0.0
    return out
