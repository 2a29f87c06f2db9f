"""The context memory: InfLLM (arXiv 2402.04617), one object for one session.

Per attention layer, past tokens fall into three groups, oldest first (paper, section 3.1):

    [ sinks: first n_init ] [ evicted tokens, in blocks of block_size ] [ local window: at least the last n_local ]

A chunk of tokens goes through every layer as: *append* it behind the window, *look up* the blocks its queries ask
for, *bring* them to the device (a token that is fed alone on a GPU does with *locating* them in the cache), *attend* to
sinks, those blocks and the window in one softmax. When all layers are done, ``advance`` makes the chunk part of the
window and *seals* what has left it into blocks. Until then nothing of the past is changed, so a forward that fails or
is interrupted midway can simply be run again.

The window holds every token that is neither a sink nor in a block yet: no token is ever out of sight of the lookup,
and a session that fits the window is computed exactly as by full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from infllm_agent.blocks.budgets import Tiers
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.blocks.store import BlockCache, BlockStore
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels import backend
from infllm_agent.kernels.attention import attend, merge
from infllm_agent.kernels.decode_attention.plain import Bounds, to_device
from infllm_agent.kernels.votes.plain import similarity, voters
from infllm_agent.memory.candidates import CachedCandidates, Candidates, Read
from infllm_agent.memory.decoder import Decoder
from infllm_agent.memory.far_keys import FarKeys
from infllm_agent.memory.index import BlockIndex
from infllm_agent.memory.spec import LayerSpec, SlidingLayer, block_shape
from infllm_agent.memory.state import Division, LayerState, MemoryState
from infllm_agent.memory.window import Window
from infllm_agent.platform.compute import compute_thread


class Recorder(Protocol):
    """Told what the last query of a chunk makes of each key, in the layers where it wants to know.

    Layers are given by their index among those that have blocks, and come in their order.
    """

    def wants(self, layer: int) -> bool:
        """Whether to be told of that layer; asked of each."""

    def record(
        self, layer: int, n_sinks: int, blocks: Sequence[int], first_token: int, logits: Sequence[Tensor]
    ) -> None:
        """One layer.

        Args:
            logits: float32 (q_heads, m) parts of one row of keys: the sinks, the looked-up ``blocks`` in their order,
                and the tokens from number ``first_token`` of the session on. Their softmax is the attention.
        """


class MemoryLayer:
    """One layer that sees everything: sinks, blocks and window."""

    def __init__(
        self,
        index: int,
        spec: LayerSpec,
        config: MemoryConfig,
        store: BlockStore,
        device: torch.device,
        bounds: Bounds,
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
            with_queries=config.block_key == "representatives",
            dtype=shape.torch_dtype,
            device=device,
        )
        self.on_gpu = backend.backend(self.window.k) == "triton"
        # There, tokens fed alone find all their candidates in the cache.
        slots = max(config.max_cached_block, config.kept_candidates if self.on_gpu else 0)
        self.cache = BlockCache(slots, shape, device)
        self.far = FarKeys(config, self.cache, self.window)
        self.decoder = Decoder(config, self.window, self.far, self.cache, bounds)
        self.shown: Candidates | None = None  # to the second pass of the last lookup
        self.kept: Candidates | None = None  # for tokens that come one by one
        flat = config.flat_blocks if config.lookup == "votes" else None
        self.blocks = BlockIndex(spec.kv_heads, spec.head_dim, shape.torch_dtype, device, flat)
        self._selected: Sequence[int] | Tensor = []

    @property
    def selected(self) -> list[int]:
        """The blocks looked up last. Where a token was fed alone, on a GPU, this waits for it."""
        return self._selected.tolist() if isinstance(self._selected, Tensor) else list(self._selected)

    # -- one chunk: append, look up, bring, attend -------------------------------------------------------------------

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Put the chunk's keys and values behind the window, and its averaged queries if the window keeps them."""
        queries = None
        if self.window.queries is not None:
            grouped = q.view(self.spec.kv_heads, -1, *q.shape[1:])
            queries = grouped.mean(dim=1) if grouped.shape[1] > 1 else grouped[:, 0]
        self.window.stage(k, v, queries)

    def look_up(self, q: Tensor, scale: float, token: int) -> list[int]:
        """The ``topk`` blocks that the queries of a chunk, which begins with number ``token``, ask for, in their order.

        First all blocks by the one key that stands for each (paper, eq. 2; or votes, of many blocks by the cells in
        which these keys lie), then, with ``candidates``, the best of them by all their keys.
        """
        blocks: list[int] = self.choose(q, scale, token).tolist()
        return blocks

    def choose(self, q: Tensor, scale: float, token: int) -> Tensor:
        """The same (≤ topk,) int64 where they are found: on the device, unless there is no choice."""
        config, n_blocks = self.config, self.blocks.count
        alone, self.shown = q.shape[1] == 1, None
        topk = min(config.topk_for(q.shape[1]), n_blocks)
        if topk in (0, n_blocks):
            return torch.arange(topk)
        asking = voters(q, config.max_votes)
        if alone and self.kept is not None and self.kept.serve(token, n_blocks, config.candidate_tokens):
            self.shown = self.kept
        else:
            count = min(max(topk, config.candidates), n_blocks)
            if config.lookup == "similarity":
                chosen = backend.best(similarity(q, self.blocks.keys), count)
            else:
                chosen = self.blocks.most_voted(asking, scale, count)
            if config.candidates:
                self.shown = self._candidates(token, chosen, shared=alone and config.candidate_tokens > 1)
        if self.shown is not None:
            chosen = self.shown.best(asking, scale, topk)
            if alone and config.candidate_tokens > 1:
                self.kept = self.shown
        return chosen

    def bring(self, blocks: list[int]) -> None:
        """Make ``blocks`` the far keys behind the sinks, through the device cache."""
        self._selected = list(blocks)
        self.far.gather(blocks, self._load)

    def locate(self, chosen: Tensor) -> Tensor:
        """Bring ``chosen`` blocks into the device cache and no further: their slots (≤ topk,) int32, on the device. Of
        candidates that are there all, this waits for nothing."""
        self._selected = chosen
        if isinstance(self.shown, CachedCandidates):
            return self.shown.slots_of(chosen)
        return to_device(self.cache.fetch(chosen.tolist(), self._load), self.cache.k.device)

    def _load(self, blocks: list[int]) -> tuple[Tensor, Tensor]:
        keys, values = self._readers()
        return keys(blocks) if self.shown is None else self.shown.keys_of(blocks), values(blocks)

    def _candidates(self, token: int, blocks: Tensor, *, shared: bool) -> Candidates:
        """What a first pass chose; ``shared``: for several tokens that come one by one."""
        keys, values = self._readers()
        if shared and self.on_gpu and len(blocks) <= self.cache.slots:
            return CachedCandidates(token, self.blocks.count, blocks, keys, values, self.cache)
        return Candidates(token, self.blocks.count, blocks, keys)

    def _readers(self) -> tuple[Read, Read]:
        """Keys and values of stored blocks. They do not refer to the layer: what keeps them must not keep it."""
        device = self.cache.k.device
        keys, values = (partial(read, layer=self.index, device=device) for read in (self.store.keys, self.store.values))
        return keys, values

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
        window, far, token = self.window, self.far, first_token + len(self.window)
        self.append(q, k, v)
        told = recorder is not None and recorder.wants(self.index)
        if n == 1 and not told and backend.backend(q) == "triton":
            slots = self.locate(self.choose(q, scale, token))
            return self.decoder.attend(q, slots, scale=scale, softcap=softcap)
        self.bring(self.look_up(q, scale, token) if self.blocks.count else [])
        q_near = window.rotate_queries(q)
        parts = []
        if far.n:
            q_far, far_k = far.rotated(q)
            parts.append(attend(q_far, far_k, far.v[:, : far.n], scale=scale, softcap=softcap))
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
        if recorder is not None and told:
            logits = [_logits(q_far[:, -1:], far_k, scale, softcap)] if far.n else []
            logits.append(_logits(q_near[:, -1:], window.k_rotated[:, window.start : end], scale, softcap))
            recorder.record(self.index, far.n_sinks, self.selected, first_token, logits)
        return merged.out

    # -- between chunks: seal -----------------------------------------------------------------------------------

    def keep_sinks(self) -> None:
        """The session's first tokens leave the window and become the sinks."""
        window, n = self.window, self.config.n_init
        first = slice(window.start, window.start + n)
        self.far.keep_sinks(window.k[:, first], window.v[:, first])
        window.drop(n)

    def seal(self, first: int, count: int) -> None:
        """The window's oldest ``count · block_size`` tokens become blocks ``first ..``, each with its key."""
        window = self.window
        n = count * self.config.block_size
        tokens = slice(window.start, window.start + n)
        heads, dim = self.spec.kv_heads, self.spec.head_dim
        k = window.k[:, tokens].view(heads, count, -1, dim)
        v = window.v[:, tokens].view(heads, count, -1, dim)
        # Rounded as they are stored: a resumed session must rank blocks like one that went on.
        keys = self.block_keys(k).to(k.dtype).transpose(0, 1)
        self.store.put(first, self.index, k.transpose(0, 1), v.transpose(0, 1), keys)
        self.blocks.append(keys)
        window.drop(n)

    def block_keys(self, k: Tensor) -> Tensor:
        """What stands for each of the window's oldest blocks: the mean (kv_heads, count, head_dim) float32 of its keys
        ``k`` (kv_heads, count, block_size, head_dim), or of its representatives among them (paper, 3.2)."""
        if self.config.block_key == "representatives":
            window = self.window
            assert window.queries is not None
            queries = window.queries[:, window.start : window.stop]
            return backend.representative_keys(k, queries, self.config.n_local, self.config.repr_topk)
        return backend.mean_keys(k)

    def state(self, length: int) -> LayerState:
        """Sinks and window, without what is staged, and candidates that would serve the session's next token; views."""
        kept = self.kept
        if kept is not None and not kept.serve(length, self.blocks.count, self.config.candidate_tokens):
            kept = None
        return LayerState(self.far.sinks(), self.window.held(), None if kept is None else kept.blocks)

    def restore(self, first_window_token: int, state: LayerState) -> None:
        """Bring an empty layer to a state. Blocks are brought again when they are next looked up."""
        self.far.keep_sinks(*state.sinks)
        self.window.restore(first_window_token, state.window)
        if state.candidates is not None:
            last = first_window_token + len(self.window) - 1
            blocks = state.candidates.to(self.cache.k.device, torch.int64)
            self.kept = self._candidates(last, blocks, shared=True)

    def device_bytes(self) -> int:
        kept = 0 if self.on_gpu else self.config.kept_candidates  # there they are in the cache
        kept_bytes = kept * self.config.block_size * self.far.k[:, :1].nbytes
        return self.window.device_bytes() + self.cache.device_bytes() + self.far.device_bytes() + kept_bytes


