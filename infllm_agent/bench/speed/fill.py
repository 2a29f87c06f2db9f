"""A memory as if it had read a long history: its sinks and window are of a text, its blocks random.

Random keys and values are like those of the text in mean and deviation, channel by channel. Lookups then find nothing
in particular: they choose other blocks more often than in a text, and the device cache misses more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infllm_agent.blocks.segments import SEGMENT_BLOCKS, BlockFiles
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.state import Division, MemoryState
from infllm_agent.model.local_model import LocalModel

#: Of the random numbers.
SEED = 0


def fill(
    model: LocalModel, memory: ContextMemory, ids: Sequence[int], history: int, files: BlockFiles | None = None
) -> None:
    """Bring an empty memory to a length of ``history`` tokens.

    Args:
        ids: of a text. What is read of it stands in the window at the end; it is repeated if it is too short.
        files: what the blocks are written to; None: they stay in host memory.
    """
    config = memory.config
    blocks = Division.of(history, config).blocks
    read = history - blocks * config.block_size  # sinks and window
    source = model.new_memory(config)
    text = list(ids) * -(-read // len(ids))
    start = 0
    for size in config.chunks(read):
        model.forward(text[start : start + size], source)
        start += size
    state = source.state()
    if files is not None:
        memory.attach(files)
    if blocks:
        _fill_blocks(memory, state, blocks, written=files is not None)
    memory.restore(replace(state, length=history))


def _fill_blocks(memory: ContextMemory, state: MemoryState, blocks: int, *, written: bool) -> None:
    store, shape = memory.store, memory.store.shape
    generator = torch.Generator(memory.device).manual_seed(SEED)
    likes = [[_Like(x, generator) for x in (s.window.k, s.window.v)] for s in state.layers.values()]
    names = [layer.blocks.extend(blocks) for layer in memory.layers.values()]
    while store.count < blocks:
        count = min(SEGMENT_BLOCKS, blocks - store.count)
        store.reserve(count)
        first = store.add(count)
        for number, (like_k, like_v) in enumerate(likes):
            k, v = (like.draw(count, shape.block_size) for like in (like_k, like_v))
            keys = k.mean(dim=2, dtype=torch.float32).to(k.dtype)
            store.put(first, number, k, v, keys)
            names[number][first : first + count] = keys
        if written:
            store.write()
    for layer in memory.layers.values():
        layer.blocks.sort()


class _Like:
    """Random numbers like ``x`` (heads, n, head_dim)."""

    def __init__(self, x: Tensor, generator: torch.Generator) -> None:
        self._mean = x.mean(dim=1, keepdim=True)
        self._deviation = x.float().std(dim=1, keepdim=True).to(x.dtype)
        self._generator = generator

    def draw(self, count: int, size: int) -> Tensor:
        """Draw keys or values: (count, heads, size, head_dim)."""
        heads, _, dim = self._mean.shape
        x = torch.empty((count, heads, size, dim), dtype=self._mean.dtype, device=self._mean.device)
        return x.normal_(generator=self._generator).mul_(self._deviation).add_(self._mean)
