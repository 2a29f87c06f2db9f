"""Flipped bits, cut, missing, swapped and outdated files: each is an error that names a file, or changes nothing."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from infllm_agent.errors import CorruptSession, InfLLMError, StorageError, UnknownSession
from infllm_agent.storage.catalog import Catalog
from survival.process import Progress, fork, wait
from survival.script import NAME, Survivor, Uninterrupted, do

OTHER = "other"


class Damage:
    """A root with two sessions of the same shape, as a killed process left it (with SQLite's log) and as an orderly
    end did; and what one of them had at earlier commits."""

    def __init__(self, run: Uninterrupted, folder: Path) -> None:
        self._run = run
        self._folder = folder
        self._last = len(run.script.parts)
        self._ids: dict[str, str] = {}
        self._root = folder
        self._earlier = folder / "earlier"
        self._make("closed", close=True)
        self._make("killed", close=False)

    def _make(self, name: str, *, close: bool) -> None:
        runtime = self._run.runtime(self._folder / name)

        def work(progress: Progress) -> None:
            for session in (runtime.open_idle(NAME), runtime.open_idle(OTHER)):
                parts = self._run.script.parts
                if session.name == OTHER:  # as many tokens, other ones
                    parts = [[(w, r, n, t[::-1] if isinstance(t, str) else t) for w, r, n, t in part] for part in parts]
                for number, part in enumerate(parts):
                    for step in part:
                        do(session, step)
                    session.commit()
                    if close and session.name == NAME and number == self._last // 2:
                        session.store.close()  # what is in SQLite's log goes into the database
                        shutil.copytree(session.store.folder, self._earlier)
                        runtime.drop(NAME)
                        session = runtime.open_idle(NAME)
            if close:
                runtime.drop(NAME)
                runtime.drop(OTHER)

        wait(*fork(work))

    def _copy(self, name: str, root: Path) -> Path:
        """Copy a root; returns the folder of the session that is damaged."""
        for path in root.rglob("*"):
            if path.is_file():
                path.unlink()
        shutil.copytree(self._folder / name, root, dirs_exist_ok=True)
        if name not in self._ids:
            self._ids[name] = str(Catalog(root).find(NAME))
        return root / "sessions" / self._ids[name]

    def trial(self, seed: int) -> Counter[str]:
        """One damage."""
        dice = random.Random(seed)
        how_left = dice.choice(["closed", "killed"])
        root = self._root = self._folder / f"damaged-{how_left}"
        folder = self._copy(how_left, root)
        victim = dice.choice([root / "catalog.db", *sorted(path for path in folder.iterdir() if path.stat().st_size)])
        kind = victim.name.split("-")[0] if victim.suffix in (".kv", ".safetensors") else victim.name
        how: Callable[[random.Random, Path], str] = dice.choice(
            [_flip, _flip, _flip, _scribble, _cut, _extend, _remove, self._swap, self._outdate]
        )
        done = how(dice, victim)
        outcome = self._outcome(root)
        if outcome == "an earlier generation is there" and "session.db-wal" not in done:
            raise Survivor(f"{done}: {outcome}")
        return Counter({"damages": 1, f"{kind}: {outcome}": 1})

    def _outcome(self, root: Path) -> str:
        runtime = self._run.runtime(root)
        try:
            try:
                session = runtime.open_idle(NAME)
                if session.store.generation == 0:
                    raise Survivor("an empty session is there instead")
                generation = self._run.compare(session, probe=16)
                session.store.verify()
            except (CorruptSession, StorageError, UnknownSession) as error:
                if str(root) not in str(error) or "\n" in str(error):
                    raise Survivor(f"an error that names no file: {error}") from error
                return "named"
            except InfLLMError as error:
                raise Survivor(f"{type(error).__name__}: {error}") from error
            return "no effect" if generation == self._last else "an earlier generation is there"
        finally:
            runtime.drop(NAME)

    def _swap(self, dice: random.Random, victim: Path) -> str:
        """Exchange a file for one of the same kind: of the other session, or another segment of its own."""
        alike = [
            path
            for path in sorted((self._root / "sessions").rglob("*"))
            if path != victim and path.suffix == victim.suffix and path.name.split("-")[0] == victim.name.split("-")[0]
        ]
        if not alike:
            return _flip(dice, victim)
        other = dice.choice(alike)
        first, second = victim.read_bytes(), other.read_bytes()
        victim.write_bytes(second)
        other.write_bytes(first)
        return f"swapped {victim.name} and {other}"

    def _outdate(self, dice: random.Random, victim: Path) -> str:
        """Put back a file as it was at an earlier commit."""
        earlier = self._earlier / victim.name
        if not earlier.exists():
            return _flip(dice, victim)
        shutil.copyfile(earlier, victim)
        return f"outdated {victim.name}"


def _flip(dice: random.Random, victim: Path) -> str:
    data = bytearray(victim.read_bytes())
    places = [dice.randrange(len(data)) for _ in range(dice.choice([1, 1, 1, 2, 8]))] if data else []
    for place in places:
        data[place] ^= 1 << dice.randrange(8)
    victim.write_bytes(data)
    return f"flipped bits of {victim.name} at {places}"


def _scribble(dice: random.Random, victim: Path) -> str:
    data = bytearray(victim.read_bytes())
    start = dice.randrange(len(data) + 1)
    size = dice.choice([1, 100, 512, 4096, 20_000])
    data[start : start + size] = dice.choice([bytes(size), dice.randbytes(size)])
    victim.write_bytes(data)
    return f"wrote {size} bytes into {victim.name} at {start}"


def _cut(dice: random.Random, victim: Path) -> str:
    size = dice.choice([0, dice.randrange(victim.stat().st_size + 1)])
    os.truncate(victim, size)
    return f"cut {victim.name} to {size}"


def _extend(dice: random.Random, victim: Path) -> str:
    with victim.open("ab") as file:
        file.write(dice.randbytes(dice.choice([1, 4096, 10_000])))
    return f"extended {victim.name}"


def _remove(dice: random.Random, victim: Path) -> str:
    victim.unlink()
    return f"removed {victim.name}"
