"""A commit that dies, or fails, at each of its calls to the file system in turn."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from infllm_agent import AgentRuntime, Session
from infllm_agent.blocks.segments import SEGMENT_BLOCKS
from infllm_agent.errors import CorruptSession, StorageError
from infllm_agent.storage.session_store import SessionStore
from survival.kills import check_survivor
from survival.process import Progress, fork, wait
from survival.script import NAME, PROBE, Uninterrupted, do, told
from survival.tracer import KILL, READS, TAKES_SPACE, Call, Decide, begin, end, traced


class OneCommit:
    """A stored session, and the commit after its last: where the script has one, a commit that begins another segment
    of blocks, so that it writes to old files and makes new ones.

    Attributes:
        before: the generation that is stored.
        calls: of the commit when nothing goes wrong.
        calls_with_close: the same, and those of closing the session, when SQLite's log goes into the database.
    """

    def __init__(self, run: Uninterrupted, folder: Path) -> None:
        self._run = run
        self._base, self._root = folder / "base", folder / "struck"
        blocks = [expected.blocks for expected in run.at]
        grown = {g: blocks[g + 1] - blocks[g] for g in range(1, len(run.script.parts))}
        segments = [count / SEGMENT_BLOCKS for count in blocks]
        crossing = [g for g in grown if segments[g] % 1 and int(segments[g]) < int(segments[g + 1])]
        self.before = min(crossing or grown, key=lambda g: (grown[g] == 0, grown[g]))
        runtime = run.runtime(self._base)
        session = runtime.open_idle(NAME)
        for part in run.script.parts[: self.before]:
            for step in part:
                do(session, step)
            session.commit()
        runtime.drop(NAME)
        self.calls: list[Call] = []
        self._strike(self.calls.append, close=False)
        calls: list[Call] = []
        self._strike(calls.append, close=True)
        self.calls_with_close = [call for call in calls if call.name not in READS]

    def crash(self, call: Call) -> Counter[str]:
        """Die before one of ``calls_with_close`` and go on from there."""
        killed, progress = self._strike(lambda now: KILL if now.number == call.number else None, close=True)
        assert killed, f"{call} never came"
        there = check_survivor(self._run, self._root, progress.acknowledged or self.before)
        if there == self.before:  # what was left behind is no obstacle to the same commit
            runtime = self._run.runtime(self._root)
            self._commit(self._at_commit(runtime), Progress())
            runtime.drop(NAME)
            check_survivor(self._run, self._root, self.before + 1, probe=16)
            self._check_tidy()
        return Counter(
            {
                "crashes": 1,
                f"crashes at {call.name}": 1,
                f"generation {'after' if there > self.before else 'before'} is there": 1,
                "logits compared": PROBE,
            }
        )

    def fail(self, failing: Call, error: int) -> Counter[str]:
        """One of ``calls`` fails: alone, or, as where a disk is full, with all after it that take space. Then the
        trouble is over, and the session goes on."""
        full = error in (errno.ENOSPC, errno.EDQUOT)
        if full and failing.name not in TAKES_SPACE:
            return Counter()

        def decide(call: Call) -> int | None:
            later = full and call.number > failing.number and call.name in TAKES_SPACE
            if later or call.number == failing.number:
                return error
            return None

        _, progress = self._strike(decide, close=False)
        assert progress.acknowledged == self.before + 1
        check_survivor(self._run, self._root, self.before + 1, probe=16)
        self._check_tidy(tails=1 if progress.words else 2)  # what could not be removed goes with the next commit
        words = progress.words
        if words:
            assert str(self._root) in words, words
            # SQLite's full-text index takes any page that cannot be read for a damaged one.
            assert words.startswith("StorageError") or failing.name in READS, words
            assert "\n" not in words, words
        return Counter({errno.errorcode[error]: 1, "told in one line" if words else "did no harm": 1})

    def check_order(self) -> None:
        """What a commit's transaction refers to is on stable storage before the transaction is written: each file
        was synced after its last write, and its folder after it was made."""
        written: dict[str, int] = {}
        synced: dict[str, int] = {}
        for call in self.calls:
            if call.path.endswith("session.db-wal") and call.name == "pwrite":
                break
            if call.name in ("write", "pwrite", "pwritev", "writev", "fallocate", "ftruncate"):
                written[call.path] = call.number
            elif call.name in ("fsync", "fdatasync"):
                synced[call.path] = call.number
        else:
            raise AssertionError("the transaction was never written")
        assert {Path(path).suffix for path in written} >= {".kv", ".safetensors"}, "blocks and tail"
        for path, number in written.items():
            assert synced.get(path, 0) > number, f"{path} is not synced before the transaction"
            assert synced.get(str(Path(path).parent), 0) > number, f"the folder of {path} is not synced"
        later = [call.name for call in self.calls if call.path.endswith("session.db-wal")]
        assert later[-1] in ("fsync", "fdatasync"), "the commit returns before its transaction is synced"

    def _strike(self, decide: Decide, *, close: bool) -> tuple[bool, Progress]:
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(self._base, self._root)
        runtime = self._run.runtime(self._root)

        def work(progress: Progress) -> None:
            session = self._at_commit(runtime)
            begin()
            self._commit(session, progress)
            if not close:
                end()
                self._after(session, progress)
            runtime.drop(NAME)
            end()

        return traced(self._root, work, decide)

    def _at_commit(self, runtime: AgentRuntime) -> Session:
        """The session, all but the commit done."""
        session = runtime.open_idle(NAME)
        for step in self._run.script.parts[self.before]:
            do(session, step)
        return session

    def _commit(self, session: Session, progress: Progress) -> None:
        progress.phase = "commit"
        try:
            progress.acknowledged = session.commit()
        except (StorageError, CorruptSession) as error:
            progress.words = f"{type(error).__name__}: {error}"

    def _after(self, session: Session, progress: Progress) -> None:
        """The trouble is over: what failed is tried again."""
        progress.phase = "after the failure"
        with SessionStore.open(self._root, NAME, readonly=True) as reader:
            if progress.words:
                assert reader.generation == self.before, "an error, but the commit happened"
            kept = self._run.at[reader.generation]
            assert list(reader.token_ids()) == kept.token_ids
            assert len(reader.messages()) == sum(len(message) == 6 for message in kept.messages)
        assert told(session) == self._run.at[self.before + 1].messages
        if progress.words:
            progress.acknowledged = session.commit()

    def _check_tidy(self, tails: int = 1) -> None:
        """No more tails than are in use, no unfinished session."""
        folders = list((self._root / "sessions").iterdir())
        assert len(folders) == 1, folders
        there = [name for name in os.listdir(folders[0]) if name.startswith("tail-")]
        assert 1 <= len(there) <= tails, there


class Opening:
    """Death at each call of opening a session: one that is not there yet, and one that a killed process left."""

    def __init__(self, run: Uninterrupted, folder: Path) -> None:
        self._run = run
        self._left, self._root = folder / "left", folder / "opened"
        self._generation = len(run.script.parts) // 2
        runtime = run.runtime(self._left)

        def die(progress: Progress) -> None:
            session = runtime.open_idle(NAME)
            for part in run.script.parts[: self._generation]:
                for step in part:
                    do(session, step)
                session.commit()
            os.kill(os.getpid(), signal.SIGKILL)

        assert wait(*fork(die))

    def trials(self) -> Iterator[Counter[str]]:
        for base, generation in ((None, 0), (self._left, self._generation)):
            calls: list[Call] = []
            self._open(base, calls.append)
            for call in calls:
                if call.name not in READS:
                    self._open(base, lambda now, number=call.number: KILL if now.number == number else None)  # type: ignore[misc]
                    check_survivor(self._run, self._root, generation, probe=16)
                    yield Counter({"crashes": 1, f"crashes while {'opening' if base else 'making'} a session": 1})

    def _open(self, base: Path | None, decide: Decide) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir() if base is None else shutil.copytree(base, self._root)
        runtime = self._run.runtime(self._root)

        def work(_: Progress) -> None:
            begin()
            runtime.open_idle(NAME)
            runtime.drop(NAME)
            end()

        traced(self._root, work, decide)


def sites(calls: list[Call]) -> list[Call]:
    """The first of each run of equal calls to one file."""
    return [next(run) for _, run in groupby(calls, key=lambda call: (call.name, call.path))]
