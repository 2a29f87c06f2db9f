"""Tokens fed one by one on a GPU's paths, on a CPU: plain torch stands in for the kernels, which tests/gpu compares.

What is asked here is where blocks are found and who waits for whom, not what a kernel computes.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from infllm_agent.blocks.device_cache import BlockCache
from infllm_agent.blocks.store import BlockStore
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import CorruptSession
from infllm_agent.kernels import backend
from infllm_agent.kernels.decode_attention import plain as plain_decode
from infllm_agent.kernels.decode_attention.keys import Bounds
from infllm_agent.kernels.votes import plain as plain_votes
from infllm_agent.memory import snapshot
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.index import BlockIndex
from infllm_agent.memory.layer import MemoryLayer
from infllm_agent.memory.trace_recorder import TraceRecorder
from infllm_agent.model.local_model import LocalModel

pytest.importorskip("triton")
from infllm_agent.kernels.block_keys import triton as triton_keys
from infllm_agent.kernels.decode_attention import triton as triton_decode
from infllm_agent.kernels.votes import triton as triton_votes

CONFIG = MemoryConfig(
    n_init=4, n_local=24, block_size=8, topk=3, chunk_size=16, max_cached_block=3, candidates=6, candidate_tokens=8
)
TOLD = 8 * 30 + 4 + 24 + 3

WAITING = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Waits(TorchDispatchMode):
    """Counts, while its ``with`` lasts, what would wait for a GPU: values that the host asks for, and shapes that
    depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.aside = 1

    def __enter__(self) -> Waits:
        self.aside -= 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.aside += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or name in ("nonzero", "masked_select", "_local_scalar_dense", "_unique2", "bincount"):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        if not self.aside:
            self.seen[name] += 1

    @contextmanager
    def not_now(self) -> Iterator[None]:
        self.aside += 1
        try:
            yield
        finally:
            self.aside -= 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    mode = Waits()

    def noting(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def noted(self: Tensor, *arguments: Any) -> Any:
            mode.note(name)
            with mode.not_now():
                return method(self, *arguments)

        return noted

    for name in WAITING:
        monkeypatch.setattr(Tensor, name, noting(name))
    return mode


@pytest.fixture(autouse=True)
def gpu_paths(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def attention(*arguments: Any, **options: Any) -> Any:
        with waits.not_now():
            return plain_decode.decode_attention(*arguments, **options)

    def votes(q: Tensor, keys: Tensor, scale: float, others: Tensor | None, chosen: Tensor | None) -> Tensor:
        keys = keys if chosen is None else keys[chosen]
        return plain_votes.votes(q, keys, scale) if others is None else plain_votes.votes_among(q, keys, others, scale)

    monkeypatch.setattr(triton_decode, "decode_attention", attention)
    monkeypatch.setattr(triton_votes, "votes", votes)
    monkeypatch.setattr(triton_keys, "mean_keys", lambda k: k.mean(dim=2, dtype=torch.float32))
    with backend.using("triton"):
        yield


@pytest.fixture(scope="module")
def llama() -> LocalModel:
    return tiny("llama")


def word(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, 90), k=count)


def read(model: LocalModel, config: MemoryConfig = CONFIG) -> ContextMemory:
    memory, text = model.new_memory(config), word(1, TOLD)
    for start in range(0, TOLD, 16):
        model.forward(text[start : start + 16], memory)
    return memory


def asking_the_host(model: LocalModel, config: MemoryConfig = CONFIG) -> ContextMemory:
    """A memory that looks for blocks in a small cache, on the host, for each token."""
    with backend.using("plain"):
        memory = model.new_memory(config)
    text = word(1, TOLD)
    for start in range(0, TOLD, 16):
        model.forward(text[start : start + 16], memory)
    assert {layer.cache.slots for layer in memory.layers.values()} == {3}
    return memory


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each first pass of a lookup from now on."""
    seen: list[int] = []
    most_voted = BlockIndex.most_voted

    def and_note(self: BlockIndex, *arguments: Any) -> Tensor:
        seen.append(self.count)
        return most_voted(self, *arguments)

    monkeypatch.setattr(BlockIndex, "most_voted", and_note)
    return seen


@pytest.mark.parametrize("name", ["llama", "gemma2", "smollm3"])
def test_whoever_looks_for_the_blocks_the_logits_are_the_same(name: str) -> None:
    model = tiny(name)
    memory, host = read(model), asking_the_host(model)
    for token in word(2, 60):
        assert torch.equal(model.forward([token], memory), model.forward([token], host))
        for mine, theirs in zip(memory.layers.values(), host.layers.values(), strict=True):
            assert mine.selected == theirs.selected
            mine.cache.check_integrity()
    for ids in (word(3, 16), [5], [6], word(4, 7), [7], [8]):
        assert torch.equal(model.forward(ids, memory), model.forward(ids, host))
    assert memory.cache_counters()[1] > 0
    assert host.cache_counters()[1] > memory.cache_counters()[1]


@pytest.mark.parametrize(
    "rules",
    [
        {"candidates": 0},
        {"candidate_tokens": 1},
        {"lookup": "similarity"},
        {"positions": "one_angle", "max_cached_block": 9},
        {"block_dtype": "int8"},
        {"flat_blocks": 8},
    ],
    ids=str,
)
def test_it_holds_under_other_rules(llama: LocalModel, rules: dict[str, Any]) -> None:
    config = CONFIG.changed(**rules)
    memory = read(llama, config)
    with backend.using("plain"):
        plain = read(llama, config)
    for token in word(2, 24):
        got = llama.forward([token], memory)
        with backend.using("plain"):
            assert torch.allclose(got, llama.forward([token], plain), atol=2e-4)


def test_a_token_whose_candidates_are_kept_waits_for_nothing(
    llama: LocalModel, waits: Waits, anew: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = read(llama)
    fetched: list[int] = []
    fetch, logits = BlockCache.fetch, LocalModel._logits

    def noted_fetch(cache: BlockCache, blocks: Any, load: Any) -> list[int]:
        fetched.append(len(blocks))
        return fetch(cache, blocks, load)

    def watched(self: LocalModel, *arguments: Any, **options: Any) -> Tensor:
        with waits:
            return logits(self, *arguments, **options)

    monkeypatch.setattr(BlockCache, "fetch", noted_fetch)
    monkeypatch.setattr(LocalModel, "_logits", watched)
    layers, quiet = len(memory.layers), 0
    before = {"__bool__": 1}  # the first layer: transformers looks whether several texts are packed into one
    for token in word(3, 40):
        for seen in (waits.seen, anew, fetched):
            seen.clear()
        hits, misses = memory.cache_counters()
        llama.forward([token], memory)
        if anew:
            assert waits.seen == {"tolist": layers, **before}  # to know which candidates are new in the cache
            assert fetched == [6] * layers
        else:
            assert waits.seen == before
            assert not fetched
            assert memory.cache_counters() == (hits + 3 * layers, misses)
            quiet += 1
    assert quiet > 25


def test_waits_are_seen(waits: Waits) -> None:
    x = torch.tensor([3.0, 0.0])
    with waits:
        x.tolist(), x[0].item(), bool(x[0] > 1), x.numpy(), x.cpu(), x.nonzero(), x[x > 1]
        x[x > 2] = 1
    assert set(waits.seen) == {"tolist", "item", "__bool__", "numpy", "cpu", "nonzero", "index", "index_put_"}


def test_candidates_stay_in_the_cache_from_one_choice_to_the_next(
    llama: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, loaded = read(llama), 0
    keys = BlockStore.keys

    def counted(store: BlockStore, blocks: Any, **where: Any) -> Tensor:
        nonlocal loaded
        loaded += len(blocks)
        return keys(store, blocks, **where)

    monkeypatch.setattr(BlockStore, "keys", counted)
    misses = memory.cache_counters()[1]
    for token in [5] * 40:
        llama.forward([token], memory)
    assert loaded == memory.cache_counters()[1] - misses
    assert 0 < loaded < 6 * 6 * len(memory.layers) / 2  # six choices of six


def test_it_goes_on_from_anywhere(llama: LocalModel) -> None:
    """At every token of an answer: forked, or taken from its tail."""
    start, words = read(llama), word(4, 20)
    memory = start.fork()
    expected = [llama.forward([token], memory) for token in words]
    memory = start.fork()
    for i, token in enumerate(words):
        state = snapshot.unpack(*snapshot.pack(memory.state(), CONFIG))
        resumed, fork = memory.fork(), memory.fork()
        resumed.restore(state)
        for j in range(i, min(i + 4, len(words))):
            assert torch.equal(llama.forward([words[j]], fork), expected[j]), (i, j)
            assert torch.equal(llama.forward([words[j]], resumed), expected[j]), (i, j)
        assert torch.equal(llama.forward([token], memory), expected[i])


def test_a_step_that_failed_is_as_if_it_had_not_been(llama: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another token, or a chunk that brings other blocks, in the place of one that failed midway."""
    words, memory, untroubled = word(5, 20), read(llama), read(llama)
    expected = [llama.forward([token], untroubled) for token in words]
    attend, failing, last = MemoryLayer.attend, True, len(memory.layers) - 1

    def fail(self: MemoryLayer, *arguments: Any, **options: Any) -> Tensor:
        out = attend(self, *arguments, **options)
        if failing and self.index == last:
            raise CorruptSession("not now")
        return out

    monkeypatch.setattr(MemoryLayer, "attend", fail)
    for i, token in enumerate(words):
        failing = True
        for instead in ([91], word(i, 7), word(i + 50, 16)):
            with pytest.raises(CorruptSession):
                llama.forward(instead, memory)
        failing = False
        assert torch.equal(llama.forward([token], memory), expected[i])
    assert memory.cache_counters()[1] > untroubled.cache_counters()[1]  # candidates were brought again


def test_a_load_that_failed_is_tried_again(llama: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    words, memory, untroubled = word(7, 20), read(llama), read(llama)
    expected = [llama.forward([token], untroubled) for token in words]
    values, failed = BlockStore.values, 0

    def fail_once(store: BlockStore, blocks: Any, **where: Any) -> Tensor:
        nonlocal failed
        failed += 1
        if failed % 3 == 1:
            raise CorruptSession("not now")
        return values(store, blocks, **where)

    monkeypatch.setattr(BlockStore, "values", fail_once)
    for i, token in enumerate(words):
        for _ in range(30):
            try:
                logits = llama.forward([token], memory)
                break
            except CorruptSession:
                continue
        assert torch.equal(logits, expected[i])
    assert failed > 3


def test_traced_tokens_and_others_take_turns(llama: LocalModel) -> None:
    memory, untold = read(llama), read(llama)
    recorder = TraceRecorder(list(memory.layers), block_size=8, mode="sampled")
    for i, token in enumerate(word(6, 24)):
        memory.recorder = recorder if i % 3 == 1 else None
        got = llama.forward([token], memory)
        assert torch.allclose(got, llama.forward([token], untold), atol=1e-4)
    trace = recorder.trace(1, TOLD, memory.length, n_sinks=memory.n_sinks)
    assert trace.layers


def test_the_cache_has_room_for_all_candidates_and_is_counted(llama: LocalModel) -> None:
    memory = llama.new_memory(CONFIG)
    assert {layer.cache.slots for layer in memory.layers.values()} == {6}
    with backend.using("plain"):
        plain = llama.new_memory(CONFIG)
    a_block = 2 * 8 * 8 * 4  # kv_heads, tokens, channels, bytes
    # Three slots more for keys and values, and no keys of six candidates beside them.
    assert memory.device_bytes() - plain.device_bytes() == 3 * a_block * (2 * 3 - 6)
    wide = CONFIG.changed(max_cached_block=9)
    assert llama.new_memory(wide).layers[0].cache.slots == 9


def test_a_memory_that_nobody_has_is_gone_at_once(llama: LocalModel) -> None:
    memory = read(llama)
    llama.forward([5], memory)
    caches = [weakref.ref(layer.cache) for layer in memory.layers.values()]
    gc.disable()
    try:
        memory.dismiss()
        assert [cache() for cache in caches] == [None] * len(caches)
    finally:
        gc.enable()


def test_bounds_are_written_in_place() -> None:
    bounds = Bounds(torch.device("cpu"))
    first = bounds.set(4, 3, 7, 30)
    assert first.tolist() == [4, 3, 7, 30]
    assert bounds.set(4, 3, 8, 31) is first
    assert first.tolist() == [4, 3, 8, 31]
