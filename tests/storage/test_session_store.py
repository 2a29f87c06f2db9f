"""The session store and its catalogue, on real files, with real processes that are really killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_utils import Database, Migrations

from infllm_agent.errors import (
    CorruptSession,
    InfLLMError,
    InvalidName,
    SessionClosed,
    SessionExists,
    SessionLocked,
    StorageError,
    UnknownSession,
)
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.database import CATALOG_SCHEMA, SESSION_SCHEMA, connect
from infllm_agent.storage.session_store import Message, SessionStore

FINGERPRINT = {"model": "tiny", "format": 1}
FORK = multiprocessing.get_context("fork")  # children need no second import; none is started with a store open here
NOBODY = 65534

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def message(index: int, text: str = "text", *, start: int = 0, end: int = 0, **values: Any) -> Message:
    fields: dict[str, Any] = {"role": "user", "name": None, "call_id": None, "time": 1.5e9 + index} | values
    return Message(index=index, text=text, start=start, end=end, **fields)


def say(store: SessionStore, *said: str) -> int:
    """Commit messages of three tokens each, executed as chunks of two and one."""
    count, tokens = store.message_count, store.token_count
    new = [message(count + i, text, start=tokens + 3 * i, end=tokens + 3 * i + 3) for i, text in enumerate(said)]
    ids = list(range(tokens, tokens + 3 * len(said)))
    chunks = [chunk for m in new for chunk in ((m.start, 2), (m.start + 2, 1))]
    state = {"said": count + len(said)}
    return store.commit(messages=new, token_ids=ids, chunks=chunks, state=state, bytes_on_disk=1000, blocks=7)


def assert_consistent(store: SessionStore) -> None:
    """The content is what ``say`` makes, as of one generation."""
    messages = store.messages()
    assert [m.index for m in messages] == list(range(store.message_count))
    assert [(m.start, m.end) for m in messages] == [(3 * i, 3 * i + 3) for i in range(len(messages))]
    assert list(store.token_ids()) == list(range(3 * len(messages)))
    assert store.chunks() == [chunk for m in messages for chunk in ((m.start, 2), (m.start + 2, 1))]
    assert store.state == ({"said": len(messages)} if messages else None)
    store.verify()


def in_child(work: Callable[[Connection], None]) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    here, there = FORK.Pipe()

    def run() -> None:
        here.close()
        work(there)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    there.close()
    return process, here


def outcome_in_child(work: Callable[[], object], *, user: int | None = None) -> object:
    """What ``work`` returns, or the error it raises, in a process of its own; optionally as another user."""

    def run(pipe: Connection) -> None:
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        try:
            pipe.send(work())
        except InfLLMError as error:
            pipe.send((type(error).__name__, str(error)))

    process, pipe = in_child(run)
    assert pipe.poll(20), "the child said nothing"
    result: object = pipe.recv()
    process.join(10)
    return result


@contextmanager
def readonly_tree(root: Path) -> Iterator[Callable[[Callable[[], object]], object]]:
    """A copy of ``root`` that nobody may write to, and a way to work there as a user for whom that holds."""
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        copy = Path(above) / "root"
        shutil.copytree(root, copy)
        folders = [copy, *(path for path in copy.rglob("*") if path.is_dir())]
        for path in copy.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        copy.chmod(0o555)
        user = NOBODY if os.geteuid() == 0 else None

        def enter(work: Callable[[], object]) -> object:
            def there() -> object:
                os.chdir(copy)
                return work()

            return outcome_in_child(there, user=user)

        try:
            yield enter
        finally:
            for path in folders:
                path.chmod(0o755)


def database_of(root: Path, name: str) -> Path:
    id = Catalog(root).find(name)
    assert id is not None
    return root / "sessions" / id / "session.db"


# What is stored


def test_what_is_committed_is_there_after_reopening(tmp_path: Path) -> None:
    first = message(0, "a\0b \u202e\U0001f600\r\n", role="tool", name="shell", call_id="call-1", start=1, end=4)
    with SessionStore.create(tmp_path, "ops", FINGERPRINT | {"sizes": (1, 2)}) as store:
        assert (store.generation, store.state, store.message_count, store.token_count) == (0, None, 0, 0)
        assert store.messages() == []
        assert list(store.token_ids()) == []
        assert store.chunks() == []
        new = store.commit(
            messages=[first, message(1, "", start=4, end=4)],
            token_ids=[0, 2**31 - 1, 5, 6, 7],
            chunks=[(0, 4), (4, 1)],
            state={"tail": "tail-1", "layers": [1, 2]},
            bytes_on_disk=10,
        )
        assert new == store.generation == 1
        assert store.commit(messages=[], token_ids=[], chunks=[], state={}, bytes_on_disk=10) == 2
        created = store.created
    with SessionStore.open(tmp_path, "ops", readonly=True) as store:
        assert store.fingerprint == {"model": "tiny", "format": 1, "sizes": [1, 2]}
        assert (store.name, store.created, store.state, store.generation) == ("ops", created, {}, 2)
        assert store.updated >= created
        assert store.messages() == [first, message(1, "", start=4, end=4)]
        assert list(store.token_ids()) == [0, 2**31 - 1, 5, 6, 7]
        assert store.chunks() == [(0, 4), (4, 1)]
        store.verify()


def test_slices_are_those_of_a_list(tmp_path: Path) -> None:
    ids = [n % 1000 for n in range(150_000)]  # several rows
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as store:
        for start, stop in ((0, 5), (5, 140_000), (140_000, 150_000)):
            store.commit(messages=[], token_ids=ids[start:stop], chunks=[], state={}, bytes_on_disk=0)
        say_index = [message(i, str(i), start=150_000, end=150_000) for i in range(9)]
        store.commit(messages=say_index, token_ids=[], chunks=[], state={}, bytes_on_disk=0)
        for piece in (
            (0, None), (0, 0), (4, 6), (5, 5), (65_540, 65_542), (-3, None), (0, -149_999), (149_999, 999_999), (9, 3),
        ):  # fmt: skip
            assert list(store.token_ids(*piece)) == ids[slice(*piece)], piece
            assert store.messages(*piece) == say_index[slice(*piece)], piece


def test_thousands_of_decoded_tokens_are_one_row(tmp_path: Path) -> None:
    chunks = [(0, 512), (512, 100), *((612 + i, 1) for i in range(5000))]
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as store:
        store.commit(messages=[], token_ids=range(5612), chunks=chunks, state={}, bytes_on_disk=0)
        assert store.chunks() == chunks
    with closing(sqlite3.connect(database_of(tmp_path, "ops"))) as db:
        assert db.execute("SELECT count(*) FROM chunks").fetchone() == (3,)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [message(2)]},
        {"messages": [message(1, start=1, end=4)]},
        {"messages": [message(1, start=3, end=99)]},
        {"messages": [message(1, start=5, end=4)]},
        {"messages": [message(1, start=3, end=4, time=float("nan"))]},
        {"messages": [message(1, "\ud800", start=3, end=4)]},
        {"messages": [message(1, start=3, end=4), message(1, start=4, end=4)]},
        {"token_ids": [2**31]},
        {"token_ids": [-1]},
        {"chunks": [(4, 1)]},
        {"chunks": [(3, 0)]},
        {"chunks": [(3, 2)]},
        {"state": {"x": float("nan")}},
    ],
)
def test_a_commit_that_does_not_continue_the_session_changes_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as store:
        say(store, "one")
        good: dict[str, Any] = {"messages": [], "token_ids": [9], "chunks": [], "state": {}, "bytes_on_disk": 0}
        with pytest.raises(ValueError):  # noqa: PT011 - the messages differ
            store.commit(**good | change)
        assert store.generation == 1
        assert_consistent(store)


def test_closed_and_read_only_stores_say_so(tmp_path: Path) -> None:
    store = SessionStore.create(tmp_path, "ops", FINGERPRINT)
    store.close()
    store.close()
    with pytest.raises(SessionClosed, match="ops"):
        store.messages()
    with SessionStore.open(tmp_path, "ops", readonly=True) as reader, pytest.raises(StorageError, match="read-only"):
        say(reader, "no")


def test_files_are_private(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path / "new" / "root", "ops", FINGERPRINT) as store:
        say(store, "one")
        made = [tmp_path / "new" / "root", *(tmp_path / "new" / "root").rglob("*")]
        assert {path.name for path in made} >= {"catalog.db", "session.db", "session.db-wal", "lock"}
        for path in made:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_database_survives_power_loss_by_its_settings(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as store:
        values = {k: store._db.execute(f"PRAGMA {k}").fetchone()[0] for k in ("journal_mode", "synchronous")}
        assert values == {"journal_mode": "wal", "synchronous": 2}
        assert store._db.execute("PRAGMA foreign_keys").fetchone() == (1,)


# Search


def test_search_finds_all_words_newest_first(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as store:
        say(store, "The Café is open", "open the pod bay", "closed", "日本語のログ", "a ==> b", "x\0needle")
        found = {
            query: [m.index for m in store.search(query)]
            for query in ("open", "OPEN the", "cafe", "本語", "==>", "pen", "needle", "nothing", "", " ", '"', "\ud800")
        }
        assert found == {
            "open": [1, 0], "OPEN the": [1, 0], "cafe": [0], "本語": [3], "==>": [4], "pen": [1, 0], "needle": [5],
            "nothing": [], "": [], " ": [], '"': [], "\ud800": [],
        }  # fmt: skip
        assert [m.index for m in store.search("open", limit=1)] == [1]
        assert store.search("open", limit=0) == []
        assert store.search(" ".join(f"w{i}" for i in range(20_000))) == []
    with SessionStore.open(tmp_path, "ops", readonly=True) as store:
        assert [m.index for m in store.search("pod")] == [1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(max_size=30), st.text('ab"*:^(){}+-~NOTANDOR \0\t', max_size=20)))
def test_any_text_is_a_query(searchable: SessionStore, query: str) -> None:
    for found in searchable.search(query, 3):
        assert found in searchable.messages()


@pytest.fixture(scope="module")
def searchable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SessionStore]:
    with SessionStore.create(tmp_path_factory.mktemp("search"), "ops", FINGERPRINT) as store:
        say(store, "a b", "NOT a", 'a"b', "text:a", "ab* (AND)")
        yield store


# Names, texts and folders as attack


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(texts, max_size=4), name=texts, call_id=st.none() | texts)
def test_texts_come_back_verbatim(tmp_path: Path, said: list[str], name: str, call_id: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as root:
        with SessionStore.create(root, "ops", FINGERPRINT | {"text": name}) as store:
            given_messages = [message(i, text, name=name, call_id=call_id) for i, text in enumerate(said)]
            store.commit(messages=given_messages, token_ids=[], chunks=[], state={"text": name}, bytes_on_disk=0)
        with SessionStore.open(root, "ops") as store:
            assert store.messages() == given_messages
            assert store.state == {"text": name}
            assert store.fingerprint["text"] == name
            store.verify()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(max_size=140), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,20}", fullmatch=True)))
def test_a_name_is_kept_or_refused_and_makes_no_path(tmp_path: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as above:
        root = Path(above) / "root"
        try:
            SessionStore.create(root, name, FINGERPRINT).close()
        except InvalidName as error:
            assert "\n" not in str(error)  # noqa: PT017 - other names are good
            assert not root.exists()
        else:
            assert [info.name for info in Catalog(root).list()] == [name]
            (folder,) = (root / "sessions").iterdir()
            assert len(folder.name) == 32
            assert set(folder.name) <= set("0123456789abcdef")
        assert {path.name for path in Path(above).iterdir()} <= {"root"}


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "a/b", "a\\b", "a\n", "a\0", "é", "a" * 129, "a' OR 1=1 --"])
def test_names_that_are_refused_everywhere(tmp_path: Path, name: str) -> None:
    for attempt in (
        lambda: SessionStore.create(tmp_path, name, FINGERPRINT),
        lambda: SessionStore.open(tmp_path, name),
        lambda: Catalog(tmp_path).find(name),
        lambda: Catalog(tmp_path).delete(name),
    ):
        with pytest.raises(InvalidName):
            attempt()


@pytest.mark.parametrize("victim", ["sessions", "folder", "session.db", "lock"])
def test_symbolic_links_are_refused(tmp_path: Path, victim: str) -> None:
    root = tmp_path / "root"
    SessionStore.create(root, "ops", FINGERPRINT).close()
    database = database_of(root, "ops")
    path = {"sessions": root / "sessions", "folder": database.parent}.get(victim, database.parent / victim)
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    for readonly in (True, False):
        with pytest.raises((StorageError, UnknownSession)):
            SessionStore.open(root, "ops", readonly=readonly)
    with pytest.raises((StorageError, UnknownSession)):
        Catalog(root).delete("ops")
    assert (tmp_path / "outside").exists()


# One writer


def test_one_writer_per_session_and_any_number_of_readers(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as writer:
        started = time.monotonic()
        with pytest.raises(SessionLocked, match=f"process {os.getpid()}"):
            SessionStore.open(tmp_path, "ops")
        with pytest.raises(SessionLocked):
            Catalog(tmp_path).delete("ops")
        assert time.monotonic() - started < 1
        with SessionStore.open(tmp_path, "ops", readonly=True) as reader:
            say(writer, "one")
            assert reader.generation == 1
            assert [m.text for m in reader.messages()] == ["one"]
            say(writer, "two")
            assert_consistent(reader)
    SessionStore.open(tmp_path, "ops").close()


def test_of_two_processes_one_gets_the_session(tmp_path: Path) -> None:
    SessionStore.create(tmp_path, "ops", FINGERPRINT).close()
    for _ in range(20):
        assert sorted(race(lambda: SessionStore.open(tmp_path, "ops"))) == ["SessionLocked", "won"]


def test_of_two_processes_one_makes_the_session(tmp_path: Path) -> None:
    for i in range(10):
        make = partial(SessionStore.create, tmp_path, f"new{i}", {})
        assert sorted(race(make, within=10)) == ["SessionExists", "won"]
        get = partial(SessionStore.open_or_create, tmp_path, f"any{i}", {})
        assert sorted(race(get, within=10)) == ["SessionLocked", "won"]
    assert len(Catalog(tmp_path).list()) == 20


def race(attempt: Callable[[], SessionStore], *, within: float = 1) -> list[str]:
    """What became of two processes that attempt the same at the same time. The winner holds on until both know."""

    def run(pipe: Connection) -> None:
        pipe.send("ready")
        pipe.recv()
        started = time.monotonic()
        try:
            store = attempt()
        except InfLLMError as error:
            pipe.send(type(error).__name__ if time.monotonic() - started < within else f"late {error}")
            return
        pipe.send("won")
        pipe.recv()
        store.close()

    children = [in_child(run) for _ in range(2)]
    for _, pipe in children:
        assert pipe.recv() == "ready"
    for _, pipe in children:
        pipe.send("go")
    outcomes = [pipe.recv() for _, pipe in children]
    for (process, pipe), outcome in zip(children, outcomes, strict=True):
        if outcome == "won":
            pipe.send("done")
        process.join(10)
    return outcomes


def test_a_killed_writer_frees_the_session(tmp_path: Path) -> None:
    def hold(pipe: Connection) -> None:
        store = SessionStore.create(tmp_path, "ops", FINGERPRINT)
        say(store, "one")
        pipe.send("holding")
        time.sleep(60)

    process, pipe = in_child(hold)
    assert pipe.recv() == "holding"
    with pytest.raises(SessionLocked, match=f"process {process.pid}"):
        SessionStore.open(tmp_path, "ops")
    process.kill()
    process.join(10)
    with SessionStore.open(tmp_path, "ops") as store:
        assert store.generation == 1
        assert_consistent(store)


def test_killed_in_the_middle_of_commits_it_reopens_at_a_committed_generation(tmp_path: Path) -> None:
    def commit_for_ever(pipe: Connection) -> None:
        with SessionStore.open_or_create(tmp_path, "ops", FINGERPRINT) as store:
            while True:
                pipe.send(say(store, "some text " * 50, "more"))

    dice = random.Random(0)
    for _ in range(20):
        process, pipe = in_child(commit_for_ever)
        reported = pipe.recv()
        time.sleep(dice.random() * 0.03)
        process.kill()
        process.join(10)
        try:
            while True:
                reported = pipe.recv()
        except (EOFError, OSError):
            pass
        with SessionStore.open(tmp_path, "ops", readonly=dice.random() < 0.5) as store:
            assert store.generation in (reported, reported + 1)
            assert store.message_count == 2 * store.generation
            assert_consistent(store)
    SessionStore.open(tmp_path, "ops").close()  # brings the catalogue up to date as well
    (info,) = Catalog(tmp_path).list()
    assert info.messages == 2 * info.generation


def test_threads_share_a_store(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as store:

        def work() -> None:
            try:
                for _ in range(20):
                    store.commit(messages=[], token_ids=[1, 2], chunks=[], state={}, bytes_on_disk=0)
                    assert set(store.token_ids()) == {1, 2}
                    store.search("x")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failures
        assert (store.generation, store.token_count) == (80, 160)
        store.verify()


# The catalogue


def test_the_list_has_every_figure(tmp_path: Path) -> None:
    assert Catalog(tmp_path / "none").list() == []
    assert not (tmp_path / "none").exists()
    for name in ("b", "a"):
        with SessionStore.create(tmp_path, name, FINGERPRINT) as store:
            say(store, "one", "two")
    infos = Catalog(tmp_path).list()
    assert [info.name for info in infos] == ["a", "b"]
    info = infos[1]
    assert (info.messages, info.tokens, info.blocks, info.generation, info.model) == (2, 6, 7, 1, "tiny")
    assert info.bytes == {"device": 0, "host": 0, "disk": 1000}
    assert info.created <= info.updated <= time.time()
    assert Catalog(tmp_path).find("b") == info.id
    assert Catalog(tmp_path).find("c") is None


def test_an_unknown_session_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UnknownSession, match=r'no session "x" in .*; there are none yet'):
        SessionStore.open(tmp_path, "x")
    for i in range(7):
        SessionStore.create(tmp_path, f"s{i}", FINGERPRINT).close()
    with pytest.raises(UnknownSession, match=r"sessions there: s6, s5, s4, s3, s2 and 2 more$"):
        SessionStore.open(tmp_path, "x")
    with pytest.raises(SessionExists, match='"s0" already exists'):
        SessionStore.create(tmp_path, "s0", FINGERPRINT)


def break_catalog(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(random.Random(1).randbytes(5000))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute({"no table": "DROP TABLE sessions", "newer": NEWER.format("catalog")}[how])
            db.commit()


NEWER = "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('infllm_agent.{}', '999_later', '')"


@pytest.mark.parametrize("how", ["missing", "garbage", "empty", "truncated", "folder", "no table", "newer"])
def test_without_a_usable_catalogue_the_folders_are_read(tmp_path: Path, how: str) -> None:
    for name in ("a", "b"):
        with SessionStore.create(tmp_path, name, FINGERPRINT) as store:
            say(store, "one")
    before = Catalog(tmp_path).list()
    break_catalog(tmp_path / "catalog.db", how)
    with SessionStore.open(tmp_path, "a") as store:  # a commit does not depend on it either
        say(store, "two")
    after = Catalog(tmp_path).list()
    assert [(i.name, i.id, i.messages) for i in after] == [
        (i.name, i.id, m) for i, m in zip(before, (2, 1), strict=True)
    ]
    if how not in ("folder", "newer"):
        with closing(connect(tmp_path / "catalog.db", CATALOG_SCHEMA, readonly=True)) as db:
            assert db["sessions"].count == 2


def test_a_stale_catalogue_follows_the_folders(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("a", "b"):
        SessionStore.create(root, name, FINGERPRINT).close()
    with SessionStore.create(elsewhere, "c", FINGERPRINT) as store:
        say(store, "one")
    shutil.rmtree(database_of(root, "a").parent)
    shutil.copytree(store.folder, root / "sessions" / store.id)
    assert [(info.name, info.messages) for info in Catalog(root).list()] == [("b", 0), ("c", 1)]
    with closing(sqlite3.connect(root / "catalog.db")) as db:
        db.execute("UPDATE sessions SET messages = 99, generation = 99")
        db.commit()
    Catalog(root).rebuild()
    assert [info.messages for info in Catalog(root).list()] == [0, 1]


def test_two_folders_of_one_name_are_not_chosen_between(tmp_path: Path) -> None:
    SessionStore.create(tmp_path, "a", FINGERPRINT).close()
    folder = database_of(tmp_path, "a").parent
    shutil.copytree(folder, folder.with_name("0" * 32))
    assert len(Catalog(tmp_path).list()) == 2
    with pytest.raises(StorageError, match="several folders"):
        SessionStore.open(tmp_path, "a")


def test_deleting_leaves_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with SessionStore.create(tmp_path, name, FINGERPRINT) as store:
            (store.folder / "segment-0.kv").write_bytes(b"x" * 100)
    Catalog(tmp_path).delete("a")
    assert [path.name for path in (tmp_path / "sessions").iterdir()] == [store.id]
    assert store.id.encode() in (tmp_path / "catalog.db").read_bytes()
    assert [info.name for info in Catalog(tmp_path).list()] == ["b"]
    with pytest.raises(UnknownSession):
        Catalog(tmp_path).delete("a")
    SessionStore.create(tmp_path, "a", FINGERPRINT).close()


def test_leftovers_of_killed_processes_are_collected(tmp_path: Path) -> None:
    SessionStore.create(tmp_path, "a", FINGERPRINT).close()
    folder = database_of(tmp_path, "a").parent
    for prefix in (".new-", ".deleted-"):
        shutil.copytree(folder, folder.with_name(prefix + "1" * 32))
    assert [info.name for info in Catalog(tmp_path).list()] == ["a"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_session_deleted_while_waiting_to_open_is_gone(tmp_path: Path) -> None:
    SessionStore.create(tmp_path, "a", FINGERPRINT).close()

    def open_and_delete() -> str:
        try:
            SessionStore.open(tmp_path, "a").close()
            return "opened"
        except (UnknownSession, SessionLocked, CorruptSession) as error:
            return type(error).__name__

    children = [in_child(lambda pipe: pipe.send([open_and_delete() for _ in range(60)])) for _ in range(2)]
    time.sleep(0.02)
    while True:
        try:
            Catalog(tmp_path).delete("a")
            break
        except SessionLocked:
            time.sleep(0.001)
    for process, pipe in children:
        assert set(pipe.recv()) <= {"opened", "SessionLocked", "UnknownSession"}
        process.join(10)
    assert list((tmp_path / "sessions").iterdir()) == []


# Damage, other versions, and disks that refuse


@pytest.mark.parametrize("damage", ["garbage", "empty", "missing", "other database"])
@pytest.mark.parametrize("readonly", [True, False])
def test_a_damaged_session_is_named(tmp_path: Path, damage: str, readonly: bool) -> None:
    for name in ("a", "b"):
        SessionStore.create(tmp_path, name, FINGERPRINT).close()
    path = database_of(tmp_path, "a")
    path.unlink()
    if damage == "garbage":
        path.write_bytes(random.Random(2).randbytes(9000))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other database":
        with closing(Database(path)) as other:
            other.execute("CREATE TABLE things (id)")
    with pytest.raises(CorruptSession, match=str(path)):
        SessionStore.open(tmp_path, "a", readonly=readonly)
    assert [str(path) in problem for problem in Catalog(tmp_path).problems()] == [True]
    Catalog(tmp_path).rebuild()
    assert [info.name for info in Catalog(tmp_path).list()] == ["a", "b"]  # its name is still known: it can be deleted
    (tmp_path / "catalog.db").unlink()
    with pytest.raises(UnknownSession, match=rf"sessions there: b; not readable: {path}"):
        SessionStore.open(tmp_path, "a", readonly=readonly)


def test_flipped_bits_are_noticed_or_change_nothing(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path, "a", FINGERPRINT) as store:
        for i in range(20):
            say(store, f"message {i} " * 20)
        expected = everything(store)
    path, dice = database_of(tmp_path, "a"), random.Random(3)
    original = path.read_bytes()
    noticed = 0
    for _ in range(300):
        damaged = bytearray(original)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            with SessionStore.open(tmp_path, "a", readonly=True) as store:
                assert everything(store) == expected
        except (CorruptSession, StorageError) as error:
            noticed += 1
            assert str(path) in str(error)  # noqa: PT017 - other flips do no harm
    assert noticed > 30


def everything(store: SessionStore) -> tuple[Any, ...]:
    return (store.messages(), store.token_ids(), store.chunks(), store.state, store.generation, store.fingerprint)


@pytest.mark.parametrize("readonly", [True, False])
def test_a_session_of_a_newer_version_is_refused(tmp_path: Path, readonly: bool) -> None:
    SessionStore.create(tmp_path, "a", FINGERPRINT).close()
    with closing(sqlite3.connect(database_of(tmp_path, "a"))) as db:
        db.execute(NEWER.format("session"))
        db.commit()
    with pytest.raises(StorageError, match=r"newer version \(999_later\); upgrade infllm-agent"):
        SessionStore.open(tmp_path, "a", readonly=readonly)


def test_migrations_are_all_or_nothing(tmp_path: Path) -> None:
    path, schema = tmp_path / "x.db", Migrations("test")

    @schema(name="001")
    def first(db: Database) -> None:
        db.execute("CREATE TABLE one (x)")

    connect(path, schema, create=True).close()

    @schema(name="002")
    def second(db: Database) -> None:
        db.execute("CREATE TABLE two (x)")

    @schema(name="003")
    def third(db: Database) -> None:
        db.execute("CREATE TABLE one (x)")

    upgraded = Migrations("test")
    upgraded(name="001")(first)
    upgraded(name="002")(second)
    broken = Migrations("test")
    for name, step in (("001", first), ("002", second), ("003", third)):
        broken(name=name)(step)

    def tables() -> set[str]:
        with closing(Database(path)) as db:
            return set(db.table_names()) - {"_sqlite_migrations"}

    with pytest.raises(CorruptSession):
        connect(path, broken)
    assert tables() == {"one"}
    with pytest.raises(StorageError, match="older version"):
        connect(path, upgraded, readonly=True)
    connect(path, upgraded).close()
    connect(path, upgraded).close()
    assert tables() == {"one", "two"}


def test_the_schema_as_released() -> None:
    """A released migration never changes; add one, and a test that opens a session made before it."""
    with closing(Database(memory=True)) as db:
        assert [m.name for m in SESSION_SCHEMA.pending(db)] == ["001_session", "002_tools", "003_traces"]
        assert [m.name for m in CATALOG_SCHEMA.pending(db)] == ["001_catalog", "002_names"]


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
def test_history_is_readable_where_nothing_can_be_written(tmp_path: Path, closed: bool) -> None:
    def write(pipe: Connection) -> None:
        store = SessionStore.create(tmp_path / "root", "ops", FINGERPRINT)
        say(store, "one", "two")
        if closed:
            store.close()
        pipe.send("written")
        os.kill(os.getpid(), signal.SIGKILL)

    process, pipe = in_child(write)
    assert pipe.recv() == "written"
    process.join(10)
    for path in (tmp_path / "root").rglob("session.db-shm"):
        path.unlink()  # as on a copy, or after a restart of the machine

    def read() -> object:
        with SessionStore.open(".", "ops", readonly=True) as store:
            assert_consistent(store)
            assert store.search("two")
            return [info.name for info in Catalog(".").list()], store.message_count

    def write_there() -> object:
        return SessionStore.open(".", "ops").name

    def create_there() -> object:
        return SessionStore.create(".", "other", FINGERPRINT).name

    def delete_there() -> None:
        Catalog(".").delete("ops")

    with readonly_tree(tmp_path / "root") as enter:
        assert enter(read) == (["ops"], 2)
        for attempt in (write_there, create_there, delete_there):
            outcome = enter(attempt)
            assert isinstance(outcome, tuple), outcome
            assert outcome[0] == "StorageError"
            assert "ermission denied" in outcome[1]
            assert "\n" not in outcome[1]


def test_a_root_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/root-cannot-be-here")):
        with pytest.raises(StorageError, match=str(root)):
            SessionStore.create(root, "ops", FINGERPRINT)
    with pytest.raises(StorageError, match="Not a directory"):
        Catalog(tmp_path / "file").list()


def test_a_full_disk_keeps_the_last_generation(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as store:
        say(store, "one")

    def write_too_much() -> object:
        with SessionStore.open(tmp_path, "ops") as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
            try:
                say(store, "x" * 1_000_000)
            except StorageError as error:
                say(store, "two")
                return str(error)
        return None

    error = outcome_in_child(write_too_much)
    assert isinstance(error, str)
    assert str(database_of(tmp_path, "ops")) in error
    assert "\n" not in error
    with SessionStore.open(tmp_path, "ops") as store:
        assert [m.text for m in store.messages()] == ["one", "two"]
        assert_consistent(store)


def test_a_full_database_leaves_the_session_usable(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path, "ops", FINGERPRINT) as store:
        say(store, "one")
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count={pages}").fetchone()
        with pytest.raises(StorageError, match=r"session\.db: database or disk is full"):
            say(store, "x" * 1_000_000)
        store._db.execute("PRAGMA max_page_count=1000000").fetchone()
        say(store, "two")
        assert_consistent(store)


def test_figures_are_json(tmp_path: Path) -> None:
    SessionStore.create(tmp_path, "ops", FINGERPRINT).close()
    (info,) = Catalog(tmp_path).list()
    assert json.loads(json.dumps(asdict(info)))["bytes"] == {"device": 0, "host": 0, "disk": 0}
