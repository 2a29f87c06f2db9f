"""A memory at an earlier length: the same, to the bit, as one that was never fed more."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from infllm_agent.config import MemoryConfig
from infllm_agent.memory import snapshot
from infllm_agent.memory.context import ContextMemory
from infllm_agent.model.local_model import LocalModel

SMALL = MemoryConfig(n_init=4, n_local=24, block_size=8, topk=3, chunk_size=16, max_cached_block=4, candidates=6)
PAPER = MemoryConfig.paper(n_init=4, n_local=24, block_size=8, topk=3, chunk_size=16, max_cached_block=4, repr_topk=2)


@pytest.fixture(scope="module")
def llama() -> LocalModel:
    return tiny("llama")


def chunks(seed: int, count: int, most: int) -> list[list[int]]:
    choice = random.Random(seed)
    return [[choice.randint(3, 90) for _ in range(choice.choice((1, 1, 5, most)))] for _ in range(count)]


def feed(model: LocalModel, memory: ContextMemory, chunks: list[list[int]]) -> torch.Tensor:
    return torch.stack([model.forward(chunk, memory) for chunk in chunks])


def assert_same(model: LocalModel, memory: ContextMemory, expected: ContextMemory) -> None:
    """Both hold the same, and go on alike."""
    got, want = (snapshot.pack(each.state(), each.config) for each in (memory, expected))
    assert got[1] == want[1]
    assert got[0].keys() == want[0].keys()
    for name, tensor in want[0].items():
        assert torch.equal(got[0][name], tensor), name
    assert memory.store.count == expected.store.count
    for number, layer in memory.layers.items():
        other = expected.layers[number]
        assert torch.equal(layer.blocks.keys, other.blocks.keys)
        assert (layer.window.start, layer.window.stop) == (other.window.start, other.window.stop)
        every = range(memory.store.count)
        assert torch.equal(memory.store.keys(every, layer.index), other.store.keys(every, layer.index))
        assert torch.equal(memory.store.values(every, layer.index), other.store.values(every, layer.index))
    after = chunks(99, 5, 16)
    assert torch.equal(feed(model, memory.fork(), after), feed(model, expected.fork(), after))


@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3", "gpt-neox"])
def test_every_earlier_chunk_boundary(name: str) -> None:
    model = tiny(name)
    told = chunks(1, 24, 16)
    memory, twin, untouched = (model.new_memory(SMALL) for _ in range(3))
    feed(model, memory, told)
    feed(model, untouched, told)
    assert memory.store.count > SMALL.candidates
    assert_same(model, memory.fork(0), twin)
    for chunk in told:
        feed(model, twin, [chunk])
        if not SMALL.looks_up_anew(len(chunk), twin.length):
            continue
        fork = memory.fork(twin.length)
        assert_same(model, fork, twin)
        feed(model, fork, chunks(7, 4, 16))  # must leave the original alone
    assert_same(model, memory, untouched)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_init=st.integers(0, 40),
    n_local=st.integers(1, 40),
    block_size=st.integers(1, 9),
    topk=st.integers(0, 4),
    most=st.integers(1, 12),
    contiguous=st.booleans(),
    candidate_tokens=st.integers(1, 9),
)
def test_any_sizes(
    llama: LocalModel,
    seed: int,
    n_init: int,
    n_local: int,
    block_size: int,
    topk: int,
    most: int,
    contiguous: bool,
    candidate_tokens: int,
) -> None:
    config = SMALL.changed(
        n_init=n_init,
        n_local=n_local,
        block_size=block_size,
        topk=topk,
        positions="contiguous" if contiguous else "one_angle",
        candidate_tokens=candidate_tokens,
    )
    told = chunks(seed, 20, most)
    keep = random.Random(seed).randint(0, 20)
    while keep and not config.looks_up_anew(len(told[keep - 1]), sum(map(len, told[:keep]))):
        keep -= 1
    memory, twin = llama.new_memory(config), llama.new_memory(config)
    feed(llama, memory, told)
    for chunk in told[:keep]:
        llama.forward(chunk, twin)
    after = chunks(seed + 1, 6, 5)
    fork = memory.fork(twin.length)
    again = fork.fork(twin.length)
    assert_same(llama, fork, twin)
    expected = feed(llama, twin, after)
    assert torch.equal(feed(llama, fork, after), expected)
    assert torch.equal(feed(llama, again, after), expected)


@pytest.mark.parametrize(
    ("name", "config"), [("llama", PAPER), ("gemma3", SMALL)], ids=["representatives", "sliding window"]
)
def test_what_is_not_held_any_more_is_not_made_up(name: str, config: MemoryConfig) -> None:
    model = tiny(name)
    memory, twin = model.new_memory(config), model.new_memory(config)
    told = chunks(3, 25, 16)
    feed(model, memory, told)
    rewound = 0
    for chunk in told:
        feed(model, twin, [chunk])
        if not config.looks_up_anew(len(chunk), twin.length):
            continue
        if memory.can_rewind(twin.length):
            assert_same(model, memory.fork(twin.length), twin)
            rewound += twin.length < memory.length
        else:
            with pytest.raises(ValueError, match="replay the log"):
                memory.fork(twin.length)
    assert memory.can_rewind(memory.length)
    assert not memory.can_rewind(0)
    if config is PAPER:
        assert rewound, "a few tokens back no block comes back to the window"


def test_a_sliding_window_that_has_dropped_nothing_can_be_rewound() -> None:
    model = tiny("gemma3")
    memory, twin = model.new_memory(SMALL), model.new_memory(SMALL)
    feed(model, memory, [[5, 6, 7], [8, 9], [10] * 16])
    feed(model, twin, [[5, 6, 7], [8, 9]])
    assert_same(model, memory.fork(5), twin)


@pytest.mark.parametrize("length", [-1, 200])
def test_a_length_that_never_was(llama: LocalModel, length: int) -> None:
    memory = llama.new_memory(SMALL)
    feed(llama, memory, chunks(1, 5, 16))
    assert not memory.can_rewind(length)
    with pytest.raises(ValueError, match=f"at {length}"):
        memory.fork(length)
