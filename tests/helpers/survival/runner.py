"""The long runs: any number of trials of each kind, with a budget of time, one line of progress a while, one table.

    python -m survival crash [KIND ...] [--minutes M] [--seed S] [--count KIND=N ...] [--json FILE]
    python -m survival soak  [KIND ...] [--minutes M] [--seed S] [--tokens N] [--ops N] [--json FILE]

It ends with 1 at the first violation, and says how to see it again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from survival import trials

PROGRESS_SECONDS = 10.0


class Table:
    """What was done so far, by kind."""

    def __init__(self, out: Path | None, seed: int) -> None:
        self._out = out
        self._seed = seed
        self._done: dict[str, dict[str, object]] = {}

    def note(self, kind: str, trials: int, seconds: float, counts: Counter[str], failure: str | None = None) -> None:
        entry: dict[str, object] = {
            "trials": trials,
            "seconds": round(seconds, 1),
            "counts": dict(sorted(counts.items())),
        }
        self._done[kind] = entry | ({"failure": failure} if failure else {})
        if self._out is not None:
            self._out.write_text(json.dumps({"seed": self._seed, "kinds": self._done}, indent=1) + "\n")

    def print(self) -> None:
        print(f"\n{'kind':<12}{'trials':>9}{'seconds':>10}  counts (seed {self._seed})")
        for kind, entry in self._done.items():
            counts = entry["counts"]
            assert isinstance(counts, dict)
            said = "; ".join(f"{name} {count:,}" for name, count in counts.items())
            print(f"{kind:<12}{entry['trials']:>9,}{entry['seconds']:>10,}  {said}")
            if "failure" in entry:
                print(f"{'':<12}VIOLATION: {entry['failure']}")


def run(kind: str, trial: Iterator[Counter[str]], count: int, seconds: float, table: Table, again: str) -> bool:
    """Trials of one kind until there are so many or the time is over. Returns whether all went well."""
    began = spoke = time.monotonic()
    done, counts = 0, Counter[str]()
    while done < count and (done == 0 or time.monotonic() - began < seconds):
        try:
            counts += next(trial)
        except StopIteration:
            break
        except Exception as error:
            traceback.print_exc()
            told = " ".join(str(error).split())[:2000] or type(error).__name__
            table.note(kind, done, time.monotonic() - began, counts, f"{told} (again: {again})")
            return False
        done += 1
        if time.monotonic() - spoke > PROGRESS_SECONDS:
            spoke = time.monotonic()
            print(f"{kind}: {done:,} of {count:,} trials in {spoke - began:.0f} s, all well", flush=True)
            table.note(kind, done, spoke - began, counts)
    table.note(kind, done, time.monotonic() - began, counts)
    return True


def _counts(given: list[str], known: dict[str, int]) -> dict[str, int]:
    counts = dict(known)
    for each in given:
        kind, _, number = each.partition("=")
        if kind not in known or not number.isdigit():
            sys.exit(f"--count {each}: give KIND=NUMBER, with a kind of {', '.join(known)}")
        counts[kind] = int(number)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="survival", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["crash", "soak"])
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"{', '.join([*trials.CRASH, *trials.SOAK])}; none: all"
    )
    parser.add_argument("--minutes", type=float, default=10, help="for all kinds together (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", action="append", default=[], metavar="KIND=N", help="trials of a kind")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of the soak (default %(default)s)")
    parser.add_argument("--ops", type=int, default=20_000, help="of each thread (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table as JSON, kept up while it runs")
    parser.add_argument("--folder", type=Path, help="where sessions are made (default: a temporary folder)")
    options = parser.parse_args()
    table_of: dict[str, Callable[..., Iterator[Counter[str]]]] = (
        trials.CRASH if options.what == "crash" else trials.SOAK
    )
    kinds = options.kinds or list(table_of)
    if unknown := set(kinds) - table_of.keys():
        parser.error(f"no kind of {options.what}: {', '.join(sorted(unknown))}; there are {', '.join(table_of)}")
    counts = _counts(options.count, trials.COUNTS)
    folder = Path(tempfile.mkdtemp(prefix="survival-", dir=options.folder))
    table, good = Table(options.json, options.seed), True
    end = time.monotonic() + options.minutes * 60
    try:
        world = trials.World(folder, options.tokens, options.ops, end)
        for number, kind in enumerate(kinds):
            # Time that a kind leaves over goes to those after it.
            seconds = max(0.0, end - time.monotonic()) / (len(kinds) - number)
            again = f"python -m survival {options.what} {kind} --seed {options.seed}"
            place = folder / kind
            place.mkdir()
            if not run(kind, table_of[kind](world, place, options.seed), counts[kind], seconds, table, again):
                good = False
                break
            shutil.rmtree(place)
    finally:
        table.print()
        if good:
            shutil.rmtree(folder)
        else:
            print(f"what was there is kept in {folder}")
    sys.exit(0 if good else 1)
