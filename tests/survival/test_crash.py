"""Sessions survive SIGKILL at any time and at every call of a commit; long runs: ``make crash``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from survival import tracer, trials
from survival.migrations import UNDO, Upgrade, released
from survival.runner import Table, run

pytestmark = pytest.mark.usefixtures("one_thread")
traced = pytest.mark.skipif(not tracer.possible(), reason="processes cannot be traced here")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> trials.World:
    return trials.World(tmp_path_factory.mktemp("world"))


def total(series: Iterator[Counter[str]], count: int | None = None) -> Counter[str]:
    return sum(islice(series, count), Counter[str]())


def test_sigkill_at_random_times(world: trials.World, tmp_path: Path) -> None:
    counts = total(trials.kills(world, tmp_path, 0), 50)
    assert counts["kills"] == 50
    assert counts["kills in nothing: it had ended"] < 15
    assert counts["commits"] > 20


@traced
def test_death_at_every_call_of_a_commit(world: trials.World, tmp_path: Path) -> None:
    (commit,) = islice(trials.commits(world, tmp_path, 0), 1)
    counts = sum(map(commit.crash, commit.calls_with_close), Counter[str]())
    assert counts["crashes"] == len(commit.calls_with_close) > 40
    assert min(counts["generation before is there"], counts["generation after is there"]) > 10


@pytest.mark.parametrize("schema", released())
def test_sessions_of_every_released_schema(tmp_path: Path, schema: str) -> None:
    upgrade = Upgrade(tmp_path, schema)
    upgrade.check()


def test_every_migration_can_be_undone_here() -> None:
    """A new migration needs an entry, so that sessions from before it are tried."""
    assert list(UNDO) == released()[:0:-1]


def test_a_violation_ends_a_long_run_and_says_how_to_see_it_again(tmp_path: Path) -> None:
    def series() -> Iterator[Counter[str]]:
        yield Counter({"kills": 1})
        raise AssertionError("a message\nis lost")

    out = tmp_path / "table.json"
    assert not run("kills", series(), 10, 60, Table(out, 3), "survival crash kills --seed 3")
    said = json.loads(out.read_text())["kinds"]["kills"]
    assert (said["trials"], said["counts"]) == (1, {"kills": 1})
    assert said["failure"] == "a message is lost (again: survival crash kills --seed 3)"
