"""Fixtures that several test files share."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infllm_agent.store import SessionStore

if TYPE_CHECKING:
    from infllm_agent.model import LocalModel

# transformers reads it when it is imported; the command line, which runs here in this process, sets it before that.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    from infllm_agent.hub import resolve_model

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
    from infllm_agent.model import LocalModel

    return LocalModel.load(str(tiny_model_folder), dtype="float32")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tiny model's sums are so short that threads would spend all time waiting for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as JSON; there must be nothing else on it, and nothing went wrong."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line on stderr that a failed command leaves, without its end."""
        assert self.code != 0
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.removesuffix("\n")


class Cli:
    """Runs commands in this process, on a root and the tiny model of its own."""

    def __init__(self, root: Path, model: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.root, self.model = root, model
        self._capsys, self._patch = capsys, patch
        patch.setenv("INFLLM_ROOT", str(root))

    def __call__(self, *arguments: str, stdin: bytes = b"") -> Result:
        from infllm_agent.cli import main

        if arguments[0] in ("ingest", "ask", "chat") and "--model" not in arguments:
            arguments = (*arguments, "--model", str(self.model))
        self._patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self._capsys.readouterr()
        code = main(arguments)
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A command in a process of its own."""
        # A shell that runs the tests in the background ignores Ctrl-C, and so would they.
        program = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from infllm_agent.cli import main; sys.exit(main())"
        )
        command = [sys.executable, "-c", program, *arguments, "--root", str(self.root), "--model", str(self.model)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def store(self, session: str) -> SessionStore:
        """What is committed."""
        return SessionStore.open(self.root, session, readonly=True)


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
