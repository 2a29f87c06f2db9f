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


def peak_device_mb() -> int | None:
    """The most that torch has taken of a GPU since ``reset_peaks``, in MB, weights included; None without a GPU."""
    return int(torch.cuda.max_memory_allocated() / 1e6) if torch.cuda.is_available() else None


def reset_peaks() -> None:
    """Let peaks begin anew at what is held now, where that is possible."""
    reset_peak_rss()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do at best: a matrix product in the model's precision, and a copy (bytes read and written
    counted)."""
    gpu = device.type == "cuda"
    size, buffer = (8192, 1 << 30) if gpu else (1536, 64 << 20)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(buffer, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if gpu else _nothing
    product = _best(lambda: a @ b, wait)
    copy = _best(lambda: target.copy_(source), wait)
    return {"matmul_gflops": round(2 * size**3 / product / 1e9, 1), "copy_gb_s": round(2 * buffer / copy / 1e9, 1)}


def _nothing() -> None:
    """A CPU has done what it was given."""


def _best(work: Callable[[], object], wait: Callable[[], None], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats + 1):  # the first call may have to choose a kernel
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return min(times)
