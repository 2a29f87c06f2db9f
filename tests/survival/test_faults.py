"""A disk that is full or fails, at every site of a commit; long runs: ``make crash``."""

from __future__ import annotations

import errno
import resource
from collections import Counter
from pathlib import Path

import pytest
from survival import tracer, trials
from survival.faults import sites
from survival.process import Progress, fork, wait
from survival.script import NAME, Uninterrupted, do, told

from infllm_agent import Session
from infllm_agent.errors import StorageError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> trials.World:
    return trials.World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: trials.World, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    return world.run(tmp_path_factory.mktemp("run"), trials.SMALL_COMMIT)


@pytest.mark.skipif(not tracer.possible(), reason="processes cannot be traced here")
def test_every_site_of_a_commit_may_fail(world: trials.World, tmp_path: Path) -> None:
    commit = next(trials.commits(world, tmp_path, 0))
    counts = Counter[str]()
    for call in sites(commit.calls):
        for error in (errno.EIO, errno.ENOSPC):
            counts += commit.fail(call, error)
    assert min(counts["EIO"], counts["ENOSPC"]) > 10
    assert min(counts["told in one line"], counts["did no harm"]) > 10


@pytest.mark.parametrize("limit", [5_000, 20_000])
def test_a_limit_on_the_size_of_files(run: Uninterrupted, tmp_path: Path, limit: int) -> None:
    """What is written up to the limit is no commit; without the limit the session goes on."""
    runtime = run.runtime(tmp_path / "root")

    def work(progress: Progress) -> None:
        session = runtime.open_idle(NAME)
        for part in run.script.parts[:3]:
            for step in part:
                do(session, step)
        before = told(session)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        progress.words = _refused(session)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert told(session) == before
        progress.acknowledged = session.commit()
        runtime.drop(NAME)

    pid, progress = fork(work)
    wait(pid, progress)
    assert progress.acknowledged == 1
    assert str(tmp_path) in progress.words
    assert "\n" not in progress.words
    session = run.runtime(tmp_path / "root").open_idle(NAME)
    assert told(session) == run.at[3].messages
    runtime.drop(NAME)


def _refused(session: Session) -> str:
    with pytest.raises(StorageError) as error:
        session.commit()
    return str(error.value)


def test_a_database_that_may_not_grow(run: Uninterrupted, tmp_path: Path) -> None:
    runtime = run.runtime(tmp_path / "root")
    session = runtime.open_idle(NAME)
    session.append_user("x")
    session.commit()
    kept = told(session)
    connection = session.store._db.conn
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    session.eager = False  # so many tokens would take seconds
    session.append_tool_result("shell", "x " * 20_000)
    assert "database or disk is full" in _refused(session)
    assert told(session)[:-1] == kept
    connection.execute("PRAGMA max_page_count=1000000")
    session.commit()
    whole = told(session)
    session.rollback()
    assert told(session) == whole
    runtime.drop(NAME)
