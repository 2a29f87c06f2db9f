"""The device cache against a dict, as a state machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from infllm_agent.blocks.device_cache import BlockCache
from infllm_agent.blocks.layout import BlockShape
from infllm_agent.errors import CorruptSession

SHAPE = BlockShape(layers=2, kv_heads=2, block_size=4, head_dim=8, dtype="float32")


def block(number: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.full((2, 4, 8), float(number * 10 + layer))
    return k, -k


class CacheAgainstDict(RuleBasedStateMachine):
    """Least recently used out first; what is asked for together is never evicted for each other."""

    @initialize(slots=st.integers(1, 6))
    def make(self, slots: int) -> None:
        self.cache = BlockCache(slots, SHAPE, torch.device("cpu"))
        self.recent: list[int] = []  # the model: blocks in the cache, least recently used first
        self.loaded: list[int] = []

    def load(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self.loaded += numbers
        k, v = zip(*map(block, numbers), strict=True)
        return torch.stack(k), torch.stack(v)

    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        asked = data.draw(st.lists(st.integers(0, 9), unique=True, max_size=self.cache.slots))
        before, self.loaded = self.cache.counters, []
        slots = self.cache.fetch(asked, self.load)
        expected = [number for number in asked if number not in self.recent]
        assert self.loaded == expected
        after = self.cache.counters
        assert after.misses - before.misses == len(expected)
        assert after.hits - before.hits == len(asked) - len(expected)
        kept = [number for number in self.recent if number not in asked]
        hits = [number for number in asked if number in self.recent]
        self.recent = (kept + hits + expected)[-self.cache.slots :]
        for number, slot in zip(asked, slots, strict=True):
            assert torch.equal(self.cache.k[:, slot], block(number)[0])
            assert torch.equal(self.cache.v[:, slot], block(number)[1])

    @rule(number=st.integers(10, 12))
    def failing_load(self, number: int) -> None:
        def fail(_: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            raise CorruptSession("damaged")

        with pytest.raises(CorruptSession):
            self.cache.fetch([number], fail)

    @rule()
    def too_many(self) -> None:
        with pytest.raises(ValueError, match="slots"):
            self.cache.fetch(list(range(20, 21 + self.cache.slots)), self.load)

    @invariant()
    def holds(self) -> None:
        self.cache.check_integrity()
        assert {number for number in range(13) if number in self.cache} == set(self.recent)
