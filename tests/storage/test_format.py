"""docs/format.md is what is on disk: stored sessions are read by its rules alone (``stored_format``)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import stored_format as rules
from load_example import load_module

from infllm_agent import AgentRuntime
from infllm_agent.integrations.server.response_store import KeptResponses, Key
from infllm_agent.maintenance.archive import export_session
from infllm_agent.maintenance.bucket import Bucket
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.database import CATALOG_SCHEMA, SESSION_SCHEMA, connect
from infllm_agent.tools import ToolCall, ToolSpec

DATA = Path(__file__).resolve().parents[1] / "data"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return load_module(DATA / "make_session.py")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(DATA / "session-0.1.tar.xz") as tar:
        tar.extractall(folder, filter="tar")
    return folder


@pytest.fixture(scope="module")
def fresh(unpacked: Path, maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that today's code has written."""
    root = tmp_path_factory.mktemp("fresh") / "root"
    model: LocalModel = maker.load(unpacked / "model")
    sizes = maker.MEMORY.changed(block_key="representatives", lookup="similarity", candidates=0)
    for name, memory in (("exact", maker.MEMORY), ("rounded", sizes.changed(block_dtype="int8"))):
        with AgentRuntime(root, model, memory) as runtime:
            session = runtime.session(name)
            session.trace = "on"
            session.append_system("brief", tools=[ToolSpec("ask", "Asks.", {})])
            session.append_assistant("é", calls=[ToolCall("ask", {"ü": [1.5, None]}, None)])
            session.append_user("error 404 at 12:30; " * 8)
            session.commit()
            session.reply(max_tokens=3)
            session.commit()
    with AgentRuntime(root, model, maker.MEMORY) as runtime:
        runtime.session("empty").commit()
        stored = runtime.session("exact")
        stored.fork("fork").close()
    KeptResponses(root).keep(Key(Catalog(root).require("exact"), 4), {"id": "r"}, lambda: ())
    return root


def folder_of(root: Path, name: str) -> Path:
    return root / "sessions" / Catalog(root).require(name)


def test_the_stored_old_sessions(unpacked: Path) -> None:
    found = rules.read_root(unpacked / "root")
    assert found.keys() == {"old", "old.b2", "rounded"}
    old = found["old"]
    assert old.generation["blocks"] > 128
    assert [message["role"] for message in old.messages[:5]] == ["system", "user", "observation", "assistant", "tool"]
    assert old.messages[0]["tools"][0]["name"] == "weather"
    assert old.messages[3]["calls"] == [{"name": "weather", "arguments": {"city": "Zürich", "days": 2}, "id": "call-1"}]
    assert [trace["answer"] for trace in old.traces] == [5]
    assert "arriving" in json.loads(old.generation["state"])
    shared = found["old.b2"]
    assert (shared.keys[:128], shared.planes[:128]) == (old.keys[:128], old.planes[:128])
    assert shared.tokens == old.tokens[: len(shared.tokens)]


def test_fresh_sessions(fresh: Path) -> None:
    found = rules.read_root(fresh)
    assert found.keys() == {"exact", "rounded", "empty", "fork"}
    assert all(found[name].planes and found[name].traces for name in ("exact", "rounded", "fork"))
    assert any(name.endswith(".q") for name in found["rounded"].tail)
    assert found["empty"].tokens == []
    (kept,) = (fresh / "responses").glob("*/*.json")
    assert json.loads(kept.read_text()) == {"id": "r"}


def test_the_page_has_every_table_and_column(tmp_path: Path) -> None:
    for name, schema in (("session.db", SESSION_SCHEMA), ("catalog.db", CATALOG_SCHEMA)):
        connect(tmp_path / name, schema, create=True).close()
        rules.read_database(tmp_path / name, name, schema.name)


def test_a_bucket(fresh: Path, tmp_path: Path) -> None:
    root, bucket = Path(shutil.copytree(fresh, tmp_path / "root")), tmp_path / "bucket"
    Bucket(f"file://{bucket}").publish(root, "exact")
    folder = folder_of(root, "exact")
    origin = json.loads((folder / "origin.json").read_bytes())
    assert origin.keys() == {row[0].strip("`") for row in rules.rows("origin.json")}
    stored = rules.read_session(folder)
    files = [path for path in bucket.rglob("*") if path.is_file()]
    rules.expect_named([path.relative_to(bucket).as_posix() for path in files], "A bucket")
    digest = hashlib.sha256(b"exact").hexdigest()[:32]
    (manifest,) = (bucket / "sessions" / digest).glob("*.json")
    text, crc = manifest.read_bytes().rsplit(b"\n", 1)
    assert crc == b"%08x" % zlib.crc32(text)
    told = json.loads(text)
    assert list(told) == sorted(told)
    assert told.keys() <= rules.words("A bucket")
    assert (told["id"], told["parts"]) == (origin["base"], origin["parts"])
    for kind, digest_ in zip(("db", "tail"), told["digests"], strict=True):
        data = manifest.with_name(f"{told['id']}.{kind}").read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest_
    (segment, ((first, stop, id),)) = next(iter(told["parts"].items()))
    part = (bucket / "segments" / segment / f"{first}-{stop}-{id}").read_bytes()
    assert part.startswith(b"".join(stored.keys[first:stop]) + stored.planes[first][0])


def test_an_archive(fresh: Path, tmp_path: Path) -> None:
    path = tmp_path / "exact.tar"
    export_session(fresh, "exact", path)
    with tarfile.open(path, "r:") as tar:
        data = {member.name: opened.read() for member in tar if (opened := tar.extractfile(member))}
    folder, name = next(iter(data)).split("/")
    assert (folder, name) == ("infllm-session-1", "session.db")
    told = json.loads(data.pop(f"{folder}/manifest.json"))
    assert told.keys() <= rules.words("An archive")
    assert [f"{folder}/{member['name']}" for member in told["members"]] == list(data)
    for member, found in zip(told["members"], data.values(), strict=True):
        assert (member["size"], member["sha256"]) == (len(found), hashlib.sha256(found).hexdigest())
    unpacked = tmp_path / "unpacked"
    os.mkdir(unpacked)
    for name, found in data.items():
        (unpacked / name.partition("/")[2]).write_bytes(found)
    exported, there = (rules.read_session(folder) for folder in (unpacked, folder_of(fresh, "exact")))
    assert (exported.planes, exported.tail, exported.messages) == (there.planes, there.tail, there.messages)
