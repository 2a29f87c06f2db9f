"""One layer's memory: the steps that a chunk of tokens takes through it, in the order of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from infllm_agent.blocks.device_cache import BlockCache
from infllm_agent.blocks.store import BlockStore
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels import backend
from infllm_agent.kernels.attention import attend, merge
from infllm_agent.kernels.block_keys import mean_keys, representative_keys
from infllm_agent.kernels.decode_attention.keys import Bounds, to_device
from infllm_agent.kernels.votes import best
from infllm_agent.kernels.votes.plain import similarity, voters
from infllm_agent.memory.candidates import CachedCandidates, Candidates, Read
from infllm_agent.memory.decoder import Decoder
from infllm_agent.memory.far_keys import FarKeys
from infllm_agent.memory.index import BlockIndex
from infllm_agent.memory.spec import LayerSpec
from infllm_agent.memory.state import LayerState
from infllm_agent.memory.window import Window


class Recorder(Protocol):
    """Told what the last query of a chunk makes of each key, in the layers where it wants to know.

    Layers are given by their index among those that have blocks, and come in their order.
    """

    def wants(self, layer: int) -> bool:
        """Tell whether to be told of that layer; asked of each."""

    def record(
        self, layer: int, n_sinks: int, blocks: Sequence[int], first_token: int, logits: Sequence[Tensor]
    ) -> None:
        """Take what one layer shows.

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
        self.on_gpu = backend.chosen(self.window.k) == "triton"
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
        """Choose the ``topk`` blocks that the queries of a chunk, which begins with token number ``token``, ask for;
        ascending.

        First all blocks by the one key that stands for each (paper, eq. 2; or votes, of many blocks by the cells in
        which these keys lie), then, with ``candidates``, the best of them by all their keys.
        """
        blocks: list[int] = self.choose(q, scale, token).tolist()
        return blocks

    def choose(self, q: Tensor, scale: float, token: int) -> Tensor:
        """Choose those blocks, (≤ topk,) int64, where they are found: on the device, unless there is no choice."""
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
                chosen = best(similarity(q, self.blocks.keys), count)
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
        """Bring ``chosen`` blocks into the device cache and no further: their slots (≤ topk,) int32, on the device.
        Where all candidates are there, this waits for nothing."""
        self._selected = chosen
        if isinstance(self.shown, CachedCandidates):
            return self.shown.slots_of(chosen)
        return to_device(self.cache.fetch(chosen.tolist(), self._load), self.cache.k.device)

    def _load(self, blocks: list[int]) -> tuple[Tensor, Tensor]:
        keys, values = self._readers()
        return keys(blocks) if self.shown is None else self.shown.keys_of(blocks), values(blocks)

    def _candidates(self, token: int, blocks: Tensor, *, shared: bool) -> Candidates:
        """Keep what a first pass chose; ``shared``: for several tokens that come one by one."""
        keys, values = self._readers()
        if shared and self.on_gpu and len(blocks) <= self.cache.slots:
            return CachedCandidates(token, self.blocks.count, blocks, keys, values, self.cache)
        return Candidates(token, self.blocks.count, blocks, keys)

    def _readers(self) -> tuple[Read, Read]:
        """Make the readers of stored keys and values. They do not refer to the layer: what keeps them must not keep
        it."""
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
        """Attend with a chunk: one softmax over sinks, looked-up blocks, window and the chunk itself.

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
        if n == 1 and not told and backend.chosen(q) == "triton":
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
        """Move the session's first tokens out of the window: they become the sinks."""
        window, n = self.window, self.config.n_init
        first = slice(window.start, window.start + n)
        self.far.keep_sinks(window.k[:, first], window.v[:, first])
        window.drop(n)

    def seal(self, first: int, count: int) -> None:
        """Make blocks ``first ..`` of the window's oldest ``count · block_size`` tokens, each with its key."""
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
        """Compute what stands for each of the window's oldest blocks: the mean (kv_heads, count, head_dim) float32 of
        its keys ``k`` (kv_heads, count, block_size, head_dim), or of its representatives among them (paper, 3.2)."""
        if self.config.block_key == "representatives":
            window = self.window
            assert window.queries is not None
            queries = window.queries[:, window.start : window.stop]
            return representative_keys(k, queries, self.config.n_local, self.config.repr_topk)
        return mean_keys(k)

    def state(self, length: int) -> LayerState:
        """Tell what the layer is besides its sealed blocks: sinks and window, without what is staged, and candidates
        that would serve the session's next token; views."""
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


def _logits(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute what one query (q_heads, 1, head_dim) makes of each key before the softmax: (q_heads, m)."""
    # In float32: for so few queries no slower than half precision, and exact enough for shares that sum to 1.
    logits = (q.float().view(k.shape[0], -1, q.shape[-1]) @ k.float().transpose(1, 2)).flatten(0, 1) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
