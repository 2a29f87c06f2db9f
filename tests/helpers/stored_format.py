"""Stored sessions read by the rules of docs/format.md alone: nothing of the package is used here.

What a table of the page says of names is read from the page; what its text says is written here. Everything that does
not fit is an AssertionError.
"""

from __future__ import annotations

import json
import re
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
TAIL_DTYPES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1}


# -- the page --------------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """The page's text under each heading, by ``heading`` or ``heading/heading below``."""
    found: dict[str, str] = {}
    above = ""
    for part in re.split(r"^(?=##+ )", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        line, _, text = part.partition("\n")
        marks, _, title = line.partition(" ")
        above = title if marks == "##" else above
        found[title if marks == "##" else f"{above}/{title}"] = text
    return found


def rows(section: str) -> list[list[str]]:
    """The rows of a section's first table, without its head."""
    parts = sections()[section].strip().split("\n\n")
    lines = next(part for part in parts if part.startswith("| ")).splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[2:]]


def words(section: str) -> set[str]:
    """What stands in a section as code."""
    return set(re.findall(r"`([^`]+)`", sections()[section]))


def columns(section: str) -> dict[str, str]:
    """The columns of a database's table, with their types."""
    return {row[0].strip("`"): row[1] for row in rows(section)}


def tables(database: str) -> dict[str, dict[str, str]]:
    return {
        name.partition("/")[2]: columns(name)
        for name, text in sections().items()
        if name.startswith(f"{database}/") and "| column | type |" in text
    }


def patterns(section: str) -> list[re.Pattern[str]]:
    """The names in the first column of a table, ``<...>`` being what it says."""
    kinds = {"id": "[0-9a-f]{32}", "32 hexadecimal digits": "[0-9a-f]{32}", "digest": "[0-9a-f]+", "n": "[0-9]+"}
    kinds |= {"messages": "[0-9]+", "segment's id": "[0-9a-f]{32}", "first": "[0-9]+", "stop": "[0-9]+"}
    kinds |= {"6 digits": "[0-9]{6}", "12 digits": "[0-9]{12}"}
    found = []
    for row in rows(section):
        for name in re.findall(r"`([^`]+)`", row[0]):
            parts = re.split(r"<([^>]+)>", name)
            found.append(re.compile("".join(kinds[p] if i % 2 else re.escape(p) for i, p in enumerate(parts))))
    return found


def expect_named(names: Iterator[str] | list[str], section: str) -> None:
    known = patterns(section)
    for name in names:
        assert any(pattern.fullmatch(name) for pattern in known), f"{name} is not on the page, under {section}"


# -- databases -------------------------------------------------------------------------------------------------------


def crc_of(*values: Any) -> int:
    return zlib.crc32(json.dumps(values).encode("ascii"))


def opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)


