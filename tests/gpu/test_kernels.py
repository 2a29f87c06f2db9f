"""Triton's kernels against plain torch and the references: real shapes on a GPU, small ones in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_agent.kernels.backend import Backend, using
from infllm_agent.kernels.block_keys import mean_keys, representative_keys
from infllm_agent.kernels.block_keys import reference as reference_keys
from infllm_agent.kernels.decode_attention import decode_attention
from infllm_agent.kernels.decode_attention import plain as plain_decode
from infllm_agent.kernels.decode_attention import reference as reference_decode
from infllm_agent.kernels.decode_attention.keys import Angles, DecodeKeys, bounds
from infllm_agent.kernels.rotary import Rotary
from infllm_agent.kernels.votes import best, votes
from infllm_agent.kernels.votes import plain as plain_votes
from infllm_agent.kernels.votes import reference as reference_votes

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# -- attention of one token ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A token and what it attends to."""

    kv_heads: int = 2
    group: int = 3
    dim: int = 64
    block_size: int = 16
    sinks: int = 5
    blocks: int = 4
    window: int = 21
    start: int = 3
    positions: str = "contiguous"
    rotary: int | None = None  # pairs of channels that rotate; None: all
    interleaved: bool = False
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    def build(self, device: torch.device) -> tuple[Tensor, DecodeKeys]:
        def kv(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
            k, v = (random(*shape, self.dim, device=device, dtype=self.dtype, seed=seed + i) for i in range(2))
            return k, v

        angles = None
        if self.positions != "none":
            pairs = self.dim // 2 if self.rotary is None else self.rotary
            positions = self.sinks + self.blocks * self.block_size + self.start + self.window + 60
            rotary = Rotary(1e4 ** -(torch.arange(pairs).double() / pairs), self.interleaved)
            cos, sin = (x.to(device) for x in rotary.angles(torch.arange(positions)))
            angles = Angles(cos, sin, self.interleaved, 57 if self.positions == "one_angle" else None)
        slots = torch.randperm(self.blocks + 3, generator=torch.Generator().manual_seed(9))[: self.blocks + 1]
        keys = DecodeKeys(
            *kv(self.kv_heads, self.sinks + 2, seed=1),
            *kv(self.kv_heads, self.blocks + 3, self.block_size, seed=3),
            slots.to(device),
            *kv(self.kv_heads, self.start + self.window + 4, seed=5),
            bounds(self.sinks, self.blocks, self.start, self.start + self.window, device),
            angles,
        )
        return random(self.kv_heads * self.group, self.dim, device=device, dtype=self.dtype, seed=7), keys


SMALL_STEPS = {
    "contiguous": Step(),
    "one angle": Step(positions="one_angle"),
    "no rotation": Step(positions="none"),
    "head of 128": Step(kv_heads=1, group=4, dim=128),
    "no grouping": Step(kv_heads=3, group=1),
    "large group": Step(kv_heads=1, group=17, dim=32),
    "odd sizes": Step(dim=20, block_size=7, sinks=1, blocks=5, window=33),
    "large blocks": Step(block_size=48, blocks=2),
    "first token": Step(sinks=0, blocks=0, window=1, start=0),
    "no sinks": Step(sinks=0),
    "no blocks": Step(blocks=0),
    "only the token itself near": Step(window=1),
    "more shares than keys": Step(sinks=1, blocks=0, window=2),
    "partial rotary": Step(rotary=8, dim=40),
    "interleaved": Step(interleaved=True),
    "interleaved, partial": Step(interleaved=True, rotary=10, positions="one_angle"),
    "softcap": Step(softcap=3.0),
    "bfloat16": Step(dtype=torch.bfloat16),
    "float16": Step(dtype=torch.float16, positions="one_angle"),
}
LLAMA_8B = Step(kv_heads=8, group=4, dim=128, sinks=128, blocks=256, window=4096, start=77, dtype=torch.bfloat16)
REAL_STEPS = {
    "Llama 8B": LLAMA_8B,
    "Llama 8B, one angle": Step(**{**vars(LLAMA_8B), "positions": "one_angle", "block_size": 128, "blocks": 32}),
    "SmolLM2": Step(kv_heads=3, group=3, sinks=64, blocks=64, window=520, dtype=torch.bfloat16),
    "Qwen 0.5B": Step(kv_heads=2, group=7, sinks=64, blocks=64, window=520, dtype=torch.float16),
    "Gemma": Step(kv_heads=4, group=2, dim=256, sinks=64, blocks=64, window=520, dtype=torch.bfloat16),
    "float32": Step(kv_heads=3, group=3, sinks=64, blocks=64, window=520),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("name", [*SMALL_STEPS, *(REAL_STEPS if ON_GPU else [])])
def test_decode_attention(name: str, device: torch.device) -> None:
    step = {**SMALL_STEPS, **REAL_STEPS}[name]
    q, keys = step.build(device)
    options = {"scale": step.dim**-0.5, "softcap": step.softcap}
    with using("triton"):
        got = decode_attention(q, keys, **options)
    tolerance: dict[str, Any] = {"atol": TOLERANCE[step.dtype], "rtol": TOLERANCE[step.dtype]}
    plain = plain_decode.decode_attention(q, keys, **options)
    assert got.out.shape == plain.out.shape == (step.kv_heads * step.group, 1, step.dim)
    torch.testing.assert_close(got.out, plain.out, **tolerance)
    torch.testing.assert_close(got.lse, plain.lse, **tolerance)
    if name in SMALL_STEPS:
        moved = DecodeKeys(*(x.cpu() for x in keys[:-1]), angles=keys.angles and _cpu(keys.angles))  # type: ignore[misc,arg-type]
        out, lse = reference_decode.decode_attention(q.cpu(), moved, **options)
        for one in (got, plain):
            torch.testing.assert_close(one.out.cpu(), out, **tolerance)
            torch.testing.assert_close(one.lse.cpu(), lse, **tolerance)


def _cpu(angles: Angles) -> Angles:
    return angles._replace(cos=angles.cos.cpu(), sin=angles.sin.cpu())


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_shares_of_the_keys_change_nothing(splits: int, device: torch.device) -> None:
    from infllm_agent.kernels.decode_attention import triton

    q, keys = Step(window=70).build(device)
    got = triton.decode_attention(q, keys, scale=0.3, splits=splits)
    plain = plain_decode.decode_attention(q, keys, scale=0.3)
    torch.testing.assert_close(got.out, plain.out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.lse, plain.lse, atol=2e-5, rtol=2e-5)


def test_nothing_outside_the_bounds_is_seen(device: torch.device) -> None:
    q, keys = Step().build(device)
    with using("triton"):
        before = decode_attention(q, keys, scale=0.3)
        n_sinks, n_blocks, start, stop = keys.bounds.tolist()
        for x in (keys.sink_k, keys.sink_v):
            x[:, n_sinks:] = torch.nan
        for x in (keys.near_k, keys.near_v):
            x[:, :start] = x[:, stop:] = torch.nan
        for x in (keys.cache_k, keys.cache_v):
            x[:, [slot for slot in range(x.shape[1]) if slot not in keys.slots[:n_blocks].tolist()]] = torch.nan
        after = decode_attention(q, keys, scale=0.3)
    torch.testing.assert_close(after.out, before.out, atol=0, rtol=0)
    torch.testing.assert_close(after.lse, before.lse, atol=0, rtol=0)


@pytest.mark.parametrize("chosen", ["triton", "plain"])
def test_decode_attention_refuses_what_does_not_fit(chosen: Backend, device: torch.device) -> None:
    q, keys = Step().build(device)
    wrong = [
        (q[:5], keys, "a multiple of 2"),
        (q[:, :32], keys, "expected q"),
        (q, keys._replace(sink_v=keys.sink_v[:1]), "expected sink_v"),
        (q, keys._replace(cache_v=keys.cache_v[:, 1:]), "expected cache_v"),
        (q, keys._replace(bounds=keys.bounds.long()), "expected bounds"),
    ]
    with using(chosen):
        for query, given, message in wrong:
            with pytest.raises(ValueError, match=message):
                decode_attention(query, given, scale=1.0)


def test_only_what_fits_consumer_gpus_is_tried() -> None:
    import triton

    from infllm_agent.kernels.decode_attention.triton import fitting

    candidates = [triton.Config({"BLOCK_N": n}, num_warps=4, num_stages=s) for n, s in [(32, 1), (64, 2), (64, 3)]]
    for dtype, dim, count in [(torch.bfloat16, 128, 2), (torch.bfloat16, 64, 3), (torch.float32, 256, 1)]:
        assert fitting(candidates, {"q": torch.empty(1, dtype=dtype)}, DIM_PADDED=dim) == candidates[:count]


# -- votes -----------------------------------------------------------------------------------------------------------

SMALL_VOTES = [(1, 1, 1, 1, 16), (2, 3, 1, 70, 64), (3, 3, 5, 33, 20), (1, 4, 9, 600, 32), (2, 1, 2, 65, 128)]
REAL_VOTES = [(8, 4, 1, 4096, 128), (8, 4, 32, 62_500, 128), (3, 3, 32, 62_500, 64)]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("shape", [*SMALL_VOTES, *(REAL_VOTES if ON_GPU else [])], ids=str)
def test_votes(shape: tuple[int, int, int, int, int], others: bool, device: torch.device) -> None:
    kv_heads, group, n, blocks, dim = shape
    q = random(kv_heads * group, n, dim, device=device)
    keys = random(blocks, kv_heads, dim, device=device, dtype=torch.bfloat16, seed=1)
    rest = random(kv_heads, group * n, 1, device=device, seed=2) + 3 if others else None
    with using("triton"):
        got = votes(q, keys, 0.3, rest)
    with using("plain"):
        plain = votes(q, keys, 0.3, rest)
    # On a GPU, products of half-precision keys are in TF32, which has ten bits: enough to rank blocks.
    tolerance: dict[str, Any] = {"atol": 1e-2 if ON_GPU else 1e-5, "rtol": 1e-2 if ON_GPU else 1e-4}
    torch.testing.assert_close(got, plain, **tolerance)
    if not others:
        torch.testing.assert_close(got.sum().cpu(), torch.tensor(float(q[..., 0].numel())), rtol=1e-3, atol=0)
    if shape in SMALL_VOTES:
        none = torch.full((kv_heads, group * n, 1), -torch.inf)
        expected = reference_votes.votes_among(q.cpu(), keys.cpu(), none if rest is None else rest.cpu(), 0.3)
        torch.testing.assert_close(got.cpu(), expected, **tolerance)


def test_votes_among_chosen_keys(device: torch.device) -> None:
    q, keys = random(6, 3, 32, device=device), random(90, 2, 32, device=device, seed=1)
    rest = random(2, 9, 1, device=device, seed=2)
    chosen = torch.tensor([80, 3, 4, 77, 5], device=device)
    with using("triton"):
        got = votes(q, keys, 0.4, rest, chosen)
        nobody = votes(q, keys, 0.4, rest, chosen[:0])
    torch.testing.assert_close(got, plain_votes.votes_among(q, keys[chosen], rest, 0.4), atol=1e-5, rtol=1e-4)
    assert nobody.shape == (0,)


def test_votes_on_every_key_of_blocks_are_their_attention_mass(device: torch.device) -> None:
    q = random(6, 2, 32, device=device)
    keys = random(2, 11, 7, 32, device=device, seed=1)
    with using("triton"):
        got = votes(q, keys.flatten(1, 2).transpose(0, 1), 0.4).view(11, 7).sum(dim=1)
    torch.testing.assert_close(got, plain_votes.attention_mass(q, keys, 0.4), atol=1e-5, rtol=1e-4)


def test_the_best_are_found_without_waiting(device: torch.device) -> None:
    scores = random(100, device=device)
    before = torch.cuda.get_sync_debug_mode() if ON_GPU else 0
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        found, every = best(scores, 7), best(scores[:5], 7)
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode(before)
    assert found.tolist() == sorted(scores.argsort(descending=True)[:7].tolist())
    assert every.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("q", "others", "message"),
    [((5, 1, 32), None, "a multiple of 2"), ((4, 1, 16), None, "expected q"), ((4, 1, 32), (2, 3, 1), "others")],
)
def test_votes_refuse_what_does_not_fit(
    q: tuple[int, ...], others: tuple[int, ...] | None, message: str, device: torch.device
) -> None:
    rest = None if others is None else torch.zeros(others, device=device)
    with using("triton"), pytest.raises(ValueError, match=message):
        votes(torch.zeros(q, device=device), torch.zeros(9, 2, 32, device=device), 1.0, rest)


# -- sealing ---------------------------------------------------------------------------------------------------------

SMALL_BLOCKS = [(1, 1, 1, 4), (2, 3, 16, 64), (3, 2, 7, 20), (1, 2, 32, 128)]
REAL_BLOCKS = [(8, 32, 16, 128), (8, 4, 128, 128), (3, 32, 16, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SMALL_BLOCKS, *(REAL_BLOCKS if ON_GPU else [])], ids=str)
def test_block_keys(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    kv_heads, count, size, dim = shape
    n_local, topk = 3 * size + 1, min(4, size)
    window = random(kv_heads, count * size + 9, dim, device=device, dtype=dtype)
    k = window[:, 5 : 5 + count * size].view(kv_heads, count, size, dim)
    queries = random(kv_heads, count * size + n_local + 2, dim, device=device, dtype=dtype, seed=1)
    with using("triton"):
        mean, chosen = mean_keys(k), representative_keys(k, queries, n_local, topk)
    torch.testing.assert_close(mean, k.mean(dim=2, dtype=torch.float32), atol=1e-5, rtol=1e-5)
    with using("plain"):
        torch.testing.assert_close(chosen, representative_keys(k, queries, n_local, topk), atol=1e-5, rtol=1e-5)
    if shape in SMALL_BLOCKS:
        expected = reference_keys.representative_keys(k.cpu(), queries.cpu(), n_local, topk)
        torch.testing.assert_close(chosen.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_no_blocks_have_no_keys(device: torch.device) -> None:
    k, queries = torch.empty(2, 0, 16, 32, device=device), torch.empty(2, 20, 32, device=device)
    with using("triton"):
        assert mean_keys(k).shape == representative_keys(k, queries, 8, 2).shape == (2, 0, 32)


def test_sealing_refuses_what_does_not_fit(device: torch.device) -> None:
    k, queries = torch.zeros(2, 3, 16, 32, device=device), torch.zeros(2, 50, 32, device=device)
    with using("triton"):
        with pytest.raises(ValueError, match="≥ 56"):
            representative_keys(k, queries, 8, 2)
        with pytest.raises(ValueError, match="17 representatives"):
            representative_keys(k, queries, 2, 17)
        with pytest.raises(ValueError, match="one behind the other"):
            mean_keys(k.transpose(2, 3))
