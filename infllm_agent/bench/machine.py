"""What this process and this machine can tell about themselves."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def peak_rss_mb() -> int:
    """The most memory that this process has held since it began or since ``reset_peak_rss``, in MB."""
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024 // 10**6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1e6 if sys.platform == "darwin" else 1e3))


def reset_peak_rss() -> None:
    """Let the peak begin anew at what is held now, where the system can do that (Linux)."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device without pushing anything out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
