"""Candidates that several decoded tokens share: who looks up anew, and that nothing else tells which serve."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny import tiny

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import CorruptSession
from infllm_agent.memory import snapshot
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.index import BlockIndex
from infllm_agent.memory.layer import MemoryLayer
from infllm_agent.model.local_model import LocalModel

CONFIG = MemoryConfig(
    n_init=4, n_local=24, block_size=16, topk=3, chunk_size=16, max_cached_block=4, candidates=6, candidate_tokens=8
)
TOLD = 16 * 30 + 4 + 24  # of so many tokens all that is no sink is in blocks or the least window


@pytest.fixture(scope="module")
def llama() -> LocalModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def told(llama: LocalModel) -> ContextMemory:
    """A memory of 30 blocks, five times as many as candidates."""
    memory, choice = llama.new_memory(CONFIG), random.Random(1)
    while memory.length < TOLD:
        llama.forward([choice.randint(3, 90) for _ in range(min(16, TOLD - memory.length))], memory)
    assert memory.store.count == 30
    return memory


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of blocks that first passes chose from, from now on."""
    seen: list[int] = []
    most_voted = BlockIndex.most_voted

    def and_note(self: BlockIndex, *args: object) -> torch.Tensor:
        seen.append(self.count)
        return most_voted(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockIndex, "most_voted", and_note)
    return seen


def word(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, 90), k=count)


def test_who_looks_up_anew(llama: LocalModel, told: ContextMemory, asked: list[int]) -> None:
    memory, anew = told.fork(), []
    layers = len(memory.layers)
    for token in word(2, 40):
        asked.clear()
        llama.forward([token], memory)
        assert len(asked) in (0, layers)
        if asked:
            anew.append(memory.length - 1 - TOLD)
    # The first after a chunk of several tokens, at multiples of eight, and when there is a block more.
    assert TOLD % 8 == 4
    assert anew == [0, 4, 12, 16, 20, 28, 32, 36]
    asked.clear()
    llama.forward([5, 6], memory)
    llama.forward([7], memory)
    assert len(asked) == 2 * layers


def test_with_one_each_token_looks_up_its_own(llama: LocalModel, asked: list[int]) -> None:
    memory = llama.new_memory(CONFIG.changed(candidate_tokens=1))
    llama.forward(word(1, 16), memory)
    for token in word(3, 200):
        llama.forward([token], memory)
    assert asked.count(5) == 16 * len(memory.layers)
    assert memory.state().layers[0].candidates is None


def test_it_goes_on_from_anywhere(llama: LocalModel, told: ContextMemory) -> None:
    """At every token of an answer: forked, or taken from its tail, a memory goes on as the one that was not."""
    memory, words = told.fork(), word(4, 40)
    expected = [llama.forward([token], memory) for token in words]
    memory, kept = told.fork(), 0
    for i, token in enumerate(words):
        state = snapshot.unpack(*snapshot.pack(memory.state(), CONFIG))
        kept += state.layers[0].candidates is not None
        resumed, fork = memory.fork(), memory.fork()
        resumed.restore(state)
        for j in range(i, min(i + 9, len(words))):
            assert torch.equal(llama.forward([words[j]], fork), expected[j]), (i, j)
            assert torch.equal(llama.forward([words[j]], resumed), expected[j]), (i, j)
        assert torch.equal(llama.forward([token], memory), expected[i])
    assert 28 <= kept <= 36


def test_a_step_that_failed_leaves_no_candidates(
    llama: LocalModel, told: ContextMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another token may come in the place of one that failed midway; it chooses among candidates of its own."""
    words = word(5, 24)
    untroubled = told.fork()
    expected = [llama.forward([token], untroubled) for token in words]
    memory, attend, failing = told.fork(), MemoryLayer.attend, True
    last = len(memory.layers) - 1

    def fail(self: MemoryLayer, *args: Any, **settings: Any) -> torch.Tensor:
        out = attend(self, *args, **settings)
        if failing and self.index == last:
            raise CorruptSession("not now")
        return out

    monkeypatch.setattr(MemoryLayer, "attend", fail)
    for i, token in enumerate(words):
        failing = True
        for instead in ([91], word(i, 7)):
            with pytest.raises(CorruptSession):
                llama.forward(instead, memory)
        failing = False
        assert torch.equal(llama.forward([token], memory), expected[i])