class ContextMemory:
    """The memory of one session over all attention layers of a model.

    Args:
        config: sizes and rules.
        specs: one entry for each attention layer, by the model's layer number.
        dtype, device: of the model's keys and values.
        tiers: what it may take of the device and of host memory, together with others; None: as much as it needs.

    Every layer that is not sliding must have the same number of key heads and the same head size.
    """

    def __init__(
        self,
        config: MemoryConfig,
        specs: dict[int, LayerSpec],
        dtype: torch.dtype,
        device: torch.device,
        tiers: Tiers | None = None,
    ) -> None:
        self.config = config
        self.specs = specs
        self.tiers = tiers or Tiers(pin=device.type == "cuda")
        self.device = device
        self.dtype = dtype
        self.recorder: Recorder | None = None
        self.length = 0  # tokens seen, since the session began
        self.n_sinks = 0
        remembering = {number: spec for number, spec in specs.items() if spec.sliding_window is None}
        self.store = BlockStore(block_shape(config, remembering, dtype), self.tiers)
        bounds = Bounds(device)
        self.layers: dict[int, MemoryLayer] = {
            number: MemoryLayer(index, spec, config, self.store, device, bounds)
            for index, (number, spec) in enumerate(remembering.items())
        }
        self.sliding: dict[int, SlidingLayer] = {
            number: SlidingLayer(spec, config, dtype, device)
            for number, spec in specs.items()
            if spec.sliding_window is not None
        }
        self.tiers.admit(self, self.bytes())

    @property
    def first_window_token(self) -> int:
        """Number in the session of the window's oldest token."""
        return self.n_sinks + self.store.count * self.config.block_size

    def attach(self, files: BlockFiles) -> None:
        """Of an empty memory: its blocks are those of a session's files, and new ones will be written there.

        Raises:
            CorruptSession: a file is missing or damaged.
            BudgetExceeded: there is no room on the device for the index.
        """
        layers = list(self.layers.values())
        self.tiers.reserve_device(sum(layer.blocks.growth(files.count) for layer in layers))
        self.store.attach(files)
        files.keys([layer.blocks.extend(files.count) for layer in layers])
        for layer in layers:
            layer.blocks.sort_soon()

    def dismiss(self) -> None:
        """It is used no more: what it takes is given back at once, whoever still refers to it."""
        self.tiers.dismiss(self, self.store)
        self.layers.clear()
        self.sliding.clear()
        self.store = BlockStore(self.store.shape, self.tiers)

    def reserve(self, n: int) -> None:
        """Make sure of room for what ``n`` more tokens will seal. Nothing else is changed.

        Raises:
            BudgetExceeded: there is none.
            OSError: there would be, but what waits cannot be written.
        """
        count = Division.of(self.length + n, self.config).blocks - self.store.count
        if count > 0:
            if (more := sum(layer.blocks.growth(count) for layer in self.layers.values())) > 0:
                self.tiers.reserve_device(more)
            self.store.reserve(count)

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
            if n > 1:
                layer.kept = None
        for sliding in self.sliding.values():
            sliding.advance(n)
        now = Division.of(self.length, self.config)
        if now.sinks > self.n_sinks:
            self.n_sinks = now.sinks
            for layer in self.layers.values():
                layer.keep_sinks()
        count = now.blocks - self.store.count
        if count > 0:
            first = self.store.add(count)
            for layer in self.layers.values():
                layer.seal(first, count)

    def state(self) -> MemoryState:
        """What the memory is besides its sealed blocks; views, for as long as nothing is fed."""
        return MemoryState(
            self.length,
            {number: layer.state(self.length) for number, layer in self.layers.items()},
            {number: sliding.window.held() for number, sliding in self.sliding.items()},
        )

    def restore(self, state: MemoryState) -> None:
        """Bring an empty memory, whose blocks are in place already, to a state."""
        compute_thread().run(lambda: self._restore(state))

    def _restore(self, state: MemoryState) -> None:
        self.length = state.length
        self.n_sinks = Division.of(state.length, self.config).sinks
        for number, layer in self.layers.items():
            layer.restore(self.first_window_token, state.layers[number])
        for number, sliding in self.sliding.items():
            window = state.sliding[number]
            sliding.window.restore(state.length - window.k.shape[1], window)

    def can_rewind(self, length: int) -> bool:
        """Whether ``fork`` can go back to an earlier length: always, unless a layer slides by itself or blocks have
        representatives. Then only as far as what is still held reaches."""
        return self.state().can_rewind(length, self.config)

    def fork(self, length: int | None = None) -> ContextMemory:
        """An independent memory with the same past, or with the first ``length`` tokens of it.

        ``length`` must be the end of a chunk; if it is an earlier one, one after which a token has its own candidates
        (``MemoryConfig.looks_up_anew``). The fork is then, to the bit, what this memory was at that time. Sealed blocks
        are shared; windows and sinks are copied.

        Raises:
            ValueError: ``can_rewind`` says no.
            CorruptSession: a stored block that the earlier window needs fails its checksum.
        """
        return compute_thread().run(lambda: self._fork(self.length if length is None else length))

    def _fork(self, length: int) -> ContextMemory:
        state = self.state().rewound(length, self.config, self.store)
        blocks = Division.of(length, self.config).blocks
        fork = ContextMemory(self.config, self.specs, self.dtype, self.device, self.tiers)
        fork.store = self.store.fork(blocks)
        for number, layer in self.layers.items():
            fork.layers[number].store = fork.store
            fork.layers[number].blocks = layer.blocks.fork(blocks)
        fork.restore(state)
        return fork

    def device_bytes(self) -> int:
        """Bytes of windows, sinks, cached and looked-up blocks, candidates: constant, however long the session is."""
        remembering = sum(layer.device_bytes() for layer in self.layers.values())
        return remembering + sum(layer.device_bytes() for layer in self.sliding.values())

    def index_bytes(self) -> int:
        """Bytes of the block keys that lookups read: the one part on the device that grows, by a key for each block in
        the model's precision, in steps that double."""
        return sum(layer.blocks.device_bytes() for layer in self.layers.values())

    def bytes(self) -> int:
        """All that it takes of the device."""
        return self.device_bytes() + self.index_bytes()

    def cache_counters(self) -> tuple[int, int]:
        """Device cache hits and misses so far, in blocks, over all layers."""
        counters = [layer.cache.counters for layer in self.layers.values()]
        return sum(c.hits for c in counters), sum(c.misses for c in counters)


def _logits(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What one query (q_heads, 1, head_dim) makes of each key before the softmax: (q_heads, m)."""
    # In float32: for so few queries no slower than half precision, and exact enough for shares that sum to 1.
    logits = (q.float().view(k.shape[0], -1, q.shape[-1]) @ k.float().transpose(1, 2)).flatten(0, 1) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
