"""The answers of a measurement, one JSON line for each round of questions, kept as they come.

A measurement that was stopped goes on from them. Every line carries a digest of all that its answers depend on (the
text and the questions, the model, the method's settings, the code), so that answers of another plan are never counted.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from infllm_agent.bench.retrieval.haystack import Haystack
from infllm_agent.bench.retrieval.methods import Method
from infllm_agent.bench.retrieval.readers import Rate
from infllm_agent.errors import StorageError
from infllm_agent.model.local_model import LocalModel

#: The modules and packages that decide what is answered; a change of what they do makes earlier answers void.
READER_CODE = ("bench/retrieval/rag", "bench/retrieval/readers")
MEMORY_CODE = ("config", "kernels", "blocks", "memory", "model")


@dataclass(frozen=True)
class Answered:
    """What one round of questions, asked after ``tokens`` tokens, came to.

    Attributes:
        round: its number among those asked after so many tokens.
        written: for each question, what the model wrote.
        right: for whoever reads the file; nothing is computed from it.
        prefill, decode: what was computed since the round before.
    """

    digest: str
    task: str
    context: int
    method: str
    tokens: int
    round: int
    written: list[str]
    right: list[bool]
    attended_keys: int
    prefill: Rate
    decode: Rate
    peak_rss_mb: int

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Answered:
        return cls(**{**row, "prefill": Rate(**row["prefill"]), "decode": Rate(**row["decode"])})


@dataclass
class Answers:
    """All answers there are, by the digest and then by length and number of the round."""

    by_digest: dict[str, dict[tuple[int, int], Answered]] = field(default_factory=dict)
    _file: IO[bytes] | None = None

    @classmethod
    @contextmanager
    def open(cls, path: Path | None) -> Iterator[Answers]:
        """Those of a file, made if it is not there; None: kept in memory only.

        Raises:
            StorageError: the file cannot be written, is another run's just now, or holds something else.
        """
        answers = cls()
        if path is None:
            yield answers
            return
        try:
            file = path.open("a+b")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(f"{path}: another measurement is writing to it") from None
            answers._load(file, path)
            answers._file = file
            yield answers

    def of(self, digest: str) -> dict[tuple[int, int], Answered]:
        return self.by_digest.get(digest, {})

    def add(self, answered: Answered) -> None:
        self._keep(answered)
        if self._file is not None:
            self._file.write(json.dumps(asdict(answered)).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Put what was added on stable storage."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _keep(self, answered: Answered) -> None:
        self.by_digest.setdefault(answered.digest, {})[answered.tokens, answered.round] = answered

    def _load(self, file: IO[bytes], path: Path) -> None:
        file.seek(0)
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # torn by a kill: that round is asked again
            try:
                self._keep(Answered.from_json(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                raise StorageError(f"{path}: line {number} is no answer of a measurement; move the file away") from None
            whole += len(line)
        file.truncate(whole)


def digest_of(model: LocalModel, method: Method, haystack: Haystack) -> str:
    """A fingerprint of everything that the answers to a haystack depend on."""
    parts = [
        _code(memory=method.uses_memory),
        model.digest(),
        str(model.dtype),
        model.device.type,
        method.name,
        method.settings,
        asdict(haystack),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _code(*, memory: bool) -> str:
    package = Path(__file__).parents[2]
    names = (*READER_CODE, *MEMORY_CODE) if memory else READER_CODE
    paths = [path for name in names for path in [package / f"{name}.py", *sorted((package / name).rglob("*.py"))]]
    digest = hashlib.sha256()
    for path in filter(Path.exists, paths):
        digest.update(meaning(path.read_text("utf-8")).encode())
    return digest.hexdigest()


def meaning(source: str) -> str:
    """The syntax tree without docstrings: what is left when wording, comments and layout are taken away."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant()), *_] as body:
                del body[0]
    return ast.dump(tree)
