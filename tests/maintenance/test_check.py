"""``sessions check``: damage of every kind is found and named; what can be put right is, to the bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import stat
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import Cli
from upkeep import (
    FORK,
    KEYS,
    RECORDS,
    SHAPE,
    SMALL,
    change,
    change_generation,
    flip,
    folder_of,
    killed_at,
    make,
    next_logits,
    talk,
)

from infllm_agent import AgentRuntime
from infllm_agent.blocks.segments import SEGMENT_BLOCKS
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import Cancelled, CorruptSession, SessionLocked, SessionMismatch
from infllm_agent.maintenance.check import Checked, Cure, check
from infllm_agent.memory import snapshot
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.rows import checksum
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.storage.tail import write_tail

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tiny_model: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "root"
    make(root, tiny_model)
    return root


@pytest.fixture(scope="module")
def expected(made: Path, tiny_model: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    copy = tmp_path_factory.mktemp("expected") / "root"
    shutil.copytree(made, copy)
    return next_logits(copy, tiny_model)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def problems(found: list[Checked]) -> list[tuple[str, Cure]]:
    return [(problem.what, problem.cure) for one in found for problem in one.problems]


def history(root: Path) -> tuple[Any, ...]:
    with SessionStore.open(root, "ops", readonly=True) as store:
        return store.messages(), store.token_ids(), store.chunks(), len(store.traces())


def tail(folder: Path) -> Path:
    (found,) = folder.glob("tail-*")
    return found


def other_tail(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """A tail whose bytes are as they were written, but are not what a memory has."""
    with SessionStore.open(folder.parent.parent, "ops", readonly=True) as store:
        state = store.state
    assert state is not None
    tensors = safetensors.torch.load(tail(folder).read_bytes())
    change(tensors)
    data = safetensors.torch.save(tensors)
    tail(folder).write_bytes(data)
    change_generation(folder, state=json.dumps(state | {"tail_crc": zlib.crc32(data)}))


def shorter(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


MEMORY = {
    "keys of block 3": (
        lambda f: flip(f / "segment-000000.kv", RECORDS + 3 * SHAPE.stride + 100),
        r"000000\.kv: block 3, layer 0: keys .*fail their checksum",
    ),
    "last block": (
        lambda f: flip(f / "segment-000001.kv", RECORDS + 5 * SHAPE.stride + SHAPE.place(5)),
        rf"000001\.kv: block {SEGMENT_BLOCKS + 5}, layer 2: values .*fail their checksum",
    ),
    "a key for the lookup": (lambda f: flip(f / "segment-000000.kv", KEYS + 7), r"000000\.kv: the keys of its blocks"),
    "a checksum": (
        lambda f: flip(f / "segment-000000.kv", RECORDS + SHAPE.plane_bytes(0)),
        r"000000\.kv: block 0, layer 0: keys",
    ),
    "a header": (lambda f: flip(f / "segment-000001.kv", 20), r"000001\.kv: its head is damaged"),
    "cut short": (lambda f: shorter(f / "segment-000000.kv"), r"000000\.kv: cut off at"),
    "missing": (lambda f: (f / "segment-000000.kv").unlink(), r"000000\.kv: No such file"),
    "swapped": (
        lambda f: shutil.copyfile(f / "segment-000000.kv", f / "segment-000001.kv"),
        r"000001\.kv: its head is damaged, or it is a file of another session",
    ),
    "tail": (lambda f: flip(tail(f), 500), r"tail-\w+\.safetensors: fails its checksum"),
    "tail missing": (lambda f: tail(f).unlink(), r"tail-\w+\.safetensors: No such file"),
    "tail lacks": (
        lambda f: other_tail(f, lambda t: t.pop("layer.1.v")),
        r"session\.db is damaged: its state \(KeyError",
    ),
    "tail is short": (
        lambda f: other_tail(f, lambda t: t.update({"layer.1.k": t["layer.1.k"][:, 1:].contiguous()})),
        r"tail-\w+\.safetensors: holds other tensors",
    ),
    "tail has more": (
        lambda f: other_tail(f, lambda t: t.update({"layer.1.w": torch.zeros(2)})),
        r"tail-\w+\.safetensors: holds other tensors",
    ),
    "marks": (
        lambda f: other_tail(f, lambda t: t.update({"segments.ids": t["segments.ids"][1:].contiguous()})),
        r"the tail names 1 segments, but there are \d+ blocks",
    ),
    "kind of marks": (
        lambda f: other_tail(f, lambda t: t.update({"segments.ids": t["segments.ids"].to(torch.int64)})),
        r"tail-\w+\.safetensors: holds other tensors",
    ),
    "blocks": (lambda f: change_generation(f, blocks=69), r"session\.db is damaged: its state is of .* 69 blocks"),
    "tail elsewhere": (
        lambda f: change_generation(f, state=json.dumps(state_of(f) | {"tail": "../../x"})),
        r"session\.db is damaged: its tail is called '\.\./\.\./x'",
    ),
    "no state": (lambda f: change_generation(f, state=None), r"session\.db is damaged: its state \(KeyError"),
}

LOG = {
    "text": (lambda f: change(f, "UPDATE messages SET text = 'other' WHERE position = 2"), "message 2"),
    "message gone": (lambda f: change(f, "DELETE FROM messages WHERE position = 1"), "message 2"),
    "last message gone": (
        lambda f: change(f, "DELETE FROM messages WHERE position = (SELECT max(position) FROM messages)"),
        "its rows reach messages",
    ),
    "tokens": (lambda f: change(f, "UPDATE tokens SET ids = zeroblob(length(ids)) WHERE start = 0"), "token ids at 0"),
    "tokens gone": (lambda f: change(f, "DELETE FROM tokens WHERE start = 0"), "token ids at"),
    "chunk": (lambda f: change(f, "UPDATE chunks SET length = length + 1 WHERE start = 0"), "chunk boundaries at 0"),
    "last chunk gone": (
        lambda f: change(f, "DELETE FROM chunks WHERE start = (SELECT max(start) FROM chunks)"),
        "its rows reach chunk_end",
    ),
    "trace": (lambda f: change(f, "UPDATE traces SET head = '{}'"), "the trace of answer 1"),
    "generation": (lambda f: change(f, "UPDATE generation SET tokens = tokens + 1"), "its last generation"),
    "name": (lambda f: change(f, "UPDATE session SET name = 'other'"), "its name and fingerprint"),
    "garbage": (lambda f: (f / "session.db").write_bytes(random.Random(0).randbytes(9000)), "not a database"),
    "missing": (lambda f: (f / "session.db").unlink(), "is missing"),
    "a page": (lambda f: (f / "session.db").write_bytes((f / "session.db").read_bytes()[:-4096]), "session.db is dam"),
}


def state_of(folder: Path) -> dict[str, Any]:
    with SessionStore.open(folder.parent.parent, "ops", readonly=True) as store:
        return dict(store.state or {})


def test_what_is_whole_is_ok(root: Path) -> None:
    read: list[int] = []
    found = list(check(root, read=read.append))
    assert [(one.name, one.ok, one.read_only) for one in found] == [(None, True, False), ("ops", True, False)]
    (info,) = Catalog(root).list()
    assert sum(read) == info.blocks * SHAPE.stride
    assert info.blocks > SEGMENT_BLOCKS
    before = {path: path.read_bytes() for path in folder_of(root).iterdir() if path.suffix in (".kv", ".safetensors")}
    list(check(root, repair=True))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("damage", MEMORY)
def test_damage_of_the_memory_is_found(root: Path, damage: str) -> None:
    spoil, says = MEMORY[damage]
    spoil(folder_of(root))
    ((what, cure),) = problems(list(check(root, repair=True)))
    assert re.search(says, what.removesuffix(" (the blocks were not read)")), what
    assert what.startswith(str(root))
    assert cure is Cure.REBUILD


@pytest.mark.parametrize(
    "damages", [["keys of block 3", "missing"], ["tail missing"], ["no state", "last block"], ["cut short", "blocks"]]
)
def test_damage_of_the_memory_is_undone(
    root: Path, tiny_model: LocalModel, expected: torch.Tensor, damages: list[str]
) -> None:
    before = history(root)
    for damage in damages:
        MEMORY[damage][0](folder_of(root))
    told: list[tuple[int, int]] = []
    with AgentRuntime(root, tiny_model) as runtime:
        runtime.rebuild("ops", progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 500
    assert all(one.ok for one in check(root))
    assert history(root) == before
    assert torch.equal(next_logits(root, tiny_model), expected)


@pytest.mark.parametrize("damage", LOG)
def test_damage_of_the_log_is_found_and_not_hidden(root: Path, tiny_model: LocalModel, damage: str) -> None:
    spoil, says = LOG[damage]
    folder = folder_of(root)
    spoil(folder)
    before = sorted(path.name for path in folder.iterdir())
    found = problems(list(check(root, repair=True)))
    assert found
    assert all(cure is Cure.RESTORE and what.startswith(str(folder / "session.db")) for what, cure in found), found
    assert any(says in what for what, _ in found), found
    assert {path.name for path in folder.iterdir()} >= set(before) - {"session.db-wal", "session.db-shm"}
    with AgentRuntime(root, tiny_model) as runtime, pytest.raises(CorruptSession):
        runtime.rebuild("ops")


def leftover(folder: Path) -> None:
    (folder / "rebuilt-00000000000000000000000000000000").mkdir()
    for name in ("tail-00000000000000000000000000000000.safetensors", "segment-000002.kv", "segment-000009.kv"):
        (folder / name).write_bytes(b"x")
    (folder / "rebuilt-00000000000000000000000000000000" / "segment-000000.kv").write_bytes(b"x")


def loose(folder: Path) -> None:
    folder.chmod(0o755)
    tail(folder).chmod(0o644)
    (folder / "lock").chmod(0o640)
    (folder.parent.parent / "catalog.db").chmod(0o666)
    folder.parent.chmod(0o711)


def wrong_catalogue(folder: Path) -> None:
    with closing(sqlite3.connect(folder.parent.parent / "catalog.db")) as db, db:
        db.execute("UPDATE sessions SET messages = 99")


@pytest.mark.parametrize(
    ("spoil", "count", "says"),
    [
        (leftover, 4, "no commit refers to it"),
        (loose, 5, "its mode is 0"),
        (lambda f: (f.parent.parent / "catalog.db").write_bytes(b"no database" * 999), 1, "catalog.db is damaged"),
        (wrong_catalogue, 1, 'catalog.db: says of session "ops"'),
        (
            lambda f: change(f, "INSERT INTO messages_fts (messages_fts, rowid, text) VALUES ('delete', 0, 'the')"),
            1,
            "session.db is damaged",
        ),
        (lambda f: change(f, "DELETE FROM messages_fts_data WHERE id > 10"), 1, "session.db is damaged"),
    ],
    ids=["leftovers", "modes", "catalogue", "wrong catalogue", "search index", "search index gone"],
)
def test_repair_needs_no_model(
    root: Path, tiny_model: LocalModel, expected: torch.Tensor, spoil: Callable[[Path], None], count: int, says: str
) -> None:
    folder, before = folder_of(root), history(root)
    SessionStore.open(root, "ops").close()
    kept = {path.name for path in folder.iterdir()}
    spoil(folder)
    found = problems(list(check(root)))
    assert [says in what and cure is Cure.REPAIR for what, cure in found] == [True] * count, found
    if "catalog.db" in says:  # whoever opens a session for writing puts that right
        spoil(folder)
    repaired = list(check(root, repair=True))
    assert sum(len(one.repaired) for one in repaired) == count
    for one in (*repaired, *check(root)):
        assert one.ok, one.problems
    assert {path.name for path in folder.iterdir()} == kept
    for path in (folder, *folder.iterdir(), folder.parent, root / "catalog.db"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert history(root) == before
    with SessionStore.open(root, "ops", readonly=True) as store:
        assert [m.index for m in store.search("printed")] == [0]
    assert torch.equal(next_logits(root, tiny_model), expected)


def test_what_is_not_ours_is_left_where_it_is(root: Path) -> None:
    folder = folder_of(root)
    strange = [folder / "notes.txt", folder / "segment-000001.kv.bak", folder.parent / "readme"]
    for path in strange:
        path.write_bytes(b"mine")
        path.chmod(0o600)
    found = problems(list(check(root, repair=True)))
    assert sorted(what.split(":")[0] for what, _ in found) == sorted(map(str, strange))
    assert {cure for _, cure in found} == {Cure.MOVE}
    assert all(path.read_bytes() == b"mine" for path in strange)


def test_beside_a_writer_there_are_no_false_alarms(root: Path, tiny_model: LocalModel) -> None:
    found: list[Checked] = []

    def look() -> None:
        while len(found) < 6:
            found.extend(check(root, ["ops"], repair=True))

    with AgentRuntime(root, tiny_model) as runtime, ThreadPoolExecutor(1) as pool:
        session = runtime.session("ops")
        leftover(session.store.folder)
        looking = pool.submit(look)
        commits = 0
        while commits < 20 or not looking.done():
            commits += 1
            session.append_tool_result("shell", "error 404 at 12:30, retry in 5 s\n")
            session.commit()
        looking.result()
        assert all(one.read_only for one in found)
        assert all(one.ok for one in found), problems(found)
        flip(session.store.folder / "segment-000000.kv", RECORDS + 9)
        assert [cure for _, cure in problems(list(check(root, ["ops"])))] == [Cure.REBUILD]
        with pytest.raises(SessionLocked):
            runtime.rebuild("ops")
        flip(session.store.folder / "segment-000000.kv", RECORDS + 9)
    left = problems(list(check(root)))  # commits have removed the tail and used the number of a segment
    assert [(what.split("/")[-1][:10], cure) for what, cure in left] == [
        ("rebuilt-00", Cure.REPAIR),
        ("segment-00", Cure.REPAIR),
    ]


def test_a_session_that_is_rebuilt_meanwhile_is_no_problem(root: Path, tiny_model: LocalModel) -> None:
    rebuilt: list[int] = []

    def rebuild(size: int) -> None:
        if not rebuilt:
            with AgentRuntime(root, tiny_model) as runtime:
                rebuilt.append(runtime.rebuild("ops"))

    assert all(one.ok for one in check(root, read=rebuild))
    assert rebuilt


def test_a_session_that_is_deleted_meanwhile_is_no_problem(root: Path) -> None:
    def delete(size: int) -> None:
        if Catalog(root).find("ops"):
            Catalog(root).delete("ops")

    assert [one.name for one in check(root, read=delete)] == [None]


def test_two_folders_of_one_name(root: Path) -> None:
    folder = folder_of(root)
    shutil.copytree(folder, folder.with_name("0" * 32))
    found = problems(list(check(root)))
    assert len(found) == 2
    assert all("several folders" in what and cure is Cure.OTHER for what, cure in found)


def test_a_session_of_another_format_is_told_apart(root: Path) -> None:
    folder = folder_of(root)
    with SessionStore.open(root, "ops", readonly=True) as store:
        name, created, fingerprint = store.name, store.created, json.dumps(store.fingerprint | {"format": 1})
    change(folder, "UPDATE session SET fingerprint = ?, crc = ?", fingerprint, checksum(name, fingerprint, created))
    ((what, cure),) = problems(list(check(root, repair=True)))
    assert what.startswith(f"{folder}/session.db: a session of format 1, of which this version can only read")
    assert cure is Cure.OTHER


def test_blocks_that_are_rounded_are_rebuilt_the_same(tmp_path: Path, tiny_model: LocalModel) -> None:
    for settings in (SMALL.changed(block_dtype="int8"), SMALL.changed(block_key="representatives")):
        root = tmp_path / settings.block_key
        with AgentRuntime(root, tiny_model, settings) as runtime:
            talk(runtime.session("ops"), 20)
        logits = next_logits(root, tiny_model)
        assert all(one.ok for one in check(root))
        flip(folder_of(root) / "segment-000000.kv", -2000)
        tail(folder_of(root)).unlink()
        with AgentRuntime(root, tiny_model) as runtime:
            runtime.rebuild("ops")
        assert all(one.ok for one in check(root))
        assert torch.equal(next_logits(root, tiny_model), logits)


def test_rebuilding_is_for_the_model_that_made_the_session(root: Path, tiny_model: LocalModel) -> None:
    with AgentRuntime(root, tiny_model, SMALL.changed(topk=2)) as runtime, pytest.raises(SessionMismatch, match="topk"):
        runtime.rebuild("ops")


def test_a_rebuild_that_is_stopped_changes_nothing(root: Path, tiny_model: LocalModel) -> None:
    folder = folder_of(root)
    flip(folder / "segment-000000.kv", RECORDS + 9)
    before = {path.name for path in folder.iterdir()}
    asked = iter([False] * 20)
    with AgentRuntime(root, tiny_model) as runtime, pytest.raises(Cancelled):
        runtime.rebuild("ops", cancelled=lambda: next(asked, True))
    assert {path.name for path in folder.iterdir()} == before
    assert [cure for _, cure in problems(list(check(root)))] == [Cure.REBUILD]


def test_a_rebuild_that_is_killed_at_any_step_is_as_before_or_done(
    made: Path, tmp_path: Path, tiny_model: LocalModel, expected: torch.Tensor
) -> None:
    spoiled = Path(shutil.copytree(made, tmp_path / "spoiled"))
    folder = folder_of(spoiled)
    flip(folder / "segment-000000.kv", RECORDS + 9)
    (folder / "segment-000001.kv").unlink()
    damage = [what.replace(str(spoiled), "") for what, _ in problems(list(check(spoiled)))]
    outcomes = []
    for step in range(1, 100):
        root = Path(shutil.copytree(spoiled, tmp_path / str(step)))

        def work(root: Path = root) -> None:
            with AgentRuntime(root, tiny_model) as runtime:
                runtime.rebuild("ops")

        killed = killed_at(step, work)
        repaired = problems(list(check(root, repair=True)))
        assert [what.replace(str(root), "") for what, _ in repaired] in (damage, [])
        if not repaired and outcomes[-1] is False:
            assert torch.equal(next_logits(root, tiny_model), expected)
        outcomes.append(not repaired)
        shutil.rmtree(root)
        if not killed:
            break
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 5
    assert outcomes.count(True) > 4


def test_a_session_before_its_first_commit(tmp_path: Path, tiny_model: LocalModel) -> None:
    with AgentRuntime(tmp_path, tiny_model, SMALL) as runtime:
        runtime.session("new").store.close()
        runtime.drop("new")
    assert all(one.ok for one in check(tmp_path))
    (folder_of(tmp_path, "new") / "segment-000000.kv").write_bytes(b"of a first commit that was killed")
    (folder_of(tmp_path, "new") / "segment-000000.kv").chmod(0o600)
    assert [cure for _, cure in problems(list(check(tmp_path)))] == [Cure.REPAIR]


def test_forks_keep_what_they_share(root: Path, tiny_model: LocalModel) -> None:
    with AgentRuntime(root, tiny_model) as runtime:
        runtime.fork("ops", "fork")
    segment = folder_of(root) / "segment-000000.kv"
    assert segment.stat().st_nlink == 2
    flip(segment, RECORDS + 9)
    assert [one.name for one in check(root) if not one.ok] == ["fork", "ops"]
    with AgentRuntime(root, tiny_model) as runtime:
        runtime.rebuild("ops")
    assert [one.name for one in check(root) if not one.ok] == ["fork"]


def test_files_are_private_whatever_the_umask(tmp_path: Path, tiny_model: LocalModel) -> None:
    def work() -> None:
        os.umask(0)
        root = tmp_path / "root"
        make(root, tiny_model)
        with AgentRuntime(root, tiny_model) as runtime:
            runtime.fork("ops", "fork")
            runtime.session("ops").export(tmp_path / "ops.tar")
            runtime.import_session(tmp_path / "ops.tar", "again")
            runtime.release("ops")
            runtime.rebuild("ops")
        os._exit(7)

    process = FORK.Process(target=work)
    process.start()
    process.join(30)
    assert process.exitcode == 7
    assert stat.S_IMODE((tmp_path / "ops.tar").stat().st_mode) == 0o600
    found = [tmp_path / "root", *(tmp_path / "root").rglob("*")]
    assert len(found) > 12
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert all(one.ok for one in check(tmp_path / "root"))


# -- on the command line -----------------------------------------------------------------------------------------------


def test_the_command(cli: Cli) -> None:
    assert cli("sessions", "check").out == "no sessions\n"
    cli("ingest", "ops", *("--n-local", "32", "--block-size", "4"), stdin=b"error 404 at 12:30, retry in 5 s\n" * 40)
    assert cli("sessions", "check").out == "ops: ok\n"
    folder = folder_of(cli.root)
    leftover(folder)
    result = cli("sessions", "check", "--json")
    assert result.code == 1
    told = json.loads(result.out)
    assert (told["ok"], len(told["errors"]), told["sessions"][0]["name"]) == (False, 4, "ops")
    assert told["sessions"][0]["problems"][0]["cure"] == "run sessions check --repair"
    assert cli("sessions", "check", "ops").error == "4 problems"
    result = cli("sessions", "check", "--repair")
    assert result.code == 0
    assert result.out.count("put right: ") == 4
    flip(folder / "segment-000000.kv", RECORDS + 9)
    result = cli("sessions", "check", "--repair")
    assert result.code == 1
    says = rf"    {folder}/segment-000000\.kv: block \d+, .*fail their checksum: run sessions check --rebuild\n"
    assert re.search(says, result.out)
    assert cli("sessions", "check", "ops", "--rebuild", "--model", "./nothing").code == 1
    done = cli("sessions", "check", "--rebuild", "--json").json
    assert done["ok"]
    assert "segment-000000.kv" in done["repaired"][0]
    assert cli("sessions", "check").out == "ops: ok\n"
    assert cli("ask", "ops", "why?", "--max-tokens", "2").code == 0
    assert cli("sessions", "check", "nothing").error.startswith('error: no session "nothing"')
    assert cli("sessions", "check", "a/b").code == 2
    with SessionStore.open(cli.root, "ops"):
        assert cli("sessions", "check").out.startswith("ops: ok (not locked, as another process has it open")


@pytest.mark.parametrize("damage", [None, [5, 4], [10**6], [-1, 3]])
def test_a_session_that_has_just_answered(tmp_path: Path, tiny_model: LocalModel, damage: list[int] | None) -> None:
    """Its tail has the candidates among which the next token would choose."""
    config = MemoryConfig(n_init=4, n_local=32, block_size=8, topk=4, candidates=8, chunk_size=32, max_cached_block=8)
    with AgentRuntime(tmp_path, tiny_model, config) as runtime:
        session = runtime.session("ops")
        for _ in range(20):
            session.append_tool_result("shell", "error 404 at 12:30, retry in 5 s\n")
        session.append_user("What was the error?")
        kept = 0
        for tokens in (3, 5):
            session.reply(max_tokens=tokens)
            session.commit()
            held = [layer.candidates for layer in session.memory.state().layers.values()]
            kept += sum(candidates is not None for candidates in held)
            assert all(one.ok for one in check(tmp_path))
        assert kept  # of the two lengths one at least is such
        folder = session.store.folder
        if damage is not None:
            state = session.memory.state()
            layers = {
                number: layer._replace(candidates=torch.tensor(damage, dtype=torch.int32))
                for number, layer in state.layers.items()
            }
            tensors, record = snapshot.pack(replace(state, layers=layers), config, session.memory.store.files.marks)
            name, crc = write_tail(folder, tensors)
            session.store.commit(
                messages=(),
                token_ids=(),
                chunks=(),
                state={"memory": record, "tail": name, "tail_crc": crc},
                bytes_on_disk=0,
                blocks=session.memory.store.count,
            )
            assert "holds other tensors" in problems(list(check(tmp_path)))[0][0]
