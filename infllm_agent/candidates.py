"""The blocks that the first pass of a lookup shows to the second, with all their keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from infllm_agent.index import best
from infllm_agent.kernels.lookup import attention_mass


class Candidates:
    """What one layer's first pass chose.

    Tokens that are decoded one by one ask much the same, so a few of them choose among the same candidates, each anew.
    Which ones do follows from their numbers and from how they were fed: a session that is resumed, forked or read again
    chooses as it would have.

    Args:
        token: number in the session of the first token that asked for them.
        of: how many blocks there were.
        blocks: (n,) int64, ascending.
        read: gives the keys (n, kv_heads, block_size, head_dim) of blocks.
    """

    def __init__(self, token: int, of: int, blocks: Tensor, read: Callable[[list[int]], Tensor]) -> None:
        self.token = token
        self.of = of
        self.blocks = blocks
        self._read = read

    @cached_property
    def keys(self) -> Tensor:
        """(kv_heads, n, block_size, head_dim)"""
        return self._read(self.blocks.tolist()).transpose(0, 1).contiguous()

    def serve(self, token: int, of: int, period: int) -> bool:
        """Whether a later token, fed alone, chooses among them: until the next multiple of ``period``, or the next
        block. Never for the token that asked for them: if it comes again it may be another one."""
        return self.token < token and self.of == of and token % period != 0

    def best(self, asking: Tensor, scale: float, count: int) -> Tensor:
        """The ``count`` blocks with the largest attention mass of queries (q_heads, n, head_dim) float32; ascending."""
        return self.blocks[best(attention_mass(asking, self.keys, scale), count)]

    def keys_of(self, blocks: list[int]) -> Tensor:
        """Keys of some of them, (len(blocks), kv_heads, block_size, head_dim)."""
        wanted = torch.tensor(blocks, device=self.blocks.device)
        return self.keys.index_select(1, torch.searchsorted(self.blocks, wanted)).transpose(0, 1)
