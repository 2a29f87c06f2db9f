"""Fast kernels against their plain references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infllm_agent.kernels.attention import attend, merge, reference
from infllm_agent.kernels.rotary import Rotary, RotaryTable


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    n=st.integers(1, 20),
    m=st.integers(1, 40),
    dim=st.sampled_from([4, 16, 20, 64]),
    kind=st.sampled_from(["all", "causal", "mask"]),
    softcap=st.sampled_from([None, 5.0]),
)
def test_attend(kv_heads: int, group: int, n: int, m: int, dim: int, kind: str, softcap: float | None) -> None:
    m = n if kind == "causal" else m
    q, k, v = random(kv_heads * group, n, dim), random(kv_heads, m, dim, seed=1), random(kv_heads, m, dim, seed=2)
    mask = None
    if kind == "mask":
        mask = random(n, m, seed=3) > 0
        mask[:, 0] = True
    options = {"scale": dim**-0.5, "causal": kind == "causal", "mask": mask, "softcap": softcap}
    got = attend(q, k, v, **options)
    out, lse = reference(q, k, v, **options)
    torch.testing.assert_close(got.out, out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.lse, lse, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_in_half_precision(dtype: torch.dtype) -> None:
    q, k, v = random(6, 9, 32, dtype=dtype), random(2, 50, 32, dtype=dtype, seed=1), random(2, 50, 32, dtype=dtype)
    got, (out, _) = attend(q, k, v, scale=0.2), reference(q, k, v, scale=0.2)
    torch.testing.assert_close(got.out.float(), out.float(), atol=2e-2, rtol=2e-2)


def test_attend_over_views_of_larger_buffers() -> None:
    buffer = random(2, 100, 16)
    q, k = random(4, 3, 16, seed=1), buffer[:, 30:70]
    torch.testing.assert_close(attend(q, k, k, scale=0.3).out, attend(q, k.clone(), k.clone(), scale=0.3).out)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_merge_is_one_softmax(sizes: list[int]) -> None:
    q, k, v = random(4, 5, 16), random(2, sum(sizes), 16, seed=1) * 3, random(2, sum(sizes), 16, seed=2)
    parts = [
        attend(q, k_part, v_part, scale=0.25)
        for k_part, v_part in zip(k.split(sizes, dim=1), v.split(sizes, dim=1), strict=True)
    ]
    whole, merged = attend(q, k, v, scale=0.25), merge(parts)
    torch.testing.assert_close(merged.out, whole.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged.lse, whole.lse, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((4, 3, 8), (2, 5, 4), (2, 5, 4)), {}, "head_dim"),
        (((4, 3, 8), (3, 5, 8), (3, 5, 8)), {}, "4 query heads cannot share 3"),
        (((4, 3, 8), (2, 5, 8), (2, 5, 8)), {"causal": True}, "as many keys as queries"),
        (((4, 3, 8), (2, 5, 8), (2, 5, 8)), {"mask": torch.ones(5, 3).bool()}, r"expected a mask \(3, 5\)"),
    ],
)
def test_bad_shapes_are_named(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(*(torch.zeros(shape) for shape in shapes), scale=1.0, **options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rotary_is_a_rotation_by_relative_distance(interleaved: bool, rotary_dim: int) -> None:
    rotary = Rotary(10.0 ** -torch.arange(rotary_dim // 2).double(), interleaved)
    q, k = random(1, 1, 8), random(1, 1, 8, seed=1)

    def dot(i: int, j: int) -> torch.Tensor:
        at = [rotary.rotate(x, rotary.angles(torch.tensor([p]))) for x, p in ((q, i), (k, j))]
        return (at[0] * at[1]).sum()

    torch.testing.assert_close(dot(0, 0), (q * k).sum())
    torch.testing.assert_close(dot(12, 5), dot(107, 100))
    torch.testing.assert_close(dot(10_000_012, 10_000_005), dot(7, 0), atol=1e-4, rtol=1e-4)
    assert (dot(7, 0) - dot(8, 0)).abs() > 1e-3


def test_rotary_table_agrees_and_knows_its_end() -> None:
    rotary = Rotary(10.0 ** -torch.arange(4).double(), False)
    table, x = RotaryTable(rotary, 10, torch.device("cpu")), random(2, 3, 8)
    torch.testing.assert_close(table.rotate(x, 5), rotary.rotate(x, rotary.angles(torch.arange(5, 8))))
    torch.testing.assert_close(table.rotate_all_to(x, 4), rotary.rotate(x, rotary.angles(torch.tensor([4]))))
    with pytest.raises(ValueError, match=r"positions 8\.\.10 lie outside"):
        table.rotate(x, 8)
