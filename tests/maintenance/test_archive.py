"""A session as one file: exported beside a writer, imported whole or not at all, whatever the file holds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upkeep import RECORDS, change, change_generation, flip, folder_of, killed_at, make, next_logits

from infllm_agent import AgentRuntime
from infllm_agent.errors import CorruptSession, InfLLMError, InvalidName, SessionExists, StorageError, UnknownSession
from infllm_agent.maintenance.archive import export_session, import_session, read_archive, write_archive
from infllm_agent.maintenance.check import check
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.rows import checksum
from infllm_agent.storage.session_store import SessionStore

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = "infllm-session-1/"


@pytest.fixture(scope="module")
def made(tiny_model: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "root"
    make(root, tiny_model)
    return root


@pytest.fixture(scope="module")
def archive(made: Path) -> Path:
    path = made.parent / "ops.tar"
    export_session(made, "ops", path)
    return path


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def content(root: Path, name: str = "ops") -> dict[str, Any]:
    with SessionStore.open(root, name, readonly=True) as store:
        kept = {
            "messages": store.messages(),
            "tokens": store.token_ids(),
            "chunks": store.chunks(),
            "traces": [trace.pack() for trace in store.traces()],
            "state": store.state,
            "fingerprint": store.fingerprint,
            "times": (store.created, store.updated, store.generation),
            "found": store.search("printed"),
        }
        files = [path for path in store.folder.iterdir() if path.suffix in (".kv", ".safetensors")]
        return kept | {"files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}}


def members(archive: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar.getmembers()]


def test_it_is_a_tar_archive_with_a_manifest(made: Path, archive: Path) -> None:
    found = members(archive)
    names = [name.removeprefix(PREFIX).partition("-")[0] for name, _ in found]
    assert names == ["session.db", "tail", "segment", "segment", "manifest.json"]
    manifest = json.loads(found[-1][1])
    (info,) = Catalog(made).list()
    assert (manifest["format"], manifest["session"], manifest["blocks"]) == (1, "ops", info.blocks)
    assert manifest["members"] == [
        {"name": name.removeprefix(PREFIX), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in found[:-1]
    ]
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    assert [path.name for path in archive.parent.iterdir() if path.suffix == ".part"] == []
    listed = subprocess.run(["tar", "tf", archive], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [name for name, _ in found]
    assert listed.stderr == ""


def test_an_imported_session_goes_on_to_the_bit(
    made: Path, archive: Path, tmp_path: Path, tiny_model: LocalModel
) -> None:
    info = import_session(tmp_path / "new", archive)
    assert info.id != Catalog(made).find("ops")
    (was,) = Catalog(made).list()
    assert (info.name, info.messages, info.tokens, info.blocks) == (was.name, was.messages, was.tokens, was.blocks)
    assert content(tmp_path / "new") == content(made)
    assert all(one.ok for one in check(tmp_path / "new"))
    shutil.copytree(made, tmp_path / "same")
    assert torch.equal(next_logits(tmp_path / "new", tiny_model), next_logits(tmp_path / "same", tiny_model))
    with AgentRuntime(tmp_path / "new", tiny_model) as runtime, AgentRuntime(tmp_path / "same", tiny_model) as other:
        for session in (runtime.session("ops"), other.session("ops")):
            session.append_user("what it means")
        assert runtime.session("ops").reply(max_tokens=8).text == other.session("ops").reply(max_tokens=8).text


def test_an_export_of_an_import_has_the_same_content(made: Path, archive: Path, tmp_path: Path) -> None:
    import_session(tmp_path, archive, "other")
    export_session(tmp_path, "other", tmp_path / "again.tar")
    import_session(tmp_path, tmp_path / "again.tar", "third")
    assert content(tmp_path, "third") == content(tmp_path, "other") == content(made)
    again = members(tmp_path / "again.tar")
    assert [name for name, _ in again] == [name for name, _ in members(archive)]
    assert again[1:-1] == members(archive)[1:-1]


def test_names(made: Path, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(SessionExists, match='"ops" already exists'):
        import_session(made, archive)
    with pytest.raises(InvalidName):
        import_session(tmp_path, archive, "../ops")
    with pytest.raises(UnknownSession):
        export_session(made, "nothing", tmp_path / "x")
    with pytest.raises(StorageError, match="No such file"):
        import_session(tmp_path, tmp_path / "nothing")
    with pytest.raises(StorageError):
        export_session(made, "ops", tmp_path / "no" / "folder" / "x")
    assert list(tmp_path.iterdir()) == []


def test_through_pipes(made: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as file:
            write_archive(made, "ops", file)

    writer = threading.Thread(target=write)
    writer.start()
    with open(reading, "rb", buffering=0) as file:  # gives what is there
        read_archive(tmp_path, file)
    writer.join(30)
    assert content(tmp_path) == content(made)


def test_before_the_first_commit(tmp_path: Path) -> None:
    SessionStore.create(tmp_path, "new", {"model": "tiny"}).close()
    export_session(tmp_path, "new", tmp_path / "new.tar")
    info = import_session(tmp_path, tmp_path / "new.tar", "other")
    assert (info.messages, info.generation, info.model) == (0, 0, "tiny")


def test_beside_a_writer(root: Path, tmp_path: Path, tiny_model: LocalModel) -> None:
    made: list[Path] = []

    def export() -> None:
        for number in range(7):
            export_session(root, "ops", tmp_path / f"{number}.tar")
            made.append(tmp_path / f"{number}.tar")

    with AgentRuntime(root, tiny_model) as runtime, ThreadPoolExecutor(1) as pool:
        session = runtime.session("ops")
        exporting = pool.submit(export)
        while not exporting.done():  # a writer that never rests does not keep an export waiting
            session.append_tool_result("shell", "error 404 at 12:30, retry in 5 s\n")
            session.commit()
        exporting.result()
    counts = [import_session(tmp_path / "new", path, path.stem).messages for path in made]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert all(one.ok for one in check(tmp_path / "new"))


def test_a_session_that_is_rebuilt_meanwhile_is_not_mixed(root: Path, tmp_path: Path, tiny_model: LocalModel) -> None:
    rebuilt: list[int] = []

    def rebuild(size: int) -> None:
        if not rebuilt:
            with AgentRuntime(root, tiny_model) as runtime:
                rebuilt.append(runtime.rebuild("ops"))

    with pytest.raises(CorruptSession, match="was rebuilt while it was exported; export it again"):
        export_session(root, "ops", tmp_path / "ops.tar", progress=rebuild)
    assert {path.name for path in tmp_path.iterdir()} == {"root"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: flip(f / "segment-000000.kv", RECORDS + 9),
        lambda f: flip(next(f.glob("tail-*")), 500),
        lambda f: next(f.glob("tail-*")).unlink(),
        lambda f: (f / "segment-000001.kv").unlink(),
        lambda f: change(f, "UPDATE messages SET text = 'other' WHERE position = 2"),
        lambda f: change_generation(f, blocks=129),
    ],
)
def test_what_is_damaged_is_not_exported(root: Path, tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    folder = folder_of(root)
    spoil(folder)
    with pytest.raises(CorruptSession, match=rf'session "ops" is damaged \(sessions check says more\): {folder}/'):
        export_session(root, "ops", tmp_path / "ops.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"root"}


# -- archives that are not what they should be -------------------------------------------------------------------------

Member = tuple[tarfile.TarInfo, bytes]


def packed(path: Path, found: list[Member]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in found:
            info.size = len(data) if info.isreg() else info.size
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def unpacked(archive: Path) -> list[Member]:
    with tarfile.open(archive) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar.getmembers()]


def renamed(found: list[Member], at: int, name: str) -> None:
    found[at][0].name = name


def kind(found: list[Member], at: int, kind: bytes, link: str = "") -> None:
    info = found[at][0]
    info.type, info.linkname, info.size = kind, link, 0


def more(found: list[Member], at: int, name: str, data: bytes = b"x") -> None:
    found.insert(at, (tarfile.TarInfo(name), data))


def with_database(found: list[Member], tmp_path: Path, edit: Callable[[Path], object]) -> None:
    """As if an attacker had made the archive: the manifest fits."""
    (tmp_path / "session.db").write_bytes(found[0][1])
    edit(tmp_path)
    with closing(sqlite3.connect(tmp_path / "session.db")) as db:
        db.execute("PRAGMA journal_mode=DELETE")
    found[0] = (found[0][0], (tmp_path / "session.db").read_bytes())
    with_manifest(found, lambda manifest: None)
    (tmp_path / "session.db").unlink()


def with_manifest(found: list[Member], edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(found[-1][1])
    manifest["members"] = [
        {"name": info.name.removeprefix(PREFIX), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for info, data in found[:-1]
    ]
    edit(manifest)
    found[-1] = (found[-1][0], json.dumps(manifest).encode())


def session_row(folder: Path, **fields: Any) -> None:
    with closing(sqlite3.connect(folder / "session.db")) as db, db:
        row = dict(
            zip(
                ("name", "fingerprint", "created"),
                db.execute("SELECT name, fingerprint, created FROM session").fetchone(),
                strict=True,
            )
        )
        row |= fields
        db.execute(
            "UPDATE session SET name = ?, fingerprint = ?, created = ?, crc = ?",
            (*row.values(), checksum(*row.values())),
        )


def chunk_row(folder: Path, *row: int) -> None:
    change(folder, "UPDATE chunks SET start = ?, length = ?, count = ?, crc = ? WHERE start = 0", *row, checksum(*row))


def state_with(folder: Path, **fields: Any) -> None:
    with closing(sqlite3.connect(folder / "session.db")) as db:
        state = json.loads(db.execute("SELECT state FROM generation").fetchone()[0])
    change_generation(folder, state=json.dumps(state | fields))


HOSTILE: dict[str, Callable[[list[Member], Path], object]] = {
    "up and away": lambda f, t: renamed(f, 1, PREFIX + "../../../evil"),
    "absolute": lambda f, t: renamed(f, 1, "/tmp/evil"),
    "another name": lambda f, t: renamed(f, 2, PREFIX + "segment-000009.kv"),
    "twice": lambda f, t: f.insert(1, f[0]),
    "swapped": lambda f, t: f.insert(1, f.pop(2)),
    "symbolic link": lambda f, t: kind(f, 0, tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": lambda f, t: kind(f, 2, tarfile.LNKTYPE, PREFIX + "session.db"),
    "folder": lambda f, t: kind(f, 0, tarfile.DIRTYPE),
    "device": lambda f, t: kind(f, 1, tarfile.CHRTYPE),
    "fifo": lambda f, t: kind(f, 1, tarfile.FIFOTYPE),
    "sparse": lambda f, t: kind(f, 2, tarfile.GNUTYPE_SPARSE),
    "extended header": lambda f, t: renamed(f, 0, "x" * 300),
    "missing": lambda f, t: f.pop(2),
    "no manifest": lambda f, t: f.pop(),
    "more before the end": lambda f, t: more(f, -1, PREFIX + "segment-000002.kv"),
    "more after the end": lambda f, t: more(f, len(f), PREFIX + "more"),
    "shorter": lambda f, t: f.__setitem__(2, (f[2][0], f[2][1][:-4096])),
    "longer": lambda f, t: f.__setitem__(3, (f[3][0], f[3][1] + bytes(4096))),
    "empty": lambda f, t: f.clear(),
    "another file": lambda f, t: f.__setitem__(slice(None), [(tarfile.TarInfo("holiday.jpg"), b"x" * 999)]),
    "another format": lambda f, t: with_manifest(f, lambda m: m.update(format=2)),
    "other hash": lambda f, t: with_manifest(f, lambda m: m["members"][0].update(sha256="0" * 64)),
    "promised more": lambda f, t: with_manifest(f, lambda m: m["members"].append({"name": "x"})),
    "manifest is a list": lambda f, t: f.__setitem__(-1, (f[-1][0], b"[]")),
    "manifest is deep": lambda f, t: f.__setitem__(-1, (f[-1][0], b"[" * 100_000)),
    "manifest is none": lambda f, t: f.__setitem__(-1, (f[-1][0], b"\xff\xfe")),
    "no database": lambda f, t: f.__setitem__(0, (f[0][0], b"not a database" * 999)),
    "a trigger": lambda f, t: with_database(
        f, t, lambda d: change(d, "CREATE TRIGGER evil AFTER INSERT ON messages BEGIN DELETE FROM messages; END")
    ),
    "a view": lambda f, t: with_database(
        f,
        t,
        lambda d: [change(d, "DROP TABLE traces"), change(d, "CREATE VIEW traces AS SELECT * FROM messages")],
    ),
    "a computed column": lambda f, t: with_database(
        f, t, lambda d: change(d, "ALTER TABLE tokens ADD COLUMN evil GENERATED ALWAYS AS (zeroblob(999999999))")
    ),
    "another table": lambda f, t: with_database(f, t, lambda d: change(d, "CREATE TABLE evil (x)")),
    "a table less": lambda f, t: with_database(f, t, lambda d: change(d, "DROP TABLE traces")),
    "a name": lambda f, t: with_database(f, t, lambda d: session_row(d, name="../../evil")),
    "a name of another kind": lambda f, t: with_database(f, t, lambda d: session_row(d, name=b"ops")),
    "no fingerprint": lambda f, t: with_database(f, t, lambda d: session_row(d, fingerprint="[]")),
    "deep fingerprint": lambda f, t: with_database(f, t, lambda d: session_row(d, fingerprint="[" * 100_000)),
    "settings": lambda f, t: with_database(
        f, t, lambda d: session_row(d, fingerprint=json.dumps({"memory": {"block_size": 0}, "dtype": "float32"}))
    ),
    "a time": lambda f, t: with_database(f, t, lambda d: session_row(d, created=1e300)),
    "chunks without end": lambda f, t: with_database(f, t, lambda d: chunk_row(d, 0, 1, 10**15)),
    "chunks backwards": lambda f, t: with_database(f, t, lambda d: chunk_row(d, 0, -1, 1)),
    "the tail's name": lambda f, t: with_database(f, t, lambda d: state_with(d, tail="../../evil")),
    "the tail's kind": lambda f, t: with_database(f, t, lambda d: state_with(d, tail=7)),
    "the memory's length": lambda f, t: with_database(
        f, t, lambda d: state_with(d, memory={"length": 10**9, "blocks": 10**8})
    ),
    "a message that arrives": lambda f, t: with_database(f, t, lambda d: state_with(d, arriving={"role": 7})),
    "blocks": lambda f, t: with_database(f, t, lambda d: change_generation(d, blocks=10**12)),
    "tokens": lambda f, t: with_database(f, t, lambda d: change_generation(d, tokens=-1)),
    "a message": lambda f, t: with_database(f, t, lambda d: change(d, "UPDATE messages SET text = x'00'")),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_archives_are_refused(archive: Path, tmp_path: Path, how: str) -> None:
    found = unpacked(archive)
    HOSTILE[how](found, tmp_path)
    path = packed(tmp_path / "evil.tar", found)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InfLLMError) as refused:
        import_session(tmp_path / "root", path)
    assert isinstance(refused.value, CorruptSession | InvalidName)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    assert_nothing_new(tmp_path, before)


def assert_nothing_new(tmp_path: Path, before: set[Path]) -> None:
    new = {path.relative_to(tmp_path) for path in set(tmp_path.rglob("*")) - before}
    assert new <= {Path("root"), Path("root/sessions")}


def test_another_version_says_so(archive: Path, tmp_path: Path) -> None:
    found = unpacked(archive)
    for info, _ in found:
        info.name = info.name.replace("session-1", "session-2")
    with pytest.raises(StorageError, match=r"another version \(format 2\); upgrade"):
        import_session(tmp_path / "root", packed(tmp_path / "next.tar", found))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_and_flipped_archives_are_refused(archive: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = archive.read_bytes()
    if data.draw(st.booleans()):
        spoiled = raw[: data.draw(st.integers(0, len(raw) - 1025))]
    else:
        at = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 2000))
        spoiled = raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :]
    try:
        read_archive(tmp_path, io.BytesIO(spoiled), "ops")
    except (CorruptSession, StorageError):
        assert Catalog(tmp_path).list() == []
    else:  # it was in what tar leaves unused
        assert content(tmp_path)["files"] == expected_files(archive)
        Catalog(tmp_path).delete("ops")
    assert list((tmp_path / "sessions").iterdir()) == []


def expected_files(archive: Path) -> dict[str, str]:
    manifest = json.loads(members(archive)[-1][1])
    return {one["name"]: one["sha256"] for one in manifest["members"][1:]}


# -- killed ------------------------------------------------------------------------------------------------------------


def test_an_import_that_is_killed_at_any_step_is_not_there_or_whole(archive: Path, tmp_path: Path) -> None:
    outcomes = []
    for step in range(1, 100):
        root = tmp_path / str(step)
        killed = killed_at(step, lambda root=root: import_session(root, archive))  # type: ignore[misc]
        names = [info.name for info in Catalog(root).list()]
        assert names in ([], ["ops"])
        outcomes.append(bool(names))
        folders = [path.name for path in (root / "sessions").iterdir()] if (root / "sessions").exists() else []
        assert len(folders) == len(names)
        assert not names or all(one.ok for one in check(root))
        if not killed:
            break
    import_session(tmp_path / "3", archive)
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 5


def test_an_export_that_is_killed_leaves_the_file_as_it_was(made: Path, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "ops.tar"
    path.write_bytes(b"the one of yesterday")
    for step in range(1, 20):
        killed = killed_at(step, lambda: export_session(made, "ops", path))
        assert path.read_bytes() in (b"the one of yesterday", archive.read_bytes())
        if not killed:
            break
    assert path.read_bytes() == archive.read_bytes()
    assert step > 2


def test_an_import_under_way_is_left_alone(archive: Path, tmp_path: Path) -> None:
    class Slow(io.BytesIO):
        """Others look at the root while it is read."""

        def read(self, size: int | None = -1) -> bytes:
            assert Catalog(tmp_path).list() == []
            return super().read(size)

    read_archive(tmp_path, Slow(archive.read_bytes()))
    assert [info.name for info in Catalog(tmp_path).list()] == ["ops"]


# -- from Python and on the command line -------------------------------------------------------------------------------


def test_from_a_runtime(root: Path, tmp_path: Path, tiny_model: LocalModel) -> None:
    with AgentRuntime(root, tiny_model) as runtime:
        session = runtime.session("ops")
        session.append_user("not committed yet")
        session.export(tmp_path / "ops.tar")
        assert runtime.import_session(tmp_path / "ops.tar", "again").messages == session.message_count
        assert runtime.session("again").messages()[-1].text == "not committed yet"


def test_the_commands(cli: Cli, tmp_path: Path) -> None:
    cli("ingest", "ops", *("--n-local", "32", "--block-size", "4"), stdin=b"error 404 at 12:30, retry in 5 s\n" * 20)
    path = tmp_path / "ops.tar"
    done = cli("sessions", "export", "ops", str(path), "--json").json
    assert done == {"session": "ops", "file": str(path), "bytes": path.stat().st_size}
    assert cli("sessions", "export", "ops", str(path)).out == f"ops: {path.stat().st_size:,} bytes in {path}\n"
    assert "already exists" in cli("sessions", "import", str(path)).error
    made = cli("sessions", "import", str(path), "--name", "again", "--json").json
    listed = {info.pop("name"): info for info in cli("sessions", "list", "--json").json}
    assert made.pop("name") == "again"
    assert made == listed["again"]
    piped = cli("sessions", "import", "-", "--name", "piped", stdin=path.read_bytes())
    assert piped.out.startswith("piped: 1 message, ")
    assert cli("ask", "piped", "why?", "--max-tokens", "2").out == cli("ask", "ops", "why?", "--max-tokens", "2").out
    assert "session.db should be" in cli("sessions", "import", "-", "--name", "no", stdin=b"x" * 600).error
    assert cli("sessions", "import", str(tmp_path / "nothing")).error.endswith("No such file or directory")
    assert cli("sessions", "export", "nothing", str(path)).error.startswith('error: no session "nothing"')
    assert "without --json" in cli("sessions", "export", "ops", "-", "--json").error
