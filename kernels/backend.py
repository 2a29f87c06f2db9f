"""Which kernels compute: Triton's for tensors on a GPU, where Triton is installed; plain torch otherwise.

Both take the same arguments and are tested against each other; their results differ by rounding only. With
``INFLLM_KERNELS=plain`` in the environment, plain torch computes everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

Backend = Literal["triton", "plain"]

_forced: Backend | None = "plain" if os.environ.get("INFLLM_KERNELS") == "plain" else None


def chosen(x: Tensor) -> Backend:
    """Choose what computes for tensors on the device of ``x``."""
    if _forced is not None:
        return _forced
    return "triton" if x.device.type == "cuda" and _has_triton() else "plain"


@contextmanager
def using(forced: Backend) -> Iterator[None]:
    """Use one backend for everything, in all threads, for as long as the ``with`` lasts. On a CPU, Triton works in its
    interpreter only (TRITON_INTERPRET=1)."""
    global _forced
    before, _forced = _forced, forced
    try:
        yield
    finally:
        _forced = before


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
