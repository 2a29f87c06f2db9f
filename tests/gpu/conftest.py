"""Triton's kernels, where they can be run: on a GPU; or in Triton's interpreter, as tests/kernels does."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    pytest.skip("needs a CUDA device, or Triton's interpreter (tests/kernels/test_triton.py)")
