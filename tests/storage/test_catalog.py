"""Finding sessions by name: one look-up in the catalogue, unless something came or went among the folders."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from infllm_agent.errors import InvalidName, SessionExists, StorageError, UnknownSession
from infllm_agent.platform.files import folder_bytes
from infllm_agent.storage import catalog as module
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.catalog_index import this_boot
from infllm_agent.storage.session_store import SessionStore

FINGERPRINT = {"model": "tiny"}


def make(root: Path, *names: str) -> list[Path]:
    """The folders of new sessions."""
    folders = []
    for name in names:
        with SessionStore.create(root, name, FINGERPRINT) as store:
            folders.append(store.folder)
    return folders


def change(root: Path, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(root / "catalog.db")) as db, db:
        db.execute(sql, values)


def asked_alone(root: Path) -> bool:
    """Whether the catalogue was compared with the folders, and would be believed."""
    with closing(sqlite3.connect(root / "catalog.db")) as db:
        row = db.execute("SELECT boot, folder FROM comparison").fetchone()
    status = Catalog(root)._status()
    return status is not None and row == tuple(module._stamp(status))


def settle(root: Path) -> None:
    """Look until the folder's last change is so long ago that the next will show."""
    while not asked_alone(root):
        Catalog(root).find("settled")


def names(root: Path, base: str) -> list[str]:
    return [info.name for info in Catalog(root).family(base)]


def test_the_folders_are_not_read_while_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = make(tmp_path, "a", "a.b2", "b")
    settle(tmp_path)
    monkeypatch.delattr(Catalog, "_listed")
    monkeypatch.delattr(Catalog, "_read")
    assert Catalog(tmp_path).find("a") == folders[0].name
    assert Catalog(tmp_path).find("c") is None
    assert names(tmp_path, "a") == ["a", "a.b2"]
    assert names(tmp_path, "c") == []
    assert Catalog(tmp_path).require("b") == folders[2].name
    with pytest.raises(UnknownSession, match=r"sessions there: b, a\.b2, a$"):
        Catalog(tmp_path).require("c")
    with SessionStore.open(tmp_path, "a") as store:  # a commit is none of the folders' business
        store.commit(messages=[], token_ids=[1], chunks=[], state={}, bytes_on_disk=9)
    assert [(info.name, info.tokens) for info in Catalog(tmp_path).family("a")] == [("a", 1), ("a.b2", 0)]


def test_what_came_or_went_does_not_make_every_session_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *"abcdef")
    settle(tmp_path)
    read: list[str] = []
    real = Catalog._read
    monkeypatch.setattr(Catalog, "_read", lambda self, ids: real(self, [id for id in ids if not read.append(id)]))
    (new,) = make(tmp_path, "g")
    assert Catalog(tmp_path).find("g") == new.name
    Catalog(tmp_path).delete("b")
    assert Catalog(tmp_path).find("b") is None
    assert Catalog(tmp_path).find("a") is not None
    assert set(read) <= {new.name}


def test_a_family_is_a_session_and_its_branches(tmp_path: Path) -> None:
    there = ["a", "a.b2", "a.b10", "a.b", "a.b0", "a.b02", "a.b2.b3", "a.bx", "ab2", "a.c", "A.b2", "a.b2x", "a-b2"]
    make(tmp_path, *there)
    for base in (*there, "none"):
        member = re.compile(rf"{re.escape(base)}(\.b[1-9][0-9]*)?")
        expected = sorted(name for name in there if member.fullmatch(name))
        assert names(tmp_path, base) == expected
        settle(tmp_path)
        assert names(tmp_path, base) == expected
    with pytest.raises(InvalidName):
        Catalog(tmp_path).family("a%")


