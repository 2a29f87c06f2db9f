"""What this process and this machine can tell about themselves."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch


def peak_rss_mb() -> int:
    """The most memory that this process has held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1e6 if sys.platform == "darwin" else 1e3))


def ceilings() -> dict[str, float]:
    """What the machine can do at best: a float32 matrix product, and a copy (bytes read and written counted)."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    source = torch.empty(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _best(lambda: a @ b)
    copy = _best(lambda: target.copy_(source))
    return {"matmul_gflops": round(2 * 1536**3 / product / 1e9, 1), "copy_gb_s": round(2 * (64 << 20) / copy / 1e9, 1)}


def _best(work: Callable[[], object], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
