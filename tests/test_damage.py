"""Damaged, missing, swapped and outdated files are named, or change nothing; long runs: ``make crash``."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest
from survival import trials
from survival.script import SETTINGS, told

from infllm_agent import AgentRuntime, MemoryConfig
from infllm_agent.errors import CorruptSession, SessionMismatch
from infllm_agent.fingerprint import fingerprint
from infllm_agent.fork import fork_stored
from infllm_agent.records import read_generation, write_generation
from infllm_agent.store import SessionStore

pytestmark = pytest.mark.usefixtures("one_thread")
LOG = "error 404 at 12:30, retry in 5 s "


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> trials.World:
    return trials.World(tmp_path_factory.mktemp("world"))


def test_damage_is_named_or_does_nothing(world: trials.World, tmp_path: Path) -> None:
    counts = sum(islice(trials.damage(world, tmp_path, 0), 500), Counter[str]())
    named = sum(number for outcome, number in counts.items() if outcome.endswith(": named"))
    assert counts["damages"] == 500
    assert named > 150
    assert {"catalog.db: no effect", "lock: no effect"} <= counts.keys()


@pytest.fixture
def two(world: trials.World, tmp_path: Path) -> Iterator[AgentRuntime]:
    """Two sessions of the same shape, stored, of a full segment and a part."""
    with AgentRuntime(tmp_path / "root", world.model, SETTINGS) as runtime:
        for name in ("a", "b"):
            runtime.session(name).append_tool_result("shell", f"{name} says " + LOG * 70)
            runtime.release(name)
        yield runtime


def folders(runtime: AgentRuntime) -> dict[str, Path]:
    return {info.name: Path(runtime.root) / "sessions" / info.id for info in runtime.sessions()}


@pytest.mark.parametrize("segment", [0, 1])
def test_blocks_of_another_session_are_no_blocks_of_this(two: AgentRuntime, segment: int) -> None:
    """Each is sound in itself; before segments were marked they passed for each other."""
    files = [folder / f"segment-{segment:06d}.kv" for folder in folders(two).values()]
    contents = [file.read_bytes() for file in files]
    files[0].write_bytes(contents[1])
    with pytest.raises(CorruptSession, match=f"{files[0]}: holds other blocks"):
        two.session("a")
    two.session("b")
    if segment == 1:  # which a fork copies; a full one is shared as it is, with its mark
        with pytest.raises(CorruptSession, match=f"{files[0]}: holds other blocks"):
            fork_stored(two.root, "a", "c")
    else:
        fork_stored(two.root, "a", "c")
        with pytest.raises(CorruptSession, match="holds other blocks"):
            two.session("c")
    files[0].write_bytes(contents[0])
    two.session("a")


def test_sessions_from_before_segments_were_marked(two: AgentRuntime) -> None:
    def state() -> dict[str, object]:
        with SessionStore.open(two.root, "a", readonly=True) as store:
            assert store.state is not None
            return dict(store.state["memory"])

    marks = state()["segments"]
    with closing(sqlite3.connect(folders(two)["a"] / "session.db", isolation_level=None)) as db:
        row = read_generation(db)
        stored = json.loads(str(row.state))
        del stored["memory"]["segments"]
        write_generation(db, row._replace(state=json.dumps(stored)))
    before = told(two.session("a"))
    two.session("a").append_tool_result("shell", LOG * 3)
    two.release("a")
    assert told(two.session("a"))[:-1] == before
    assert isinstance(marks, list)
    got = state()["segments"]
    assert isinstance(got, list)
    assert (len(marks), got[0]) == (2, marks[0])


def test_without_its_log_a_session_is_not_taken_for_a_new_one(world: trials.World, tmp_path: Path) -> None:
    root, moved = tmp_path / "root", tmp_path / "moved"
    runtime = AgentRuntime(root, world.model, SETTINGS)
    session = runtime.session("a")
    for _ in range(2):
        session.append_tool_result("shell", LOG * 10)
        session.commit()
    # As after a copy of the folder that left SQLite's log behind.
    target = moved / "sessions" / session.store.id
    target.mkdir(parents=True)
    for path in session.store.folder.iterdir():
        if "-wal" not in path.name and "-shm" not in path.name:
            (target / path.name).write_bytes(path.read_bytes())
    runtime.close()
    with pytest.raises(CorruptSession, match="tail-"):
        AgentRuntime(moved, world.model, SETTINGS).session("a")


def test_open_files_do_not_grow_with_a_session(world: trials.World, tmp_path: Path) -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with AgentRuntime(tmp_path, world.model, SETTINGS) as runtime:
        session = runtime.session("a")
        session.append_tool_result("shell", LOG * 10)
        session.commit()
        before = files()
        session.append_tool_result("shell", LOG * 150)  # several segments
        session.commit()
        assert session.usage["blocks"] > 3 * 64
        assert files() == before
        runtime.release("a")
        runtime.session("a")
        assert files() == before


# -- what a session was made with ------------------------------------------------------------------------------------


def others(name: str) -> list[object]:
    """Values that a setting may have instead of its own."""
    value = SETTINGS.model_dump()[name]
    if choices := get_args(MemoryConfig.model_fields[name].annotation):
        return [choice for choice in choices if choice not in (value, type(None))]
    return [not value] if isinstance(value, bool) else [value + 1, value * 2, value - 1]


FIELDS = ["format", "weights", "dtype", "chat", *(f"memory.{name}" for name in MemoryConfig.model_fields)]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_fingerprint_is_named(world: trials.World, tmp_path: Path, field: str) -> None:
    with AgentRuntime(tmp_path, world.model, SETTINGS) as runtime:
        stored = fingerprint(world.model, runtime.chat, changed(field) if "." in field else SETTINGS)
        if "." not in field:
            stored[field] = 99 if field == "format" else "other"
        SessionStore.create(tmp_path, "ops", stored).close()
        with pytest.raises(SessionMismatch, match=rf'"ops" was made with {field} = '):
            runtime.session("ops")


def changed(field: str) -> MemoryConfig:
    """The settings, but for one field; any other value that is possible."""
    name = field.removeprefix("memory.")
    for value in others(name):
        with suppress(ValueError):
            return MemoryConfig(**SETTINGS.model_dump() | {name: value})
    raise AssertionError(f"no other value for {name} is known")