@pytest.mark.parametrize("quiet", [True, False])
def test_folders_that_are_copied_in_by_hand(tmp_path: Path, quiet: bool) -> None:
    root = tmp_path / "root"
    (mine,) = make(root, "a")
    (other,) = make(tmp_path / "elsewhere", "a.b2")
    if quiet:
        settle(root)
    assert Catalog(root).find("a.b2") is None
    shutil.copytree(other, mine.with_name(other.name))
    with pytest.raises(SessionExists):
        SessionStore.create(root, "a.b2", FINGERPRINT)
    assert Catalog(root).find("a.b2") == other.name
    assert names(root, "a") == ["a", "a.b2"]
    settle(root)
    shutil.copytree(mine, mine.with_name("0" * 32))
    for _ in range(2):
        with pytest.raises(StorageError, match="several folders"):
            Catalog(root).find("a")
        assert names(root, "a") == ["a", "a", "a.b2"]
        settle(root)
    assert Catalog(root).find("a.b2") == other.name


@pytest.mark.parametrize("quiet", [True, False])
def test_folders_that_are_deleted_or_moved_away_by_hand(tmp_path: Path, quiet: bool) -> None:
    a, branch = make(tmp_path, "a", "a.b2")
    if quiet:
        settle(tmp_path)
    shutil.rmtree(branch)
    assert names(tmp_path, "a") == ["a"]
    settle(tmp_path)
    a.rename(tmp_path / "away")
    assert Catalog(tmp_path).find("a") is None
    settle(tmp_path)
    (tmp_path / "away").rename(a)
    assert Catalog(tmp_path).require("a") == a.name
    settle(tmp_path)
    shutil.rmtree(tmp_path / "sessions")
    assert Catalog(tmp_path).find("a") is None
    assert names(tmp_path, "a") == []
    assert len(make(tmp_path, "a")) == 1


def test_a_row_without_a_folder_is_not_believed(tmp_path: Path) -> None:
    make(tmp_path, "a")
    settle(tmp_path)
    change(tmp_path, "INSERT INTO sessions SELECT ?, 'b', 1, 1, 1, 1, 1, 1, 1, 'x' FROM sessions", "1" * 32)
    assert asked_alone(tmp_path)
    assert Catalog(tmp_path).find("b") is None
    assert names(tmp_path, "b") == []
    assert [info.name for info in Catalog(tmp_path).list()] == ["a"]


def test_a_link_in_the_place_of_a_session_is_none(tmp_path: Path) -> None:
    (folder,) = make(tmp_path, "a")
    folder.rename(tmp_path / "away")
    settle(tmp_path)
    folder.symlink_to(tmp_path / "away")
    assert Catalog(tmp_path).find("a") is None


def test_an_older_copy_of_the_catalogue_is_behind(tmp_path: Path) -> None:
    make(tmp_path, "a")
    settle(tmp_path)
    shutil.copyfile(tmp_path / "catalog.db", tmp_path / "old.db")
    (new,) = make(tmp_path, "b")
    settle(tmp_path)
    shutil.copyfile(tmp_path / "old.db", tmp_path / "catalog.db")
    assert Catalog(tmp_path).find("b") == new.name


@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "truncated", "no table", "folder"])
def test_without_its_catalogue_a_root_has_the_same_names(tmp_path: Path, damage: str) -> None:
    folders = make(tmp_path, "a", "a.b2")
    settle(tmp_path)
    path = tmp_path / "catalog.db"
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "no table":
        path.write_bytes(data)
        change(tmp_path, "DROP TABLE sessions")
    elif damage != "missing":
        damaged = {"garbage": random.Random(1).randbytes(5000), "empty": b"", "truncated": data[:5000]}
        path.write_bytes(damaged[damage])
    for _ in range(2):
        assert Catalog(tmp_path).find("a") == folders[0].name
        assert Catalog(tmp_path).find("c") is None
        assert names(tmp_path, "a") == ["a", "a.b2"]
        with pytest.raises(UnknownSession, match=r"sessions there: a\.b2, a$"):
            Catalog(tmp_path).require("c")
        with pytest.raises(SessionExists):
            SessionStore.create(tmp_path, "a", FINGERPRINT)


