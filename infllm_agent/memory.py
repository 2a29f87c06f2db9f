"""The context memory: InfLLM (arXiv 2402.04617), one object for one session.

Per attention layer, past tokens fall into three groups, oldest first (paper, section 3.1):

    [ sinks: first n_init ] [ evicted tokens, in blocks of block_size ] [ local window: at least the last n_local ]

A chunk of tokens goes through every layer as: *append* it behind the window, *look up* the blocks its queries ask
for, *attend* to sinks, those blocks and the window in one softmax. When all layers are done, ``advance`` makes the
chunk part of the window and *seals* what has left it into blocks. Until then nothing of the past is changed, so a
forward that fails or is interrupted midway can simply be run again.

The window holds every token that is neither a sink nor in a block yet: no token is ever out of sight of the lookup,
and a session that fits the window is computed exactly as by full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from infllm_agent.blocks import BlockCache, BlockStore
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.attention import attend, merge
from infllm_agent.layers import LayerSpec, SlidingLayer, block_shape
from infllm_agent.window import Window


class Recorder(Protocol):
    """Told, for the last query of a chunk, how much attention each key got (averaged over heads)."""

    def far(self, layer: int, sinks: Tensor, blocks: Sequence[int], shares: Tensor) -> None:
        """``sinks`` (n_init,) and ``shares`` (len(blocks), block_size): shares of the layer's attention."""

    def near(self, layer: int, first_token: int, shares: Tensor) -> None:
        """``shares`` (n,) of the tokens from number ``first_token`` of the session on."""


def representative_scores(k: Tensor, queries: Tensor, n_local: int) -> Tensor:
    """How much attention each of some tokens received from the ``n_local`` tokens after it (paper, eq. 3).

        r_m = 1/l Σ_{j=1..l} q_{m+j} · k_m

    A running sum over the queries gives every r_m with one dot product. Positions play no part: queries and keys
    come without rotary embedding.

    Args:
        k: (kv_heads, size, head_dim), the tokens m, m + 1, ...
        queries: (kv_heads, ≥ size + n_local, head_dim), the queries of m, m + 1, ... averaged over the heads
            that share a key head.

    Returns:
        (kv_heads, size) float32.
    """
    size = k.shape[1]
    queries = queries[:, : size + n_local].float()
    running = queries[:, n_local:] - queries[:, :size]  # as m moves on, one query enters the sum and one leaves
    first_sum = queries[:, :n_local].sum(dim=1, keepdim=True)
    # Σ_{j=1..l} q_{m+j} for m = 0, 1, ...: entering q_{m+l}, leaving q_m.
    sums = first_sum + running.cumsum(dim=1)
    return (sums * k.float()).sum(dim=-1) / n_local


