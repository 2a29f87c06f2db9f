"""The memory computes what it says it computes, for every architecture it accepts; the others are refused by name."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import ARCHITECTURES, REFUSED, build, tiny
from torch import Tensor

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError, UnsupportedModel
from infllm_agent.memory.reference import ReferenceMemory
from infllm_agent.model.attention_hook import Memory
from infllm_agent.model.local_model import LocalModel

TOLERANCE = 1e-4
LENGTH = 96
SIZES = {"n_init": 4, "n_local": 10, "block_size": 8, "topk": 2, "chunk_size": 16, "max_cached_block": 3}
PAPER = MemoryConfig.paper(**SIZES, repr_topk=2)
DEFAULT = MemoryConfig(**SIZES, candidates=4, max_votes=5)
RULES = {
    "paper": PAPER,
    "default": DEFAULT,
    "one pass": DEFAULT.changed(candidates=0),
    "mean key": PAPER.changed(block_key="mean"),
    "one angle": DEFAULT.changed(positions="one_angle"),
    "votes": PAPER.changed(lookup="votes", max_votes=5),
    "more for short chunks": DEFAULT.changed(question_topk=3, question_chunk=2),
    "fewer for short chunks": DEFAULT.changed(question_topk=1, question_chunk=7),
}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> LocalModel:
    return tiny(request.param)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(3, 97, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


def full_attention(model: LocalModel, ids: list[int]) -> Tensor:
    with torch.no_grad(), model.detached("eager") as plain:
        return plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def feed(model: LocalModel, memory: Memory, ids: list[int], sizes: tuple[int, ...], seed: int = 3) -> Tensor:
    """All logits, the tokens fed in chunks of random ``sizes``."""
    choice, logits, done = random.Random(seed), [], 0
    while done < len(ids):
        chunk = ids[done : done + choice.choice(sizes)]
        logits.append(model.forward_all(chunk, memory))
        done += len(chunk)
    return torch.cat(logits)


@pytest.mark.parametrize("sizes", [(16,), (1,), (1, 2, 7, 16)], ids=["chunks", "tokens", "mixed"])
def test_equals_full_attention_while_everything_fits(model: LocalModel, ids: list[int], sizes: tuple[int, ...]) -> None:
    memory = model.new_memory(PAPER.model_copy(update={"n_local": LENGTH}))
    got = feed(model, memory, ids, sizes)
    assert memory.store.count == 0
    assert (got - full_attention(model, ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("rules", ["paper", "default"])
@pytest.mark.parametrize("sizes", [(16,), (1, 2, 7, 16)], ids=["chunks", "mixed"])
def test_equals_the_reference_past_the_window(
    model: LocalModel, ids: list[int], sizes: tuple[int, ...], rules: str
) -> None:
    config = RULES[rules]
    memory = model.new_memory(config)
    got = feed(model, memory, ids, sizes)
    reference = ReferenceMemory(config, {n: (spec.rotary, spec.sliding_window) for n, spec in model.specs.items()})
    assert memory.store.count > config.candidates > 0 or memory.store.count > config.topk, "it must have had to choose"
    assert (got - feed(model, reference, ids, sizes)).abs().max() < TOLERANCE
    # The comparison means something only where the method differs from full attention.
    assert (got - full_attention(model, ids)).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("rules", sorted(RULES.keys() - {"paper", "default"}))
def test_each_rule_alone_equals_the_reference(ids: list[int], rules: str) -> None:
    model, config, sizes = tiny("qwen2"), RULES[rules], (1, 2, 7, 16)
    got = feed(model, model.new_memory(config), ids, sizes)
    reference = ReferenceMemory(config, {n: (spec.rotary, spec.sliding_window) for n, spec in model.specs.items()})
    assert (got - feed(model, reference, ids, sizes)).abs().max() < TOLERANCE


@pytest.mark.parametrize("sizes", [(16,), (1, 2, 7, 16)], ids=["chunks", "mixed"])
def test_all_blocks_at_contiguous_positions_are_full_attention(
    model: LocalModel, ids: list[int], sizes: tuple[int, ...]
) -> None:
    memory = model.new_memory(DEFAULT.changed(topk=20, max_cached_block=20, candidates=0))
    got = feed(model, memory, ids, sizes)
    assert memory.store.count > 5
    assert (got - full_attention(model, ids)).abs().max() < TOLERANCE


def test_long_sessions_slide_without_drift(ids: list[int]) -> None:
    """The window's buffer slides to its front many times; positions must not be lost on the way."""
    model = tiny("llama")
    long = (ids * 12)[:1000]
    config = DEFAULT.changed(topk=150, max_cached_block=150, candidates=0)
    got = feed(model, model.new_memory(config), long, (1, 5, 16))
    assert (got - full_attention(model, long)).abs().max() < TOLERANCE


def test_without_sinks_and_without_lookup_it_is_a_window(ids: list[int]) -> None:
    model = tiny("llama")
    config = PAPER.model_copy(update={"n_init": 0, "topk": 0, "max_cached_block": 0})
    got = feed(model, model.new_memory(config), ids, (7,))
    reference = ReferenceMemory(config, {n: (spec.rotary, None) for n, spec in model.specs.items()})
    assert (got - feed(model, reference, ids, (7,))).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near(ids: list[int], dtype: torch.dtype) -> None:
    config_class, overrides = ARCHITECTURES["llama"]
    model = LocalModel.attach(build(config_class, overrides).to(dtype), None)
    got = feed(model, model.new_memory(PAPER.model_copy(update={"n_local": LENGTH})), ids, (1, 16))
    expected = full_attention(model, ids).float()
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_work_is_refused_by_name(name: str) -> None:
    model = build(*REFUSED[name])
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel) as error:
        LocalModel.attach(model, None, name=name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == before, "a refused model is left as it was"


def test_a_window_larger_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="window of llama is 4096 tokens"):
        tiny("llama").new_memory(MemoryConfig(n_local=100_000))


def test_an_all_sliding_model_bounds_the_window_by_its_own() -> None:
    model = tiny("mistral-all-sliding")
    assert model.window == 512
    with pytest.raises(ConfigError, match="512"):
        model.new_memory(MemoryConfig(n_local=600, n_init=0, topk=0, chunk_size=8, block_size=8))
    assert model.default_memory().attended_keys <= 512


def test_a_failed_forward_leaves_the_memory_as_it_was(ids: list[int]) -> None:
    model = tiny("gemma2")
    memory, untouched = model.new_memory(PAPER), model.new_memory(PAPER)
    feed(model, memory, ids[:60], (16,))
    feed(model, untouched, ids[:60], (16,))
    broken = model.model.model.layers[2].mlp

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    handle = broken.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        model.forward(ids[60:70], memory)
    handle.remove()
    assert torch.equal(model.forward_all(ids[60:76], memory), model.forward_all(ids[60:76], untouched))
