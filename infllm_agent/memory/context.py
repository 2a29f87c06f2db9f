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

import torch
from torch import Tensor

from infllm_agent.blocks.budgets import Tiers
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.blocks.store import BlockStore
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.decode_attention.keys import Bounds
from infllm_agent.memory.layer import MemoryLayer, Recorder
from infllm_agent.memory.sliding import SlidingLayer
from infllm_agent.memory.spec import LayerSpec, block_shape
from infllm_agent.memory.state import Division, MemoryState
from infllm_agent.platform.compute import compute_thread


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
        """Give an empty memory the blocks of a session's files; new ones will be written there.

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
        """Give back at once all that it takes, whoever still refers to it; it is used no more."""
        self.tiers.dismiss(self, self.store)
        self.layers.clear()
        self.sliding.clear()
        self.store = BlockStore(self.store.shape, self.tiers)

    def reserve(self, n: int) -> None:
        """Make sure of room for what ``n`` more tokens will seal. Nothing else is changed.

        Raises:
            BudgetExceeded: there is no room.
            OSError: there would be room, but what waits cannot be written.
        """
        count = Division.of(self.length + n, self.config).blocks - self.store.count
        if count > 0:
            if (more := sum(layer.blocks.growth(count) for layer in self.layers.values())) > 0:
                self.tiers.reserve_device(more)
            self.store.reserve(count)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Attend with the next chunk, in one layer.

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
        """Make a chunk of ``n`` tokens, to which all layers have attended, part of the past.

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
        """Tell what the memory is besides its sealed blocks; views, valid until something is fed."""
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
        """Tell whether ``fork`` can go back to an earlier length: always, unless a layer slides by itself or blocks
        have representatives. Then only as far as what is still held reaches."""
        return self.state().can_rewind(length, self.config)

    def fork(self, length: int | None = None) -> ContextMemory:
        """Make an independent memory with the same past, or with the first ``length`` tokens of it.

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
        """Count the bytes of windows, sinks, cached and looked-up blocks, and candidates: constant, however long the
        session is."""
        remembering = sum(layer.device_bytes() for layer in self.layers.values())
        return remembering + sum(layer.device_bytes() for layer in self.sliding.values())

    def index_bytes(self) -> int:
        """Count the bytes of the block keys that lookups read: the one part on the device that grows, by a key for each
        block in the model's precision, in steps that double."""
        return sum(layer.blocks.device_bytes() for layer in self.layers.values())

    def bytes(self) -> int:
        """Count all the bytes that it takes of the device."""
        return self.device_bytes() + self.index_bytes()

    def cache_counters(self) -> tuple[int, int]:
        """Count the hits and misses of the device cache so far, in blocks, over all layers."""
        counters = [layer.cache.counters for layer in self.layers.values()]
        return sum(c.hits for c in counters), sum(c.misses for c in counters)
