"""Steps of the algorithm, each against a direct reading of the paper; and its bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.memory import representative_scores

SMALL = MemoryConfig(n_init=4, n_local=10, block_size=8, repr_topk=2, topk=3, chunk_size=16, max_cached_block=4)


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
    model = tiny("llama")
    memory = model.new_memory(SMALL)
    layer = memory.layers[0]
    rows = torch.randn(5000, layer.index_rows.shape[1], generator=torch.Generator().manual_seed(0))
    for part in rows.split(7):
        layer.add_to_index(part)
    assert torch.equal(layer.index_rows[:5000], rows)
    assert layer.index_rows.shape[0] == 8192


def test_lookup_takes_the_blocks_that_the_queries_ask_for() -> None:
    model = tiny("llama")
    layer = model.new_memory(SMALL).layers[0]
    kv_heads, dim = layer.spec.kv_heads, layer.spec.head_dim
    rows = torch.randn(50, kv_heads * dim, generator=torch.Generator().manual_seed(0))
    layer.add_to_index(rows)
    query = rows[17].view(kv_heads, dim).repeat_interleave(layer.spec.q_heads // kv_heads, 0)[:, None]
    chosen = layer.look_up(query.contiguous())
    assert 17 in chosen
    scores = rows @ rows[17]
    assert sorted(chosen) == sorted(scores.topk(SMALL.topk).indices.tolist())


def test_a_chunk_longer_than_the_configuration_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="longer than chunk_size 16"):
        model.forward([5] * 17, model.new_memory(SMALL))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"topk": 40, "max_cached_block": 32}, "topk 40 is more than the cache holds"),
        ({"repr_topk": 9, "block_size": 8}, "repr_topk 9 is more than block_size 8"),
        ({"n_local": 0}, r"MemoryConfig.n_local = 0: .*greater than or equal to 1"),
        ({"n_locl": 5}, r"MemoryConfig.n_locl"),
        ({"positions": "rope"}, r"MemoryConfig.positions = 'rope'"),
    ],
)
def test_settings_that_cannot_work_cannot_be_built(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        MemoryConfig(**settings_)
    assert "\n" not in str(error.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        SMALL.topk = 5  # type: ignore[misc]
