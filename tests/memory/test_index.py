"""Which blocks an index finds: of a few, those it always found; of many, nearly those, and always the same ones."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.kernels.votes import reference
from infllm_agent.kernels.votes.plain import attention_mass, cell_shares, votes, votes_among
from infllm_agent.memory import snapshot
from infllm_agent.memory.index import BlockIndex

CPU = torch.device("cpu")
HEADS, DIM, FLAT = 2, 16, 24
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(blocks: int, heads: int = HEADS, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """Keys as models make them: around some hundred centres, along a few directions, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(heads, dim, dim, generator=generator) * (0.8 ** torch.arange(dim)).unsqueeze(1)
    centres = torch.randn(100, heads, dim, generator=generator)
    of_block = torch.randint(0, 100, (blocks,), generator=generator)
    places = centres[of_block] + 0.5 * torch.randn(blocks, heads, dim, generator=generator)
    return 3 + (places.unsqueeze(2) @ directions).squeeze(2)


def index_of(keys: torch.Tensor, flat: int | None, *stops: int) -> BlockIndex:
    """An index to which ``keys`` were added in parts that end at ``stops``."""
    index = BlockIndex(*keys.shape[1:], keys.dtype, CPU, flat)  # type: ignore[call-arg]
    for start, stop in pairwise((0, *sorted(stops), len(keys))):
        index.append(keys[start:stop])
    return index


def assert_same(got: BlockIndex, expected: BlockIndex) -> None:
    """Both hold the same, to the bit, and find the same."""
    assert torch.equal(got.keys, expected.keys)
    assert (got._cells is None) == (expected._cells is None)
    if got._cells is not None and expected._cells is not None:
        assert torch.equal(got._cells._of_blocks.all, expected._cells._of_blocks.all)
        assert torch.equal(got._cells._centres, expected._cells._centres)
    if got.count:
        q = random(2 * HEADS, 3, DIM, seed=5)
        assert torch.equal(got.most_voted(q, 0.25, 5), expected.most_voted(q, 0.25, 5))


# -- the steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 32])
def test_scores_of_few_blocks_are_those_of_float32_keys_to_the_bit(dtype: torch.dtype, n: int) -> None:
    keys, q = clustered(5000, 3, 64).to(dtype), random(9, n, 64, seed=1)
    plain = ((q * 0.125).reshape(3, -1, 64) @ keys.float().permute(1, 2, 0)).softmax(dim=-1).sum(dim=(0, 1))
    assert torch.equal(votes(q, keys, 0.125), plain)
    for flat in (5000, None):
        found = index_of(keys, flat).most_voted(q, 0.125, 384)
        assert torch.equal(found, plain.topk(384).indices.sort().values)


@settings(max_examples=20, deadline=None)
@given(kv_heads=st.integers(1, 3), group=st.integers(1, 3), n=st.integers(1, 4), cells=st.integers(1, 9))
def test_what_cells_get_is_what_the_reference_says(kv_heads: int, group: int, n: int, cells: int) -> None:
    q, centres = random(kv_heads * group, n, 8), random(kv_heads, cells, 8, seed=1)
    sizes = torch.randint(0, 4, (kv_heads, cells), generator=torch.Generator().manual_seed(3))
    sizes[:, 0] = 5
    arguments = centres, sizes, 0.7
    for got, expected in zip(cell_shares(q, *arguments), reference.cell_shares(q, *arguments), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blocks", [3, 1024, 2500])
def test_votes_among_some_are_those_among_all(blocks: int) -> None:
    keys, q = clustered(4000), random(4, 3, DIM)
    queries = q.reshape(HEADS, -1, DIM)
    others = (0.25 * queries @ keys[blocks:].permute(1, 2, 0)).logsumexp(dim=-1, keepdim=True)
    got = votes_among(q, keys[:blocks], others, 0.25)
    torch.testing.assert_close(got, votes(q, keys, 0.25)[:blocks], atol=1e-6, rtol=1e-4)
    if blocks == 3:
        torch.testing.assert_close(got, reference.votes_among(q, keys[:3], others, 0.25), atol=1e-6, rtol=1e-4)
        nobody = torch.full_like(others, -torch.inf)
        torch.testing.assert_close(votes_among(q, keys[:3], nobody, 0.25), votes(q, keys[:3], 0.25))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_and_their_centres_are_what_they_are_said_to_be(dtype: torch.dtype) -> None:
    keys = clustered(700).to(dtype)
    cells = index_of(keys, 600)._cells
    assert cells is not None
    grid, of_blocks, known = cells._grid, cells._of_blocks.all.long(), 675  # an eighth more than 600
    assert grid.cells == 4096
    middles = grid.middles()
    for head in range(HEADS):
        x = keys[:, head].double() - keys[:600, head].double().mean(0)
        variances, axes = torch.linalg.eigh(x[:600].T @ x[:600] / 600)
        places = (x @ axes).flip(1) / variances.flip(0).sqrt()
        numbers = of_blocks[:, head]
        for axis, parts in enumerate(grid.parts):
            digit, numbers = numbers % parts, numbers // parts
            expected = (torch.special.ndtr(places[:, axis]) * parts).long()
            mirrored = parts - 1 - expected  # an axis may point either way
            alike = max(float((digit == each).float().mean()) for each in (expected, mirrored))
            assert alike > 0.96, "rounding to steps changes few"
        for cell in of_blocks[:known, head].unique().tolist():
            inside = x[:known][of_blocks[:known, head] == cell]
            mean = (inside.sum(0) + middles[head, cell]) / (len(inside) + 1) + keys[:600, head].double().mean(0)
            torch.testing.assert_close(cells._centres[head, cell].double(), mean, atol=0.05, rtol=0.02)


def test_the_mean_of_a_cell_of_thousands_of_keys_is_exact() -> None:
    keys = torch.ones(30_000, 1, 4).bfloat16() * torch.tensor([1.0, 1.5, -3.0, 0.0]).bfloat16()
    keys[::2, 0, 0] += 1
    cells = index_of(keys, 100)._cells
    assert cells is not None
    torch.testing.assert_close(cells._centres[0, cells._of_blocks.all[1, 0]].float(), keys[1, 0].float())


def test_a_keys_cell_does_not_depend_on_its_batch() -> None:
    keys = clustered(3000, 3, 64)
    cells = index_of(keys, 500)._cells
    assert cells is not None
    alone = torch.cat([cells._grid.sort(key.unsqueeze(0))[0] for key in keys[:200]])
    assert torch.equal(alone, cells._of_blocks.all[:200])
    assert torch.equal(torch.cat([cells._grid.sort(part)[0] for part in keys.split(77)]), cells._of_blocks.all)


# -- always the same ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    stops=st.lists(st.integers(0, 120), max_size=8),
    count=st.integers(0, 120),
    dtype=st.sampled_from(DTYPES),
)
def test_an_index_follows_from_its_keys_alone(seed: int, stops: list[int], count: int, dtype: torch.dtype) -> None:
    """However they were appended, and whatever was behind them in the index it is a fork of."""
    keys = clustered(120, seed=seed).to(dtype)
    other = clustered(60, seed=seed + 1).to(dtype)
    original = index_of(keys, FLAT, *stops)
    assert_same(original, index_of(keys, FLAT))
    fork = original.fork(count)
    assert_same(fork, index_of(keys[:count], FLAT))
    second = fork.fork(count)
    fork.append(other)
    second.append(keys[count:])
    assert_same(fork, index_of(torch.cat([keys[:count], other]), FLAT))
    assert_same(second, original)
    assert_same(original, index_of(keys, FLAT))


