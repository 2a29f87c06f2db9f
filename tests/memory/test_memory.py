"""Steps of the algorithm, each against a direct reading of the paper; and its bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.kernels.block_keys.plain import representative_scores
from infllm_agent.kernels.votes.plain import voters
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.index import BlockIndex

SIZES = {"n_init": 4, "n_local": 10, "block_size": 8, "topk": 3, "chunk_size": 16, "max_cached_block": 4}
SMALL = MemoryConfig(**SIZES, candidates=6)
PAPER = MemoryConfig.paper(**SIZES, repr_topk=2)


@settings(max_examples=30, deadline=None)
@given(heads=st.integers(1, 3), size=st.integers(1, 9), n_local=st.integers(1, 12), more=st.integers(0, 5))
def test_representative_scores_are_the_mean_of_what_followed(heads: int, size: int, n_local: int, more: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(heads, size, 4, generator=generator)
    queries = torch.randn(heads, size + n_local + more, 4, generator=generator)
    got = representative_scores(k, queries, n_local)
    for head in range(heads):
        for m in range(size):
            expected = sum(queries[head, m + j] @ k[head, m] for j in range(1, n_local + 1)) / n_local
            torch.testing.assert_close(got[head, m], torch.as_tensor(expected), atol=1e-4, rtol=1e-4)


def test_every_token_is_a_sink_or_in_a_block_or_in_the_window() -> None:
    model = tiny("gemma3")
    memory = model.new_memory(SMALL)
    fed = 0
    for size in (3, 16, 1, 1, 16, 9, 16, 16, 1, 16) * 3:
        model.forward([5] * size, memory)
        fed += size
        window = len(next(iter(memory.layers.values())).window)
        assert memory.length == fed
        assert memory.n_sinks + memory.store.count * SMALL.block_size + window == fed
        assert window <= SMALL.window_capacity
        if memory.n_sinks:
            assert window >= SMALL.n_local, "the window is never shorter than n_local"
    for layer in memory.layers.values():
        layer.cache.check_integrity()
        assert len(layer.selected) == SMALL.topk
        assert len(set(layer.selected)) == SMALL.topk


def test_device_memory_does_not_grow() -> None:
    model = tiny("llama")
    memory = model.new_memory(SMALL)
    model.forward([5] * 16, memory)
    before, index = memory.device_bytes(), memory.index_bytes()
    for _ in range(200):
        model.forward([5] * 16, memory)
    assert memory.device_bytes() == before
    assert memory.index_bytes() == index, "room for the first blocks is made at once"
    assert memory.store.host_bytes() > 0


def test_the_index_grows_by_doubling() -> None:
    index = BlockIndex(2, 8, torch.float32, torch.device("cpu"))
    rows = torch.randn(5000, 2, 8, generator=torch.Generator().manual_seed(0))
    for part in rows.split(7):
        index.append(part)
    assert torch.equal(index.keys, rows)
    assert index.device_bytes() == 8192 * 2 * 8 * 4


def test_a_forked_index_and_its_original_grow_apart() -> None:
    original = BlockIndex(1, 2, torch.float32, torch.device("cpu"))
    original.append(torch.zeros(3, 1, 2))
    forks = [original.fork(3), original.fork(2)]
    original.append(torch.ones(2, 1, 2))
    for number, fork in enumerate(forks, 2):
        fork.append(torch.full((1, 1, 2), float(number)))
    assert original.keys[:, 0, 0].tolist() == [0, 0, 0, 1, 1]
    assert [fork.keys[:, 0, 0].tolist() for fork in forks] == [[0, 0, 0, 2], [0, 0, 3]]


@pytest.mark.parametrize("config", [PAPER, SMALL], ids=["paper", "votes"])
def test_lookup_takes_the_blocks_that_the_queries_ask_for(config: MemoryConfig) -> None:
    model = tiny("llama")
    memory = model.new_memory(config)
    layer = memory.layers[0]
    heads, dim, size = layer.spec.kv_heads, layer.spec.head_dim, config.block_size
    keys = torch.randn(50, heads, dim, generator=torch.Generator().manual_seed(0))
    layer.blocks.append(keys)
    every = keys.unsqueeze(2).expand(-1, -1, size, -1)
    memory.store.put(memory.store.add(50), layer.index, every, every, keys)
    query = keys[17].repeat_interleave(layer.spec.q_heads // heads, 0)[:, None].contiguous()
    chosen = layer.look_up(query, scale=dim**-0.5, token=0)
    assert 17 in chosen
    assert chosen == sorted(chosen)
    if config is PAPER:
        raw = keys.flatten(1) @ keys[17].flatten()
        assert chosen == sorted(raw.topk(config.topk).indices.tolist())


def test_the_second_pass_finds_a_key_that_the_mean_hides() -> None:
    """One key of a block answers the query; the others cancel it out of the block's mean, but not below others'."""
    model = tiny("llama")
    config = SMALL.changed(topk=1, candidates=4)
    memory = model.new_memory(config)
    layer = memory.layers[0]
    heads, dim, size = layer.spec.kv_heads, layer.spec.head_dim, config.block_size
    k = 0.1 * torch.randn(20, heads, size, dim, generator=torch.Generator().manual_seed(0))
    k[:, :, :, 0] = 0
    k[9, :, 3, 0], k[9, :, 4:7, 0] = 30, -8  # mean 6 / 8: the second highest
    k[4, :, :, 0] = 1
    layer.blocks.append(k.mean(2))
    memory.store.put(memory.store.add(20), layer.index, k, k, k.mean(2))
    query = torch.zeros(layer.spec.q_heads, 1, dim)
    query[..., 0] = 1
    assert layer.look_up(query, scale=1.0, token=0) == [9]
    layer.config = config.changed(candidates=0)
    assert layer.look_up(query, scale=1.0, token=0) == [4]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), most=st.integers(1, 40))
def test_voters_are_runs_of_neighbours(n: int, most: int) -> None:
    q = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(0))
    got = voters(q, most)
    assert got.shape[1] <= most
    run = -(-n // most)
    expected = [q[:, start : start + run].mean(1) for start in range(0, n, run)]
    torch.testing.assert_close(got, torch.stack(expected, 1))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_fork_and_its_original_go_their_own_ways(name: str) -> None:
    """Each ends as a memory that was never forked, to the bit."""
    model = tiny(name)
    past = [token % 90 + 3 for token in range(157)]

    def feed(memory: ContextMemory, ids: list[int]) -> torch.Tensor:
        return torch.stack([model.forward(ids[start : start + 13], memory) for start in range(0, len(ids), 13)])

    memory = model.new_memory(SMALL)
    feed(memory, past)
    fork = memory.fork()
    second = fork.fork()
    ways = {7: memory, 11: fork, 19: second}
    got = {step: feed(memory, [(step * i) % 90 + 3 for i in range(100)]) for step, memory in ways.items()}
    for step, logits in got.items():
        alone = model.new_memory(SMALL)
        feed(alone, past)
        assert torch.equal(logits, feed(alone, [(step * i) % 90 + 3 for i in range(100)]))


def test_a_chunk_longer_than_the_configuration_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="longer than chunk_size 16"):
        model.forward([5] * 17, model.new_memory(SMALL))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"topk": 40, "max_cached_block": 32}, "topk 40 is more than the cache holds"),
        (
            {"repr_topk": 9, "block_size": 8, "block_key": "representatives"},
            "repr_topk 9 is more than block_size 8",
        ),
        ({"topk": 40, "candidates": 39}, "candidates 39 is fewer than topk 40"),
        ({"question_topk": 40, "max_cached_block": 32, "topk": 9}, "question_topk 40 is more than the cache holds"),
        ({"question_topk": 40, "candidates": 39, "topk": 9}, "candidates 39 is fewer than question_topk 40"),
        ({"n_local": 0}, r"MemoryConfig.n_local = 0: .*greater than or equal to 1"),
        ({"n_locl": 5}, r"MemoryConfig.n_locl"),
        ({"positions": "rope"}, r"MemoryConfig.positions = 'rope'"),
    ],
)
def test_settings_that_cannot_work_cannot_be_built(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        MemoryConfig(**settings_)
    assert "\n" not in str(error.value)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 200), chunk=st.integers(1, 50), question=st.integers(1, 60), tail=st.integers(0, 90))
def test_chunks_cover_all_and_end_small(n: int, chunk: int, question: int, tail: int) -> None:
    config = SMALL.changed(chunk_size=chunk, question_chunk=question, question_tail=tail)
    sizes = config.chunks(n, before_answer=True)
    assert sum(sizes) == n == sum(config.chunks(n))
    assert max(sizes) <= chunk
    assert max(config.chunks(n)) == min(n, chunk)
    if tail >= n:
        assert max(sizes) <= question


def test_short_chunks_have_room_for_more_blocks() -> None:
    model = tiny("llama")
    config = SMALL.changed(topk=2, question_topk=4, question_chunk=5)
    assert config.attended_keys == 4 + 4 * 8 + 10 + 8 + 5 == 59
    assert config.changed(question_topk=3).attended_keys == config.changed(question_topk=None).attended_keys == 54
    memory = model.new_memory(config)
    for size, blocks in ((16, 0), (16, 0), (16, 2), (16, 2), (16, 2), (5, 4), (6, 2), (1, 4), (16, 2)):
        model.forward([5] * size, memory)
        assert {len(layer.selected) for layer in memory.layers.values()} == {blocks}, (size, memory.length)


def test_a_record_from_before_the_rules_could_be_chosen_means_the_papers() -> None:
    record: dict[str, Any] = {"n_init": 4, "n_local": 10, "block_size": 8, "repr_topk": 2, "topk": 3, "chunk_size": 16}
    record |= {"max_cached_block": 4, "positions": "one_angle"}
    assert MemoryConfig.from_record(record) == PAPER
    assert MemoryConfig.from_record(SMALL.model_dump()) == SMALL


def test_the_papers_rules_at_another_configurations_budget() -> None:
    paper = MemoryConfig().under_paper_rules()
    assert (paper.block_size, paper.topk) == (64, 16)
    assert paper.topk * paper.block_size == MemoryConfig().topk * MemoryConfig().block_size
    assert paper == MemoryConfig.paper(**paper.model_dump(include=set(SIZES) | {"repr_topk"}))


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        SMALL.topk = 5  # type: ignore[misc]
