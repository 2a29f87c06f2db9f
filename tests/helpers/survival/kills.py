"""SIGKILL at any time: while a session opens, reads, answers, commits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from infllm_agent import AgentRuntime
from infllm_agent.storage.catalog import Catalog
from survival import tracer
from survival.process import Progress, fork, wait
from survival.script import NAME, PROBE, Script, Survivor, Uninterrupted, do


def live(runtime: AgentRuntime, script: Script, progress: Progress) -> None:
    """Go on with a script from the session's last commit to its end."""
    progress.phase = "opening"
    session = runtime.open_idle(NAME)
    for part in script.parts[session.store.generation :]:
        for step in part:
            progress.phase = "an answer" if step[0] == "reply" else "reading"
            do(session, step)
        progress.phase = "a commit"
        progress.acknowledged = session.commit()
    progress.phase = "closing"
    runtime.drop(NAME)


def check_survivor(run: Uninterrupted, root: Path, acknowledged: int, *, probe: int = PROBE) -> int:
    """Whether the session under ``root`` is whole and has all that was acknowledged; its generation."""
    if problems := Catalog(root).problems():
        raise Survivor(f"not readable: {problems}")
    runtime = run.runtime(root)
    try:
        session = runtime.open_idle(NAME)
        generation = run.compare(session, probe=probe)
        assert acknowledged <= generation <= acknowledged + 1, f"{generation} after {acknowledged} was acknowledged"
        session.store.verify()
        assert [info.name for info in runtime.sessions()] == [NAME]
        return generation
    finally:
        runtime.drop(NAME)


class Kills:
    """One session after the other lives through the script, killed again and again on its way."""

    def __init__(self, run: Uninterrupted, folder: Path, seed: int) -> None:
        self._run = run
        self._folder = folder
        self._dice = random.Random(seed)
        self._traceable = tracer.possible()
        self._sessions = 0
        self._generation = len(run.script.parts)  # the first trial begins a session
        self._span = self._whole_life()

    def _whole_life(self) -> float:
        """Seconds that the script takes in a child, without a kill."""
        root = self._folder / "whole"
        runtime, began = self._run.runtime(root), time.monotonic()
        pid, progress = fork(lambda progress: live(runtime, self._run.script, progress))
        wait(pid, progress)
        span = time.monotonic() - began
        check_survivor(self._run, root, len(self._run.script.parts))
        shutil.rmtree(root)
        return span

    def trial(self) -> Counter[str]:
        """One kill. What is counted: kills by what they struck, what was there afterwards."""
        last = len(self._run.script.parts)
        if self._generation == last:
            self._sessions += 1
            self._generation = 0
        root = self._folder / f"root-{self._sessions}"
        runtime = self._run.runtime(root)
        strike = self._at_some_call if self._traceable and self._dice.random() < 0.5 else self._at_some_time
        progress = strike(root, lambda progress: live(runtime, self._run.script, progress))
        acknowledged = max(self._generation, progress.acknowledged)
        before, self._generation = self._generation, check_survivor(self._run, root, acknowledged)
        if self._generation == last:
            shutil.rmtree(root)
        return Counter(
            {
                "kills": 1,
                f"kills in {progress.phase}": 1,
                "commits": self._generation - before,
                "commits that lasted but were not acknowledged": self._generation - acknowledged,
                "logits compared": PROBE,
            }
        )

    def _at_some_time(self, root: Path, work: Callable[[Progress], object]) -> Progress:
        left = (1 - self._generation / len(self._run.script.parts)) * self._span
        pid, progress = fork(work)
        time.sleep(self._dice.uniform(0, min(left, self._span / 4)))
        os.kill(pid, signal.SIGKILL)
        if not wait(pid, progress):
            progress.phase = "nothing: it had ended"
        return progress

    def _at_some_call(self, root: Path, work: Callable[[Progress], object]) -> Progress:
        """At one of the calls to the file system, which opening and committing are full of."""
        number = self._dice.randint(1, 250)

        def watched(progress: Progress) -> None:
            tracer.begin()
            work(progress)
            tracer.end()

        killed, progress = tracer.traced(root, watched, lambda call: tracer.KILL if call.number == number else None)
        if not killed:
            progress.phase = "nothing: it had ended"
        return progress
