"""Rows come to the device as they were, while it computes. On a CPU too: there they are simply copied."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infllm_agent.kernels.gather import HostGather, runs

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@given(st.lists(st.integers(0, 30)))
def test_runs_are_the_rows(rows: list[int]) -> None:
    found = list(runs(rows))
    assert [first + i for first, count, _ in found for i in range(count)] == rows
    assert [at for *_, at in found] == [sum(count for _, count, _ in found[:i]) for i in range(len(found))]
    assert all(count > 0 for _, count, _ in found)
    assert all(a + n != b for (a, n, _), (b, _, _) in pairwise(found))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("rows", [[], [4], [0, 1, 2, 9, 3, 3], list(range(10))], ids=str)
@pytest.mark.parametrize("apart", [False, True])
def test_rows_are_copied(device: torch.device, rows: list[int], apart: bool) -> None:
    records = torch.randn(10, 7, 5)
    records = records.pin_memory() if device.type == "cuda" else records
    source = records[:, 2:5] if apart else records.view(-1)[:150].view(10, 3, 5)
    target = torch.full((len(rows), 3, 5), torch.nan, device=device)
    gather = HostGather(device)
    gather.begin(source, rows, target)
    gather.wait()
    torch.testing.assert_close(target.cpu(), source[rows], atol=0, rtol=0)
    gather.finish()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_target_in_use_is_not_written_over() -> None:
    device = torch.device("cuda")
    source, target = torch.ones(64, 1 << 18).pin_memory(), torch.zeros(64, 1 << 18, device=device)
    gather, work = HostGather(device), torch.randn(4096, 4096, device=device)
    for _ in range(20):
        work = work @ work / 64
    before = target + 0 * work[0, 0].nan_to_num()  # reads the target late
    gather.begin(source, list(range(64)), target)
    gather.wait()
    after = target.sum()
    assert float(before.sum()) == 0
    assert float(after) == source.numel()


def test_what_does_not_fit_is_refused() -> None:
    gather, source = HostGather(torch.device("cpu")), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"expected a target \(2, 3\)"):
        gather.begin(source, [0, 1], torch.zeros(3, 3))
    with pytest.raises(ValueError, match="int64"):
        gather.begin(source, [0], torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows 1 to 4 are not all there; there are 4"):
        gather.begin(source, [1, 4], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="from cpu to cpu"):
        gather.begin(source, [1], torch.zeros(1, 3, device="meta"))
