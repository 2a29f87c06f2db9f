"""Names, keys and texts as attack; threads; a session that grows. Long runs: ``make crash``, ``make soak``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from survival import races, trials
from survival.soak import Soak

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> trials.World:
    return trials.World(tmp_path_factory.mktemp("world"))


def total(series: Iterator[Counter[str]], count: int) -> Counter[str]:
    return sum(islice(series, count), Counter[str]())


def test_names_and_keys_are_kept_or_refused(world: trials.World, tmp_path: Path) -> None:
    counts = total(trials.names(world, tmp_path, 0), 1000)
    assert counts["names and keys"] == 1000
    assert min(counts["name kept"], counts["name refused"]) > 50


def test_control_tokens_in_every_field_of_every_template(world: trials.World, tmp_path: Path) -> None:
    assert total(trials.control(world, tmp_path, 0), 2000)["conversations"] == 2000


def test_odd_texts(world: trials.World, tmp_path: Path) -> None:
    assert total(trials.text(world, tmp_path, 0), 100)["odd texts"] == 100


@pytest.mark.parametrize("sessions", [1, races.THREADS])
def test_eight_threads(world: trials.World, tmp_path: Path, sessions: int) -> None:
    counts = races.threads(world.model, tmp_path, 0, 200, sessions=sessions)
    assert counts["thread operations"] == races.THREADS * 200


def test_a_session_grows_and_what_it_holds_does_not(world: trials.World, tmp_path: Path) -> None:
    soak = Soak(world.model, tmp_path / "root", 0)
    assert soak.run(200_000)["tokens"] >= 200_000
    soak.close()
