"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import Cli

if TYPE_CHECKING:
    from infllm_agent.model.local_model import LocalModel

# transformers reads it when it is imported; the command line, which runs here in this process, sets it before that.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    from infllm_agent.model.resolve import resolve_model

    return resolve_model("smollm2")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of random weights that loads at once, with a byte-level vocabulary and ChatML.

    A run of 256 letters a is one token, so that a text of many megabytes has a bearable number of tokens.
    """
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def tiny_model(tiny_model_folder: Path) -> LocalModel:
    from infllm_agent.model.local_model import LocalModel

    return LocalModel.load(str(tiny_model_folder), dtype="float32")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tiny model's sums are so short that threads would spend all time waiting for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cli]:
    import torch

    # The tiny model's sums are so short that on a busy machine threads would spend all time waiting for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield Cli(tmp_path / "root", tiny_model_folder, capsys, monkeypatch)
    torch.set_num_threads(threads)
