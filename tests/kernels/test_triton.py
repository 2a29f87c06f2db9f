"""Triton's kernels without a GPU: what they compute, in the interpreter; and that they compile to what a GPU has.

Both need a process of their own: whether kernels are interpreted is decided when Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infllm_agent.kernels import backend

TESTS = Path(__file__).parents[1]
COMPILE = str(TESTS / "helpers" / "triton_compile.py")

pytest.importorskip("triton")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=TESTS.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_kernels_compute_what_plain_torch_does() -> None:
    out = run("-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", TRITON_INTERPRET="1")
    assert " passed" in out
    assert "failed" not in out
    assert int(out.split(" passed")[0].split()[-1]) > 50


@pytest.mark.slow
def test_kernels_compile_and_fit_the_shared_memory_of_consumer_gpus(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    out = run(COMPILE, PYTHONPATH=path, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    found = json.loads(out)
    assert found["limit"] == 99 * 1024
    assert len(found["taken"]) == 13
    too_large = {name: shared for name, shared in found["taken"].items() if shared > found["limit"]}
    assert not too_large
    assert {name: found["taken"][name] for name in found["bound"]} == found["bound"]  # the arithmetic is right
    assert max(found["bound"].values()) > 70 * 1024


def test_on_a_cpu_plain_torch_computes() -> None:
    assert backend.chosen(torch.zeros(1)) == "plain"
    with backend.using("triton"):
        assert backend.chosen(torch.zeros(1)) == "triton"
    assert backend.chosen(torch.zeros(1)) == "plain"