def read_database(path: Path, kind: str, migrations: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table, in the order of their first column."""
    with closing(opened(path)) as db:
        applied = db.execute("SELECT migration_set, name FROM _sqlite_migrations").fetchall()
        assert all(f"`{name}`" in sections()[kind] and set_ == migrations for set_, name in applied), applied
        there = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        there = {name for name in there if not name.startswith(("_sqlite_migrations", "messages_fts", "sqlite_"))}
        on_page = tables(kind)
        found: dict[str, list[dict[str, Any]]] = {}
        for name in on_page:
            if name not in there:
                assert {"comparison": "002_names", "traces": "003_traces"}[name] not in [one for _, one in applied]
                continue
            there.remove(name)
            types = {row[1]: row[2] for row in db.execute(f"PRAGMA table_info({name})")}
            assert types == on_page[name], f"{kind}, {name}: {types}"
            kept = db.execute(f"SELECT * FROM {name} ORDER BY 1")
            found[name] = [dict(zip(types, row, strict=True)) for row in kept]
        assert not there, f"tables that the page does not name: {there}"
        return found


# -- a session -------------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A session as its files say."""

    name: str
    fingerprint: dict[str, Any]
    generation: dict[str, Any]
    messages: list[dict[str, Any]]
    tokens: list[int]
    chunks: list[tuple[int, int]]
    traces: list[dict[str, Any]]
    tail: dict[str, tuple[str, list[int], bytes]] = field(default_factory=dict)
    planes: list[list[bytes]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)


def read_session(folder: Path) -> Stored:
    expect_named([path.name for path in folder.iterdir()], "A session's folder")
    db = read_database(folder / "session.db", "session.db", "infllm_agent.session")
    (session,), (generation,) = db["session"], db["generation"]
    assert session["crc"] == crc_of(session["name"], session["fingerprint"], session["created"])
    assert generation["crc"] == crc_of(*list(generation.values())[1:-1])
    tokens = list(_tokens(db["tokens"]))
    chunks = list(_chunks(db["chunks"]))
    fingerprint = json.loads(session["fingerprint"])
    assert fingerprint.keys() == {"format", "model", "weights", "dtype", "chat", "memory"}
    assert fingerprint["format"] == 2
    stored = Stored(session["name"], fingerprint, generation, _messages(db["messages"]), tokens, chunks, [])
    stored.traces = [_trace(row) for row in db.get("traces", [])]
    assert len(stored.messages) == generation["messages"]
    assert len(tokens) == generation["tokens"]
    assert sum(length for _, length in chunks) == generation["chunk_end"]
    assert max([message["stop"] for message in stored.messages], default=0) == generation["message_end"]
    if generation["state"] is not None:
        state = json.loads(generation["state"])
        assert state.keys() <= words("session.db/generation")
        assert state["memory"] == {"length": generation["chunk_end"], "blocks": generation["blocks"]}
        if "arriving" in state:
            assert state["arriving"].keys() == {"role", "name", "call_id", "start", "time", "text", "held"}
        stored.tail = _tail(folder / state["tail"], state["tail_crc"])
        _shapes(stored)
        _segments(folder, stored)
    return stored


def _messages(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for position, row in enumerate(found):
        assert row["position"] == position
        fields = [row[name] for name in columns("session.db/messages") if name not in ("crc", "calls", "tools")]
        added = [row.get("calls"), row.get("tools")]
        assert row["crc"] == crc_of(*fields, *(added if added != [None, None] else []))
        for name, keys in (("calls", {"name", "arguments", "id"}), ("tools", {"name", "description", "parameters"})):
            row[name] = json.loads(row.get(name) or "[]")
            assert all(one.keys() == keys for one in row[name])
    return found


def _tokens(found: list[dict[str, Any]]) -> Iterator[int]:
    reached = 0
    for row in found:
        assert (row["start"], row["crc"]) == (reached, zlib.crc32(row["ids"]))
        ids = struct.unpack(f"<{len(row['ids']) // 4}i", row["ids"])
        assert 0 < len(ids) <= 65_536
        reached += len(ids)
        yield from ids


def _chunks(found: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    reached = 0
    for row in found:
        assert (row["start"], row["crc"]) == (reached, crc_of(row["start"], row["length"], row["count"]))
        for _ in range(row["count"]):
            yield reached, row["length"]
            reached += row["length"]


def _trace(row: dict[str, Any]) -> dict[str, Any]:
    assert row["crc"] == crc_of(row["position"], row["head"], zlib.crc32(row["arrays"]))
    head = json.loads(row["head"])
    assert head.keys() | {key for layer in head["layers"] for key in layer} <= words("session.db/traces")
    assert (head["format"], head["answer"]) == (1, row["position"])
    count, size = head["blocks"], head["block_size"]
    form = f"{head['n_sinks']}e {count}i {count * size}e {count * size}e "
    form += "".join(f"{layer['blocks']}i {layer['blocks']}e " for layer in head["layers"])
    numbers = struct.unpack("<" + form, row["arrays"])
    return {**head, "sink_tokens": numbers[: head["n_sinks"]], "blocks": numbers[head["n_sinks"] :][:count]}


def _tail(path: Path, crc: int) -> dict[str, tuple[str, list[int], bytes]]:
    data = path.read_bytes()
    assert zlib.crc32(data) == crc
    (size,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, told in json.loads(data[8 : 8 + size]).items():
        first, stop = told["data_offsets"]
        found[name] = (told["dtype"], told["shape"], data[8 + size + first : 8 + size + stop])
        count = TAIL_DTYPES[told["dtype"]]
        for length in told["shape"]:
            count *= length
        assert stop - first == count
    expect_named(list(found), "The tail")
    return found


def _shapes(stored: Stored) -> None:
    """What the tail's shapes are follows from the settings and the length."""
    memory, length = stored.fingerprint["memory"], stored.generation["chunk_end"]
    evicted = length - memory["n_init"] - memory["n_local"]
    sinks, blocks = (memory["n_init"], evicted // memory["block_size"]) if evicted >= 0 else (0, 0)
    assert blocks == stored.generation["blocks"]
    for name, (_, shape, _) in stored.tail.items():
        if name.endswith(".sinks"):
            heads, size = shape[1], shape[3]
            assert shape == [2, heads, sinks, size]
            window = [heads, length - sinks - blocks * memory["block_size"], size]
            assert stored.tail[name.replace(".sinks", ".k")][1] == window
            assert stored.tail[name.replace(".sinks", ".v")][1] == window
        if name.endswith(".candidates"):
            numbers = struct.unpack(f"<{shape[0]}i", stored.tail[name][2])
            assert list(numbers) == sorted(set(numbers))
            assert all(0 <= number < blocks for number in numbers)


def _segments(folder: Path, stored: Stored) -> None:
    count, settings = stored.generation["blocks"], stored.fingerprint["memory"]
    _, (segments, _), ids = stored.tail["segments.ids"]
    assert segments == -(-count // 128)
    crcs = struct.unpack(f"<{segments}q", stored.tail["segments.crcs"][2])
    layers = [shape for name, (_, shape, _) in stored.tail.items() if name.endswith(".sinks")]
    shape = {"layers": len(layers), "kv_heads": layers[0][1], "head_dim": layers[0][3]}
    shape |= {"block_size": settings["block_size"], "dtype": stored.fingerprint["dtype"]}
    shape |= {"stored": settings.get("block_dtype", "model")}
    assert shape.keys() | {"segment", "id"} <= words("Segments")
    row, sizes = _sizes(shape)
    for number in range(segments):
        data = (folder / f"segment-{number:06d}.kv").read_bytes()
        head, here = data[:4096], min(128, count - 128 * number)
        assert struct.unpack("<I", head[-4:])[0] == zlib.crc32(head[:-4])
        magic, text = head[:-4].rstrip(b"\0").split(b"\n", 1)
        assert magic == b"INFLLM-KV2"
        id = ids[16 * number : 16 * number + 16].hex()
        assert text.decode() == json.dumps({**shape, "segment": number, "id": id}, sort_keys=True)
        keys = data[4096 : 4096 + here * row]
        assert zlib.crc32(keys) == crcs[number]
        stored.keys += [keys[at : at + row] for at in range(0, len(keys), row)]
        at = 4096 + 128 * row
        for block in range(128 * number, 128 * number + here):
            planes, at = _record(data, at, block, sizes)
            stored.planes.append(planes)


def _sizes(shape: dict[str, Any]) -> tuple[int, list[int]]:
    """The bytes of a row, and of each plane of a record."""
    item = ITEMSIZE[shape["dtype"]]
    numbers, one = shape["kv_heads"] * shape["block_size"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    keys = values = numbers * item
    if shape["stored"] == "int8":
        values = numbers + 4 * shape["kv_heads"]
        keys = values + one * item
    return shape["layers"] * one * item, [keys, values] * shape["layers"]


def _record(data: bytes, at: int, block: int, sizes: list[int]) -> tuple[list[bytes], int]:
    planes = []
    for plane, size in enumerate(sizes):
        bytes_, crc = data[at : at + size], data[at + size : at + size + 4]
        assert struct.unpack("<I", crc)[0] == zlib.crc32(f"{block}:{plane}".encode() + bytes_), (block, plane)
        planes.append(bytes_)
        end = at + -(-(size + 4) // 8) * 8
        assert not any(data[at + size + 4 : end])
        at = end
    return planes, at


# -- what is beside sessions -----------------------------------------------------------------------------------------


def read_root(root: Path) -> dict[str, Stored]:
    """Every session, by its name. The catalogue must say the same of them."""
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    expect_named([name for name in files if not name.startswith("sessions/")], "The root")
    found = {path.name: read_session(path) for path in (root / "sessions").iterdir()}
    index = read_database(root / "catalog.db", "catalog.db", "infllm_agent.catalog")
    assert {row["id"]: row["name"] for row in index["sessions"]} == {id: stored.name for id, stored in found.items()}
    for row in index["sessions"]:
        last = found[row["id"]].generation
        for name in ("messages", "tokens", "blocks", "bytes_on_disk", "updated"):
            assert row[name] == last[name]
        assert (row["generation"], row["model"]) == (last["number"], found[row["id"]].fingerprint["model"])
    return {stored.name: stored for stored in found.values()}
