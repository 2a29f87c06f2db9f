"""The benchmark of the kernels runs, and what it prints can be true. How fast they are is no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, str(BENCHMARK), "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"decode", "votes", "mean keys", "representatives"}
    for row in rows:
        for name, value in row.items():
            if "share" in name:
                assert 0 < value < 1.1, row


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(BENCHMARK)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "this measures a GPU, and there is none"
