"""Commands as a test runs them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infllm_agent.storage.session_store import SessionStore


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
        from infllm_agent.cli.app import main

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
            "from infllm_agent.cli.app import main; sys.exit(main())"
        )
        command = [sys.executable, "-c", program, *arguments, "--root", str(self.root), "--model", str(self.model)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def store(self, session: str) -> SessionStore:
        """What is committed."""
        return SessionStore.open(self.root, session, readonly=True)
