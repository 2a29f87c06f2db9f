"""``sessions prune`` and ``delete``: what goes, what stays, and that nothing is left of what went."""

from __future__ import annotations

import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import pexpect
import pytest
from command_line import Cli
from upkeep import FORK, change_generation, folder_of, make

from infllm_agent import AgentRuntime
from infllm_agent.errors import ConfigError
from infllm_agent.maintenance.check import check
from infllm_agent.maintenance.prune import Plan, parse_age, parse_size, plan_prune, prune
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.session_store import SessionStore

pytestmark = pytest.mark.usefixtures("one_thread")

DAY = 86_400.0
NOW = time.time()


def aged(root: Path, days: dict[str, float], size: int = 0) -> None:
    """Sessions whose last commits were so many days ago, each with so many bytes of blocks."""
    for name, age in days.items():
        with SessionStore.create(root, name, {"model": "tiny"}) as store:
            store.commit(messages=(), token_ids=(), chunks=(), state={}, bytes_on_disk=size)
            (store.folder / "segment-000000.kv").write_bytes(os.urandom(size))
        change_generation(store.folder, updated=NOW - age * DAY)


def names(plan: Plan) -> list[str]:
    return [one.info.name for one in plan.sessions]


def used(*paths: Path) -> int:
    """Bytes on disk, each file once."""
    status = {(s.st_dev, s.st_ino): s.st_blocks * 512 for path in paths for s in [path.stat()] if path.is_file()}
    return sum(status.values())


def test_by_age_and_by_size(tmp_path: Path) -> None:
    aged(tmp_path, {"new": 0, "month": 31, "year": 365}, size=100_000)
    aged(tmp_path, {"big": 40}, size=5_000_000)
    assert names(plan_prune(tmp_path, older_than=timedelta(days=30))) == ["year", "big", "month"]
    assert names(plan_prune(tmp_path, larger_than=1_000_000)) == ["big"]
    assert names(plan_prune(tmp_path, older_than=timedelta(days=30), larger_than=1_000_000)) == ["big"]
    assert names(plan_prune(tmp_path, older_than=timedelta(days=50), larger_than=1_000_000)) == []
    assert names(plan_prune(tmp_path, older_than=timedelta(days=400))) == []
    plan = plan_prune(tmp_path, older_than=timedelta(days=30), now=NOW)
    assert plan.sessions[0].why == "last commit 365 days, 0:00:00 ago"
    with pytest.raises(ConfigError, match="--older-than"):
        plan_prune(tmp_path)
    assert len(Catalog(tmp_path).list()) == 4


def test_the_oldest_go_until_the_rest_is_small_enough(tmp_path: Path) -> None:
    aged(tmp_path, {"c": 1, "a": 3, "b": 2}, size=1_000_000)
    plan = plan_prune(tmp_path, keep_under=10**9)
    total = used(*(tmp_path / "sessions").rglob("*"))
    assert (names(plan), plan.total, plan.freed) == ([], total, 0)
    plan = plan_prune(tmp_path, keep_under=2_500_000)
    assert names(plan) == ["a"]
    assert plan.freed == plan.sessions[0].bytes == used(*folder_of(tmp_path, "a").iterdir())
    assert names(plan_prune(tmp_path, keep_under=1_500_000)) == ["a", "b"]
    plan = plan_prune(tmp_path, older_than=timedelta(days=2.5), keep_under=1_500_000)
    assert names(plan) == ["a", "b"]
    assert "all take more than 1,500,000 bytes" in plan.sessions[1].why
    assert names(plan_prune(tmp_path, keep_under=0)) == ["a", "b", "c"]
    assert [one.info.name for one in prune(tmp_path, plan.sessions)] == ["a", "b"]
    assert [info.name for info in Catalog(tmp_path).list()] == ["c"]
    assert used(*(tmp_path / "sessions").rglob("*")) == total - plan.freed


def test_what_forks_share_counts_once_and_is_freed_with_the_last(tmp_path: Path, tiny_model: LocalModel) -> None:
    make(tmp_path, tiny_model)
    with AgentRuntime(tmp_path, tiny_model) as runtime:
        runtime.fork("ops", "fork")
    plan = plan_prune(tmp_path, keep_under=0)
    ops, fork = (list(folder_of(tmp_path, name).iterdir()) for name in ("ops", "fork"))
    assert (folder_of(tmp_path) / "segment-000000.kv").stat().st_nlink == 2
    shared = used(folder_of(tmp_path) / "segment-000000.kv")
    assert shared > 100_000
    assert names(plan) == ["ops", "fork"]
    assert plan.total == plan.freed == used(*ops, *fork)
    assert [one.bytes for one in plan.sessions] == [used(*ops), used(*fork)]
    plan = plan_prune(tmp_path, keep_under=plan.total - 1)
    assert names(plan) == ["ops"]
    assert plan.freed == used(*ops) - shared
    list(prune(tmp_path, plan.sessions))
    assert (folder_of(tmp_path, "fork") / "segment-000000.kv").stat().st_nlink == 1
    assert all(one.ok for one in check(tmp_path))
    with AgentRuntime(tmp_path, tiny_model) as runtime:
        runtime.session("fork").append_user("go on")
        runtime.session("fork").reply(max_tokens=2)


