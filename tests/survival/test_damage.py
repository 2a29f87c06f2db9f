"""Damaged, missing, swapped and outdated files are named, or change nothing; long runs: ``make crash``."""

from __future__ import annotations

import gc
import os
from collections import Counter
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from survival import trials
from survival.script import SETTINGS

from infllm_agent import AgentRuntime, MemoryConfig
from infllm_agent.blocks.segments import SEGMENT_BLOCKS
from infllm_agent.errors import CorruptSession, SessionMismatch
from infllm_agent.session.fingerprint import fingerprint
from infllm_agent.storage.session_store import SessionStore

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

    gc.collect()  # other tests' files are closed now, and not later
    with AgentRuntime(tmp_path, world.model, SETTINGS) as runtime:
        session = runtime.session("a")
        session.append_tool_result("shell", LOG * 10)
        session.commit()
        before = files()
        session.append_tool_result("shell", LOG * 400)  # several segments
        session.commit()
        assert session.usage["blocks"] > 3 * SEGMENT_BLOCKS
        assert files() <= before
        runtime.release("a")
        runtime.session("a")
        assert files() <= before


# -- what a session was made with ------------------------------------------------------------------------------------


def others(name: str) -> list[object]:
    """Values that a setting may have instead of its own."""
    value = SETTINGS.model_dump()[name]
    kind = MemoryConfig.model_fields[name].annotation
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if choice != value]
    if value is None:
        return [1]
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
