"""The blocks that the first pass of a lookup shows to the second, with all their keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from infllm_agent.blocks.store import BlockCache
from infllm_agent.kernels import backend
from infllm_agent.kernels.decode_attention.plain import to_device
from infllm_agent.kernels.votes.plain import attention_mass

#: Gives the keys, or values, (n, kv_heads, block_size, head_dim) of blocks.
Read = Callable[[list[int]], Tensor]


class Candidates:
    """What one layer's first pass chose.

    Tokens that are decoded one by one ask much the same, so a few of them choose among the same candidates, each anew.
    Which ones do follows from their numbers and from how they were fed: a session that is resumed, forked or read again
    chooses as it would have.

    Args:
        token: number in the session of the first token that asked for them.
        of: how many blocks there were.
        blocks: (n,) int64, ascending.
        read: gives their keys.
    """

    def __init__(self, token: int, of: int, blocks: Tensor, read: Read) -> None:
        self.token = token
        self.of = of
        self.blocks = blocks
        self._read = read

    @cached_property
    def keys(self) -> Tensor:
        """Their keys: (kv_heads, n, block_size, head_dim)."""
        return self._read(self.blocks.tolist()).transpose(0, 1).contiguous()

    def serve(self, token: int, of: int, period: int) -> bool:
        """Whether a later token, fed alone, chooses among them: until the next multiple of ``period``, or the next
        block. Never for the token that asked for them: if it comes again it may be another one."""
        return self.token < token and self.of == of and token % period != 0

    def best(self, asking: Tensor, scale: float, count: int) -> Tensor:
        """The ``count`` blocks with the largest attention mass of queries (q_heads, n, head_dim) float32; ascending."""
        return self.blocks[backend.best(attention_mass(asking, self.keys, scale), count)]

    def keys_of(self, blocks: list[int]) -> Tensor:
        """Keys of some of them, (len(blocks), kv_heads, block_size, head_dim)."""
        wanted = torch.tensor(blocks, device=self.blocks.device)
        return self.keys.index_select(1, torch.searchsorted(self.blocks, wanted)).transpose(0, 1)


class CachedCandidates(Candidates):
    """Candidates that all lie in a layer's cache on the device.

    So a token's choice among them, which only the device knows, is at hand whatever it is, and the host need not be
    asked. Their keys are compared where they lie. What is new among them is loaded at once when they are first chosen
    from: most lie there from the candidates before.

    Args:
        values: gives their values.
        cache: has at least as many slots.
    """

    def __init__(self, token: int, of: int, blocks: Tensor, read: Read, values: Read, cache: BlockCache) -> None:
        super().__init__(token, of, blocks, read)
        self._values = values
        self._cache = cache
        self._loaded = -1  # of the cache, when they were all there
        self._slots = self._rows = blocks

    def best(self, asking: Tensor, scale: float, count: int) -> Tensor:
        self._bring()
        size = self._cache.k.shape[2]
        keys = self._cache.k.flatten(1, 2).transpose(0, 1)
        mass = backend.votes(asking, keys, scale, chosen=self._rows).view(-1, size).sum(dim=1)
        return self.blocks[backend.best(mass, count)]

    def slots_of(self, chosen: Tensor) -> Tensor:
        """Where in the cache those of them lie that were chosen just now: (len(chosen),) int32, on the device."""
        self._cache.count_hits(len(chosen))
        return self._slots[torch.searchsorted(self.blocks, chosen)]

    def keys_of(self, blocks: list[int]) -> Tensor:
        """As they are stored: whoever asks found them missing in the cache."""
        return self._read(blocks)

    def _bring(self) -> None:
        """Load what is not in the cache, which happens when they are new, or when other blocks came meanwhile."""
        if self._loaded == self._cache.counters.misses:
            return
        slots = self._cache.fetch(self._numbers, lambda blocks: (self._read(blocks), self._values(blocks)))
        self._loaded = self._cache.counters.misses
        self._slots = to_device(slots, self.blocks.device)
        size = self._cache.k.shape[2]
        tokens = torch.arange(size, device=self.blocks.device)
        self._rows = (self._slots.long().unsqueeze(1) * size + tokens).flatten()

    @cached_property
    def _numbers(self) -> list[int]:
        numbers: list[int] = self.blocks.tolist()
        return numbers