class MemoryLayer:
    """One layer that sees everything: sinks, blocks and window."""

    def __init__(
        self, index: int, spec: LayerSpec, config: MemoryConfig, store: BlockStore, device: torch.device
    ) -> None:
        self.index = index  # among the layers that have blocks
        self.spec = spec
        self.config = config
        self.store = store
        shape = store.shape
        self.window = Window(
            spec.kv_heads,
            spec.head_dim,
            spec.rotary,
            capacity=config.window_capacity,
            slack=max(config.chunk_size, config.n_local // 2),
            with_queries=True,
            dtype=shape.torch_dtype,
            device=device,
        )
        self.cache = BlockCache(config.max_cached_block, shape, device)
        # Sinks, then the blocks looked up last: one contiguous set of keys. A block keeps its place while it is
        # looked up again, so a step copies only what changed; the order does not matter to a softmax.
        far_keys = config.n_init + config.topk * config.block_size
        self.far_k = torch.empty((spec.kv_heads, far_keys, spec.head_dim), dtype=shape.torch_dtype, device=device)
        self.far_v = torch.empty_like(self.far_k)
        self.n_sinks = 0
        self.selected: list[int] = []  # the block in each place of the far keys
        # Representative keys of all blocks, one row each: the one thing here that grows. In float32, because the
        # scores of a thousand similar blocks differ by less than bfloat16 can tell apart.
        self.index_rows = torch.empty((INDEX_STEP, spec.kv_heads * spec.head_dim), device=device)
        self.n_blocks = 0

    # -- one chunk: append, look up, attend ------------------------------------------------------------------------

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Put the chunk's keys, values and (averaged) queries behind the window."""
        grouped = q.view(self.spec.kv_heads, -1, *q.shape[1:])
        self.window.stage(k, v, grouped.mean(dim=1) if grouped.shape[1] > 1 else grouped[:, 0])

    def look_up(self, q: Tensor) -> list[int]:
        """The ``topk`` blocks whose representatives the chunk's queries attend to most (paper, eq. 2).

            sim(X, B) = Σ_i Σ_j q_i · k_{r_j}

        Both sums are linear: the chunk's mean query times each block's mean representative, over all heads.
        """
        topk = min(self.config.topk, self.n_blocks)
        if topk == self.n_blocks:
            return list(range(self.n_blocks))
        query = q.view(self.spec.kv_heads, -1, self.spec.head_dim).mean(dim=1, dtype=torch.float32)
        scores = self.index_rows[: self.n_blocks] @ query.reshape(-1)
        chosen: list[int] = scores.topk(topk).indices.tolist()
        return chosen

    def bring(self, blocks: Sequence[int]) -> None:
        """Make ``blocks`` the far keys, through the device cache; those already there stay where they are."""
        wanted = set(blocks)
        present = set(self.selected)
        new = [block for block in blocks if block not in present]
        slot_of = dict(zip(blocks, self.cache.fetch(blocks, self._load), strict=True))
        places = [place for place, block in enumerate(self.selected) if block not in wanted]
        places.extend(range(len(self.selected), len(blocks)))
        size = self.config.block_size
        for block, place in zip(new, places, strict=True):
            slot = slot_of[block]
            keys = slice(self.n_sinks + place * size, self.n_sinks + (place + 1) * size)
            self.far_k[:, keys] = self.cache.k[:, slot]
            self.far_v[:, keys] = self.cache.v[:, slot]
            if place == len(self.selected):
                self.selected.append(block)
            else:
                self.selected[place] = block

    def _load(self, block: int) -> tuple[Tensor, Tensor]:
        return self.store.get(block, self.index)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        softcap: float | None,
        first_token: int,
        recorder: Recorder | None,
    ) -> Tensor:
        """Attention of a chunk: one softmax over sinks, looked-up blocks, window and the chunk itself.

        Args:
            q, k, v: (heads, n, head_dim) without rotary embedding.
            first_token: number in the session of the window's oldest token.

        Returns:
            (q_heads, n, head_dim)
        """
        n = q.shape[1]
        self.append(q, k, v)
        if self.n_blocks:
            self.bring(self.look_up(q))
        window = self.window
        q_near = window.rotate_queries(q)
        parts = []
        n_far = self.n_sinks + len(self.selected) * self.config.block_size
        if n_far:
            q_far, far_k = self._far(q, q_near, n_far, first_token)
            parts.append(attend(q_far, far_k, self.far_v[:, :n_far], scale=scale, softcap=softcap))
        past, end = slice(window.start, window.stop), window.stop + n
        if n == 1:  # the window and the token itself are one unmasked set
            past = slice(window.start, end)
        if past.stop > past.start:
            near_k, near_v = window.k_rotated[:, past], window.v[:, past]
            parts.append(attend(q_near, near_k, near_v, scale=scale, softcap=softcap))
        if n > 1:
            own_k, own_v = window.k_rotated[:, window.stop : end], window.v[:, window.stop : end]
            parts.append(attend(q_near, own_k, own_v, scale=scale, softcap=softcap, causal=True))
        merged = merge(parts)
        if recorder is not None:
            lse = merged.lse[:, -1:]
            if n_far:
                shares = _shares(q_far[:, -1:], far_k, lse, scale, softcap)
                blocks = shares[self.n_sinks :].view(-1, self.config.block_size)
                recorder.far(self.index, shares[: self.n_sinks], self.selected, blocks)
            near = _shares(q_near[:, -1:], window.k_rotated[:, window.start : end], lse, scale, softcap)
            recorder.near(self.index, first_token, near)
        return merged.out

    def _far(self, q: Tensor, q_near: Tensor, n_far: int, first_token: int) -> tuple[Tensor, Tensor]:
        """Queries and far keys, rotated as the configuration says."""
        far_k, table = self.far_k[:, :n_far], self.window.rotary
        if table is None:
            return q, far_k
        if self.config.positions == "one_angle":
            # Keys at position 0, which is no rotation; queries at n_local: one distance for all (paper, 3.2).
            return table.rotate_all_to(q, self.config.n_local), far_k
        size = self.config.block_size
        starts = [self.n_sinks + block * size for block in self.selected]
        tokens = [torch.arange(self.n_sinks)] + [torch.arange(start, start + size) for start in starts]
        places = torch.cat(tokens).to(far_k.device) + (self.window.start - first_token)
        return q_near, table.rotary.rotate(far_k, table.rotary.angles(places))

    # -- between chunks: seal -----------------------------------------------------------------------------------

    def keep_sinks(self) -> None:
        """The session's first tokens leave the window and become the sinks."""
        window, n = self.window, self.config.n_init
        self.far_k[:, :n] = window.k[:, window.start : window.start + n]
        self.far_v[:, :n] = window.v[:, window.start : window.start + n]
        self.n_sinks = n
        window.drop(n)

    def seal(self, first: int, count: int) -> None:
        """The window's oldest ``count · block_size`` tokens become blocks ``first ..``, with their representatives."""
        window, config = self.window, self.config
        assert window.queries is not None
        n = count * config.block_size
        tokens = slice(window.start, window.start + n)
        k = window.k[:, tokens]
        scores = representative_scores(k, window.queries[:, window.start : window.stop], config.n_local)
        heads, dim = self.spec.kv_heads, self.spec.head_dim
        best = scores.view(heads, count, -1).topk(config.repr_topk, dim=2).indices
        blocks = k.view(heads, count, -1, dim)
        chosen = blocks.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, dim))
        representatives = chosen.mean(dim=2, dtype=torch.float32).to(k.dtype).transpose(0, 1)
        values = window.v[:, tokens].view(heads, count, -1, dim)
        self.store.put(first, self.index, blocks.transpose(0, 1), values.transpose(0, 1), representatives)
        self.add_to_index(representatives.flatten(1))
        window.drop(n)

    def add_to_index(self, rows: Tensor) -> None:
        """Append representatives (n, kv_heads · head_dim) to the index; its room doubles when it is full."""
        stop = self.n_blocks + rows.shape[0]
        if stop > self.index_rows.shape[0]:
            room = max(2 * self.index_rows.shape[0], -(-stop // INDEX_STEP) * INDEX_STEP)
            grown = self.index_rows.new_empty((room, self.index_rows.shape[1]))
            grown[: self.n_blocks] = self.index_rows[: self.n_blocks]
            self.index_rows = grown
        self.index_rows[self.n_blocks : stop] = rows
        self.n_blocks = stop

    def device_bytes(self) -> int:
        return self.window.device_bytes() + self.cache.device_bytes() + self.far_k.nbytes + self.far_v.nbytes


#: Blocks the index has room for at first.
INDEX_STEP = 2048


class ContextMemory:
    """The memory of one session over all attention layers of a model.

    Args:
        config: sizes and rules.
        specs: one entry for each attention layer, by the model's layer number.
        dtype, device: of the model's keys and values.

    Every layer that is not sliding must have the same number of key heads and the same head size.
    """

    def __init__(
        self, config: MemoryConfig, specs: dict[int, LayerSpec], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.recorder: Recorder | None = None
        self.length = 0  # tokens seen, since the session began
        self.n_sinks = 0
        remembering = {number: spec for number, spec in specs.items() if spec.sliding_window is None}
        self.store = BlockStore(block_shape(config, remembering, dtype), pin=device.type == "cuda")
        self.layers: dict[int, MemoryLayer] = {
            number: MemoryLayer(index, spec, config, self.store, device)
            for index, (number, spec) in enumerate(remembering.items())
        }
        self.sliding: dict[int, SlidingLayer] = {
            number: SlidingLayer(spec, config, dtype, device)
            for number, spec in specs.items()
            if spec.sliding_window is not None
        }

    @property
    def first_window_token(self) -> int:
        """Number in the session of the window's oldest token."""
        return self.n_sinks + self.store.count * self.config.block_size

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Attention of one layer for the next chunk.

        Args:
            layer: the model's layer number.
            q, k, v: (heads, n, head_dim) without rotary embedding, n ≤ chunk_size.

        Returns:
            (q_heads, n, head_dim)

        Raises:
            ValueError: a chunk longer than ``chunk_size``.
        """
        if q.shape[1] > self.config.chunk_size:
            raise ValueError(f"a chunk of {q.shape[1]} tokens is longer than chunk_size {self.config.chunk_size}")
        if layer in self.sliding:
            return self.sliding[layer].attend(q, k, v, scale=scale, softcap=softcap)
        return self.layers[layer].attend(
            q,
            k,
            v,
            scale=scale,
            softcap=softcap,
            first_token=self.first_window_token,
            recorder=self.recorder,
        )

    def advance(self, n: int) -> None:
        """All layers have attended to a chunk of ``n`` tokens: it is now part of the past.

        What has left the local window is sealed: first the sinks, then block after block.
        """
        self.length += n
        for layer in self.layers.values():
            layer.window.advance(n)
        for sliding in self.sliding.values():
            sliding.advance(n)
        n_init, size, n_local = self.config.n_init, self.config.block_size, self.config.n_local
        if self.n_sinks < n_init and self.length - n_init >= n_local:
            self.n_sinks = n_init
            for layer in self.layers.values():
                layer.keep_sinks()
        count = (self.length - self.first_window_token - n_local) // size
        if self.n_sinks == n_init and count > 0:
            first = self.store.add(count)
            for layer in self.layers.values():
                layer.seal(first, count)

    def device_bytes(self) -> int:
        """Bytes of windows, sinks, cached and looked-up blocks: constant, whatever the session's length."""
        remembering = sum(layer.device_bytes() for layer in self.layers.values())
        return remembering + sum(layer.device_bytes() for layer in self.sliding.values())

    def index_bytes(self) -> int:
        """Bytes of the representatives that every lookup reads: the one part on the device that grows, by four
        bytes a channel for each block, in steps that double."""
        return sum(layer.index_rows.nbytes for layer in self.layers.values())

    def cache_counters(self) -> tuple[int, int]:
        """Device cache hits and misses so far, in blocks, over all layers."""
        counters = [layer.cache.counters for layer in self.layers.values()]
        return sum(c.hits for c in counters), sum(c.misses for c in counters)


def _shares(q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention of one query (q_heads, 1, head_dim) to each key, (m,), averaged over heads, given its total lse."""
    logits = (q.view(k.shape[0], -1, q.shape[-1]) @ k.transpose(1, 2)).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return (logits - lse.view(k.shape[0], -1, 1)).exp_().mean(dim=(0, 1))