def test_keys_that_are_all_the_same() -> None:
    index = index_of(torch.ones(100, HEADS, DIM), FLAT)
    found = index.most_voted(random(4, 1, DIM), 0.25, 7)
    assert len(set(found.tolist())) == 7
    assert index._cells is not None
    assert index._cells._centres.isfinite().all()


def test_a_memory_with_cells_goes_on_alike_after_a_resume_and_a_rewind(tmp_path: Path) -> None:
    config = MemoryConfig(
        n_init=4, n_local=16, block_size=4, topk=3, candidates=6, chunk_size=16, max_cached_block=4, flat_blocks=8
    )
    model = tiny("llama")
    memory, twin = model.new_memory(config), model.new_memory(config)
    past = torch.randint(3, 90, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    for chunk in past:
        model.forward(chunk, memory)
    for chunk in past[:20]:
        model.forward(chunk, twin)
    assert twin.layers[0].blocks._cells is not None
    memory.store.move(tmp_path, 0)
    resumed = model.new_memory(config)
    snapshot.restore(resumed, memory.state(), memory.store.files)
    for got, expected in ((resumed, memory), (memory.fork(twin.length), twin)):
        for number, layer in got.layers.items():
            assert_indexes_match(layer.blocks, expected.layers[number].blocks)
        for chunk in past[:5]:
            assert torch.equal(model.forward(chunk, got), model.forward(chunk, expected))


def assert_indexes_match(got: BlockIndex, expected: BlockIndex) -> None:
    assert torch.equal(got.keys, expected.keys)
    assert got._cells is not None
    assert expected._cells is not None
    assert torch.equal(got._cells._of_blocks.all, expected._cells._of_blocks.all)
    assert torch.equal(got._cells._centres, expected._cells._centres)


# -- nearly as good ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 16])
def test_nearly_all_blocks_are_found_that_a_flat_lookup_finds(n: int) -> None:
    blocks, flat, size, topk, candidates = 12_000, 1000, 4, 32, 192
    means = clustered(blocks, 2, 32).bfloat16()
    index = index_of(means, flat)
    exact = (means.unsqueeze(2) + 0.3 * random(blocks, 2, size, 32)).transpose(0, 1)
    found, mass, most = 0, 0.0, 0.0
    for seed in range(8):
        topic = 0.2 * (means[seed].float() - 3).repeat_interleave(2, 0).unsqueeze(1)
        q = topic + 0.2 * random(4, n, 32, seed=seed)
        chosen = [
            near[attention_mass(q, exact[:, near], 0.3).topk(topk).indices]
            for near in (votes(q, means, 0.3).topk(candidates).indices, index.most_voted(q, 0.3, candidates))
        ]
        of_all = attention_mass(q, exact, 0.3)
        found += len(set(chosen[0].tolist()) & set(chosen[1].tolist()))
        most, mass = most + float(of_all[chosen[0]].sum()), mass + float(of_all[chosen[1]].sum())
    assert found >= 0.98 * 8 * topk
    assert mass >= 0.995 * most


def test_the_settings_say_from_when_on() -> None:
    model = tiny("llama")
    assert model.new_memory(MemoryConfig(flat_blocks=7)).layers[0].blocks.flat == 7
    assert model.new_memory(MemoryConfig.paper(n_local=64)).layers[0].blocks.flat is None
    assert model.new_memory(MemoryConfig(lookup="similarity")).layers[0].blocks.flat is None
    assert MemoryConfig.from_record({"lookup": "votes"}).flat_blocks is None
    with pytest.raises(ConfigError, match="flat_blocks = 0"):
        MemoryConfig(flat_blocks=0)
