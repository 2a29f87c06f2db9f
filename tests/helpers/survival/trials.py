"""The kinds of trials, each an endless (or complete) series from a seed; the tests take the first few of each."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import count
from pathlib import Path

from infllm_agent.model.local_model import LocalModel
from survival import races, soak
from survival.damage import Damage
from survival.faults import OneCommit, Opening
from survival.kills import Kills
from survival.script import Uninterrupted, load_model

Series = Iterator[Counter[str]]
SMALL_COMMIT = 21  # a seed whose script has a small commit that begins another segment of blocks
SCRIPT_LIFE = 200  # kills until another script is taken


class World:
    """What all trials share: a model, loaded once, and how long it may take."""

    def __init__(self, folder: Path, tokens: int = 0, ops: int = 0, end: float | None = None) -> None:
        self._folder = folder
        self.tokens, self.ops, self.end = tokens, ops, end

    @cached_property
    def model(self) -> LocalModel:
        return load_model(self._folder / "model")

    def run(self, folder: Path, seed: int, commits: int = 12) -> Uninterrupted:
        """An uninterrupted run of a script."""
        return Uninterrupted(self.model, folder / f"uninterrupted-{seed}", seed, commits)


def kills(world: World, folder: Path, seed: int) -> Series:
    """SIGKILL at random moments."""
    for script in count(seed + SMALL_COMMIT):
        place = folder / f"script-{script}"
        place.mkdir()
        run = world.run(place, script)
        trial = Kills(run, place, script).trial
        for _ in range(SCRIPT_LIFE):
            yield trial()
        run.close()


def commits(world: World, folder: Path, seed: int) -> Iterator[OneCommit]:
    for script in count(seed + SMALL_COMMIT):
        place = folder / f"script-{script}"
        place.mkdir()
        run = world.run(place, script)
        commit = OneCommit(run, place)
        commit.check_order()
        yield commit
        run.close()


def io(world: World, folder: Path, seed: int) -> Series:
    """Death at each call of a commit, in commit after commit."""
    for commit in commits(world, folder, seed):
        for call in commit.calls_with_close:
            yield commit.crash(call)


def opening(world: World, folder: Path, seed: int) -> Series:
    """Death at each call of making a session, and of opening one that a killed process left."""
    yield from Opening(world.run(folder, seed + SMALL_COMMIT), folder).trials()


def faults(world: World, folder: Path, seed: int) -> Series:
    """Each call of a commit fails: EIO alone, and ENOSPC from it on."""
    for commit in commits(world, folder, seed):
        for call in commit.calls:
            for error in (errno.EIO, errno.ENOSPC):
                yield commit.fail(call, error)


def damage(world: World, folder: Path, seed: int) -> Series:
    """Damaged files."""
    trial = Damage(world.run(folder, SMALL_COMMIT), folder).trial
    for number in count(seed):
        yield trial(number)


def race(world: World, folder: Path, seed: int) -> Series:
    """Two processes, one session."""
    for number in count(seed):
        yield races.race(folder, number)


def migrate(world: World, folder: Path, seed: int) -> Series:
    """Death at each call of upgrading each released schema."""
    from survival.migrations import Upgrade, released

    for schema in released():
        yield Upgrade(folder, schema).kill_at_every_call()


def names(world: World, folder: Path, seed: int) -> Series:
    """Names and keys as attack."""
    from survival.hostile import Names

    each = Names(folder)
    try:
        for number in count(seed):
            yield each.trial(number)
    finally:
        each.close()


def control(world: World, folder: Path, seed: int) -> Series:
    """Texts that spell control tokens, in every field of every family of templates."""
    from survival.hostile import ControlTokens

    trial = ControlTokens().trial
    for number in count(seed):
        yield trial(number)


def text(world: World, folder: Path, seed: int) -> Series:
    """Odd texts in a session."""
    from survival.hostile import OddText

    trial = OddText(world.model, folder).trial
    for number in count(seed):
        yield trial(number)


def cache(world: World, folder: Path, seed: int) -> Series:
    """The LRU cache against a dict, as a state machine of 50 steps; a hundred a trial."""
    from cache_machine import CacheAgainstDict
    from hypothesis import HealthCheck, Verbosity, settings
    from hypothesis import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test

    rules = settings(
        max_examples=100,
        stateful_step_count=50,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    for number in count(seed):
        machine = seeded(number)(type("Cache", (CacheAgainstDict,), {}))
        run_state_machine_as_test(machine, settings=rules)
        yield Counter({"state machines": 100})


def threads(world: World, folder: Path, seed: int) -> Series:
    """Eight threads on one session, then on eight."""
    yield races.threads(world.model, folder / "one", seed, world.ops, sessions=1)
    yield races.threads(world.model, folder / "eight", seed, world.ops, sessions=races.THREADS)


def growth(world: World, folder: Path, seed: int) -> Series:
    """One session that grows and grows."""
    each = soak.Soak(world.model, folder / "root", seed)
    yield each.run(world.tokens, until=world.end, told=_Telling())
    print(each.report())
    each.close()


class _Telling:
    """A line about every hundredth sample."""

    def __init__(self) -> None:
        self._samples = 0

    def __call__(self, sample: soak.Sample) -> None:
        self._samples += 1
        if self._samples % 100 == 0:
            print(sample, flush=True)


CRASH: dict[str, Callable[[World, Path, int], Series]] = {
    "kills": kills,
    "io": io,
    "opening": opening,
    "faults": faults,
    "damage": damage,
    "races": race,
    "migrations": migrate,
    "names": names,
    "cache": cache,
    "control": control,
    "text": text,
}
SOAK: dict[str, Callable[[World, Path, int], Series]] = {"threads": threads, "growth": growth}

#: Trials of each kind in a long run. Of ``io`` and ``faults`` they are calls, ``cache`` is in hundreds.
COUNTS = {
    "kills": 1000,
    "io": 1500,
    "opening": 1000,
    "faults": 3000,
    "damage": 50_000,
    "races": 1000,
    "migrations": 100,
    "names": 100_000,
    "cache": 200,
    "control": 200_000,
    "text": 100_000,
    "threads": 2,
    "growth": 1,
}