def test_an_older_catalogue_opens(tmp_path: Path) -> None:
    folders = make(tmp_path, "a", "a.b2")
    change(tmp_path, "DROP INDEX sessions_name")
    change(tmp_path, "DROP INDEX sessions_updated")
    change(tmp_path, "DROP TABLE comparison")
    change(tmp_path, "DELETE FROM _sqlite_migrations WHERE name = '002_names'")
    assert Catalog(tmp_path).find("a.b2") == folders[1].name
    assert names(tmp_path, "a") == ["a", "a.b2"]
    settle(tmp_path)
    assert Catalog(tmp_path).find("a.b2") == folders[1].name


def test_rows_from_before_a_power_cut_are_compared_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = make(tmp_path, "a", "b")
    settle(tmp_path)
    assert this_boot() == this_boot()
    change(tmp_path, "DELETE FROM sessions WHERE name = 'a'")  # the row was never written, the comparison was
    monkeypatch.setattr(module, "this_boot", lambda: "another boot")
    assert Catalog(tmp_path).find("a") == folders[0].name
    settle(tmp_path)
    assert Catalog(tmp_path).find("a") == folders[0].name
    assert Catalog(tmp_path).damage() is None


def test_a_folder_that_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    (folder,) = make(tmp_path / "elsewhere", "a")
    make(tmp_path, "b")
    copy = Path(shutil.copytree(folder, tmp_path / "sessions" / folder.name))
    (copy / "session.db").write_bytes(b"no database")
    for _ in range(3):
        assert Catalog(tmp_path).find("a") is None
        with pytest.raises(UnknownSession, match=r"sessions there: b; not readable: .*session\.db"):
            Catalog(tmp_path).require("a")
    assert not asked_alone(tmp_path)
    shutil.copyfile(folder / "session.db", copy / "session.db")  # nothing of this shows in the folder of them all
    assert Catalog(tmp_path).find("a") == folder.name


def test_what_was_left_behind_goes_with_the_next_look(tmp_path: Path) -> None:
    (folder,) = make(tmp_path, "a")
    settle(tmp_path)
    for prefix in (".new-", ".deleted-", ".staged-"):
        shutil.copytree(folder, folder.with_name(prefix + "1" * 32))
    assert Catalog(tmp_path).find("a") == folder.name
    assert list(folder.parent.iterdir()) == [folder]
    with Catalog(tmp_path).staging() as staged:  # but not what is being used
        assert Catalog(tmp_path).find("a") == folder.name
        assert staged.exists()
        assert not asked_alone(tmp_path)


def test_looking_changes_nothing_once_all_is_known(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    settle(tmp_path)
    before = (tmp_path / "catalog.db").stat()
    for _ in range(3):
        Catalog(tmp_path).list()
        Catalog(tmp_path).find("a")
        Catalog(tmp_path).find("c")
    after = (tmp_path / "catalog.db").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert folder_bytes(tmp_path)


def test_whatever_is_added_and_deleted_at_once_is_found_or_not(tmp_path: Path) -> None:
    make(tmp_path, "there")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(6):
                name = f"s{number}-{step}"
                assert Catalog(tmp_path).find(name) is None
                (folder,) = make(tmp_path, name, *([f"{name}.b2"] if step == 0 else []))[:1]
                assert Catalog(tmp_path).find(name) == folder.name
                if step % 2:
                    Catalog(tmp_path).delete(name)
                    assert Catalog(tmp_path).find(name) is None
                assert Catalog(tmp_path).find("there") is not None
                assert names(tmp_path, f"s{number}-0") == [f"s{number}-0", f"s{number}-0.b2"]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    settle(tmp_path)
    assert len(Catalog(tmp_path).list()) == 1 + 4 * 4
    assert [Catalog(tmp_path).find(f"s0-{step}") is not None for step in range(6)] == [True, False] * 3
