"""The device cache against a plain dict, and blocks on disk against the bytes that went in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from infllm_agent.blockfile import PAGE, SEGMENT_BLOCKS, BlockShape, segment_path
from infllm_agent.blocks import BlockCache, BlockStore
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

    def load(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.loaded.append(number)
        return block(number)

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
        def fail(_: int) -> tuple[torch.Tensor, torch.Tensor]:
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


CacheAgainstDict.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestCache = CacheAgainstDict.TestCase


def fill(store: BlockStore, count: int, seed: int = 0) -> list[torch.Tensor]:
    """Add ``count`` random blocks; returns keys, values and representatives of each."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    while len(made) < count:
        n = min(1 + len(made) % 40, count - len(made))  # some at a time, across the ends of segments
        values = torch.randn(n, SHAPE.layers, 9, 2, 4, 8, generator=generator).to(SHAPE.torch_dtype)
        first = store.add(n)
        for layer in range(SHAPE.layers):
            store.put(first, layer, values[:, layer, 0], values[:, layer, 1], values[:, layer, 2, :, 0])
        made += values.unbind()
    return made


def check(store: BlockStore, made: list[torch.Tensor]) -> None:
    assert store.count == len(made)
    for number, values in enumerate(made):
        for layer in range(SHAPE.layers):
            k, v = store.get(number, layer)
            assert torch.equal(k, values[layer, 0])
            assert torch.equal(v, values[layer, 1])
    if made:
        expected = torch.stack([values[:, 2, :, 0] for values in made])
        assert torch.equal(store.representatives(0, len(made)), expected)


@settings(max_examples=12, deadline=None)
@given(counts=st.lists(st.integers(0, SEGMENT_BLOCKS + 3), min_size=1, max_size=4))
def test_what_is_written_is_mapped_back(counts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commit after commit, each by a process that maps what the one before wrote."""
    folder, made = tmp_path_factory.mktemp("blocks"), []
    for turn, count in enumerate(counts):
        store = BlockStore(SHAPE)
        store.map(folder, len(made))
        made += fill(store, count, seed=turn)
        check(store, made)
        store.write_new(folder, len(made) - count)
    store = BlockStore(SHAPE)
    store.map(folder, len(made))
    check(store, made)
    assert store.host_bytes() == 0


def test_several_commits_of_one_process(tmp_path: Path) -> None:
    store, made = BlockStore(SHAPE), []
    for count in (3, 0, SEGMENT_BLOCKS, 5):
        made += fill(store, count, seed=count)
        store.write_new(tmp_path, len(made) - count)
    again = BlockStore(SHAPE)
    again.map(tmp_path, len(made))
    check(again, made)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    store = BlockStore(SHAPE)
    fill(store, 5)
    store.write_new(tmp_path, 0)
    return segment_path(tmp_path, 0)


def read_all(folder: Path, count: int = 5) -> None:
    store = BlockStore(SHAPE)
    store.map(folder, count)
    for number in range(count):
        for layer in range(SHAPE.layers):
            store.get(number, layer)


def test_any_flipped_bit_of_a_block_is_found(written: Path) -> None:
    whole = written.read_bytes()
    used = SHAPE.layers * SHAPE.layer_bytes + SHAPE.repr_bytes + 4 * (SHAPE.layers + 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        record = int(torch.randint(0, 5, (1,), generator=generator))
        offset = PAGE + record * SHAPE.stride + int(torch.randint(0, used, (1,), generator=generator))
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        written.write_bytes(damaged)
        with pytest.raises(CorruptSession, match=written.name):
            read_all(written.parent)


def test_damaged_header_short_file_and_missing_file(written: Path) -> None:
    whole = written.read_bytes()
    for damaged in (b"X" + whole[1:], whole[:100], whole[: PAGE + 4 * SHAPE.stride + 10], b""):
        written.write_bytes(damaged)
        with pytest.raises(CorruptSession, match=written.name):
            read_all(written.parent)
    written.unlink()
    with pytest.raises(CorruptSession, match="No such file"):
        read_all(written.parent)


def test_a_file_of_another_shape_is_refused(written: Path) -> None:
    other = BlockStore(BlockShape(layers=2, kv_heads=2, block_size=8, head_dim=4, dtype="float32"))
    with pytest.raises(CorruptSession, match="another session's shape"):
        other.map(written.parent, 5)


def test_leftovers_of_a_crash_are_written_over(tmp_path: Path) -> None:
    crashed = BlockStore(SHAPE)
    fill(crashed, 7, seed=1)
    crashed.write_new(tmp_path, 0)  # of these, the database counts only 4
    store = BlockStore(SHAPE)
    store.map(tmp_path, 4)
    fill(store, 2, seed=2)
    kept = [store.get(number, 0)[0].clone() for number in range(6)]
    store.write_new(tmp_path, 4)
    again = BlockStore(SHAPE)
    again.map(tmp_path, 6)
    assert all(torch.equal(again.get(number, 0)[0], kept[number]) for number in range(6))