def test_what_is_open_or_used_meanwhile_stays(tmp_path: Path) -> None:
    aged(tmp_path, {"open": 50, "used": 40, "gone": 35, "old": 30, "unreadable": 60}, size=1000)
    (folder_of(tmp_path, "unreadable") / "session.db").write_bytes(b"x")

    def hold(pipe: object) -> None:
        with SessionStore.open(tmp_path, "open"):
            pipe.send("open")  # type: ignore[attr-defined]
            time.sleep(60)

    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(there,), daemon=True)
    process.start()
    assert here.recv() == "open"
    plan = plan_prune(tmp_path, older_than=timedelta(days=20))
    assert names(plan) == ["used", "gone", "old"]
    assert [line.split(":")[0] for line in plan.skipped] == ["not readable", "open"]
    with SessionStore.open(tmp_path, "used") as store:
        store.commit(messages=(), token_ids=(), chunks=(), state={}, bytes_on_disk=0)
    Catalog(tmp_path).delete("gone")
    told: list[str] = []
    with SessionStore.open(tmp_path, "old"):
        assert list(prune(tmp_path, plan.sessions, told.append)) == []
    assert told == ["used: used meanwhile", "gone: deleted meanwhile", "old: open in another process"]
    process.kill()
    process.join(10)
    assert names(plan_prune(tmp_path, older_than=timedelta(days=20))) == ["open", "old"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * DAY), ("12h", DAY / 2), ("90m", 5400), ("2w", 14 * DAY), (" 1 d ", DAY), ("P1DT12H", 1.5 * DAY)],
)
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "30 parsecs", "1e9d", "inf", "9" * 400 + "d", "999999999w"])
def test_no_ages(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration; write 30d"):
        parse_age(text)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "inf", "1e3GB", "9" * 400 + "GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write 5GB"):
        parse_size(text)


def test_deleting_leaves_nothing_behind(tmp_path: Path, tiny_model: LocalModel) -> None:
    make(tmp_path, tiny_model, "kept", blocks=2)
    before = set(tmp_path.rglob("*"))
    make(tmp_path, tiny_model, "secret-name", blocks=2)
    store = SessionStore.open(tmp_path, "secret-name")
    folder = store.folder
    store._db.execute("PRAGMA wal_autocheckpoint=0")
    copies = {name: (folder / name).read_bytes() for name in ("session.db-wal", "session.db-shm")}
    store.close()
    for name, data in copies.items():  # as a killed process leaves them
        (folder / name).write_bytes(data)
    Catalog(tmp_path).delete("secret-name")
    assert set(tmp_path.rglob("*")) == before
    for path in before:
        if path.is_file():
            assert b"secret-name" not in path.read_bytes(), path


# -- on the command line -----------------------------------------------------------------------------------------------


def test_the_command(cli: Cli) -> None:
    aged(cli.root, {"old": 40, "new": 1}, size=10_000)
    root = shutil.copytree(cli.root, cli.root.with_name("copy"))
    for arguments, says in [
        ([], "--older-than, --larger-than or --keep-under"),
        (["--older-than", "soon"], "'soon' is no duration"),
        (["--larger-than", "much"], "'much' is no size"),
        (["--older-than", "30d"], "needs --yes"),
        (["--older-than", "300d"], "needs --yes"),
    ]:
        result = cli("sessions", "prune", *arguments)
        assert result.code == 2
        assert says in result.error
    shown = cli("sessions", "prune", "--older-than", "30d", "--dry-run").out.splitlines()
    assert shown[0].split() == ["name", "disk", "bytes", "updated", "why"]
    assert shown[1].startswith("old ")
    told = cli("sessions", "prune", "--older-than", "30d", "--dry-run", "--json").json
    assert [one["name"] for one in told["pruned"]] == ["old"]
    assert told["dry_run"]
    assert len(Catalog(cli.root).list()) == 2
    with SessionStore.open(cli.root, "old"):
        out = cli("sessions", "prune", "--older-than", "30d", "--yes").out
        assert "nothing to delete\nskipped: old: open in another process\n" in out
    done = cli("sessions", "prune", "--older-than", "30d", "--yes", "--json").json
    assert [one["name"] for one in done["pruned"]] == ["old"]
    assert done["bytes"]["freed"] >= 10_000
    assert [info.name for info in Catalog(cli.root).list()] == ["new"]
    assert "2 sessions deleted" in cli("sessions", "prune", "--keep-under", "1KB", "--yes", "--root", str(root)).out


@pytest.mark.parametrize(("answer", "left"), [("y", ["new"]), ("n", ["new", "old"])])
def test_it_asks_on_a_terminal(tmp_path: Path, answer: str, left: list[str]) -> None:
    aged(tmp_path, {"old": 40, "new": 1})
    command = ["-m", "infllm_agent", "sessions", "prune", "--older-than", "30d", "--root", str(tmp_path)]
    terminal = pexpect.spawn(sys.executable, command, timeout=20)
    terminal.expect("old .* last commit 40 days.*Delete 1 session for good\\? \\[y/N\\]: ")
    assert len(Catalog(tmp_path).list()) == 2
    terminal.sendline(answer)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == (0 if answer == "y" else 1)
    assert [info.name for info in Catalog(tmp_path).list()] == left
