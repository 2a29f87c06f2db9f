"""What the rows of a session's database hold, with the checksums and checks that guard them.

The readers expect to be called inside ``storage_errors``, which names the file of a ``Damaged`` row.
"""

from __future__ import annotations

import json
import math
import sqlite3
import sys
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from infllm_agent.tools import ToolCall, ToolSpec, calls_from_json, calls_json, tools_from_json, tools_json

MESSAGE_COLUMNS = "position, role, name, call_id, text, time, start, stop, calls, tools, crc"


class Damaged(sqlite3.DatabaseError):
    """A row that fails its checksum, or is not there."""


@dataclass(frozen=True)
class Message:
    """A message as it was given; ``start`` and ``end`` are its span [start, end) in the session's token log.

    ``index`` counts from 0 and ``time`` is in unix seconds (UTC). ``calls`` are made by an assistant's message, whose
    text is without them: a text may spell what is no call. ``tools`` are announced by a system message.
    """

    index: int
    role: str
    name: str | None
    call_id: str | None
    text: str
    time: float
    start: int
    end: int
    calls: tuple[ToolCall, ...] = ()
    tools: tuple[ToolSpec, ...] = ()


class SessionRow(NamedTuple):
    """What never changes in a session; ``fingerprint`` is JSON."""

    name: str
    fingerprint: str
    created: float


class Generation(NamedTuple):
    """A commit: its number, its state as JSON (None before the first) and how far the session reaches in it.

    ``message_end`` and ``chunk_end`` are the tokens that messages and execution chunks reach up to.
    """

    number: int
    state: str | None
    messages: int
    tokens: int
    message_end: int
    chunk_end: int
    blocks: int
    bytes_on_disk: int
    updated: float


def expect(good: bool, what: str) -> None:
    """Raise Damaged, saying what is, unless all is good."""
    if not good:
        raise Damaged(what)


def checksum(*values: object) -> int:
    """The checksum of a row. Damage can turn a column into any type, so every type has one."""
    return zlib.crc32(json.dumps(values, default=repr).encode("ascii"))


def write_session(conn: sqlite3.Connection, row: SessionRow) -> None:
    conn.execute("INSERT INTO session VALUES (1, ?, ?, ?, ?)", (*row, checksum(*row)))


def read_session(conn: sqlite3.Connection) -> SessionRow:
    row = conn.execute("SELECT name, fingerprint, created, crc FROM session").fetchone()
    expect(row is not None and row[-1] == checksum(*row[:-1]), "its name and fingerprint")
    return SessionRow(*row[:-1])


def write_generation(conn: sqlite3.Connection, row: Generation) -> None:
    columns = ", ".join(Generation._fields)
    conn.execute(
        f"INSERT OR REPLACE INTO generation (only, {columns}, crc) VALUES (1, {', '.join('?' * 10)})",
        (*row, checksum(*row)),
    )


def read_generation(conn: sqlite3.Connection) -> Generation:
    row = conn.execute(f"SELECT {', '.join(Generation._fields)}, crc FROM generation").fetchone()
    expect(row is not None and row[-1] == checksum(*row[:-1]), "its last generation")
    return Generation(*row[:-1])


def message_row(message: Message) -> tuple[Any, ...]:
    """The message as ``MESSAGE_COLUMNS``. Raises ValueError for a time that is none."""
    m = message
    if not math.isfinite(m.time):
        raise ValueError(f"message {m.index}: time {m.time} is not a time")
    # plain numbers: what SQLite returns must have the same checksum
    fields = (int(m.index), m.role, m.name, m.call_id, m.text, float(m.time), int(m.start), int(m.end))
    called = (calls_json(m.calls) if m.calls else None, tools_json(m.tools) if m.tools else None)
    return (*fields, *called, _message_checksum(*fields, *called))


def message_columns(conn: sqlite3.Connection) -> str:
    """``MESSAGE_COLUMNS`` of a database that a reader found, which may have been made before some of them."""
    there = {row[1] for row in conn.execute("PRAGMA table_info(messages)")}
    return ", ".join(name if name in there else f"NULL AS {name}" for name in MESSAGE_COLUMNS.split(", "))


def as_messages(rows: Iterable[tuple[Any, ...]]) -> list[Message]:
    """Messages from rows of ``MESSAGE_COLUMNS``."""
    messages = []
    for *fields, crc in rows:
        expect(crc == _message_checksum(*fields), f"message {fields[0]}")
        calls, tools = fields[-2:]
        message = Message(*fields[:-2])
        if calls or tools:
            message = replace(
                message,
                calls=calls_from_json(calls) if calls else (),
                tools=tools_from_json(tools) if tools else (),
            )
        messages.append(message)
    return messages


def _message_checksum(*fields: object) -> int:
    """Without tools and calls, the checksum from the time when messages had none."""
    return checksum(*(fields[:-2] if fields[-2:] == (None, None) else fields))


def messages_end(messages: Sequence[Message], last: Generation, tokens: int) -> int:
    """Where the last span ends, if the messages continue the generation ``last`` in a log of ``tokens``.

    Raises ValueError if they do not.
    """
    end = last.message_end
    for index, message in enumerate(messages, last.messages):
        if message.index != index:
            raise ValueError(f"message index {message.index}: the next is {index}")
        if not end <= message.start <= message.end <= tokens:
            raise ValueError(
                f"message {index}: span [{message.start}, {message.end}) is not within the free part [{end}, {tokens})"
            )
        end = int(message.end)
    return end


def run_lengths(chunks: Sequence[tuple[int, int]], end: int, tokens: int) -> tuple[list[tuple[int, int, int]], int]:
    """Chunks as runs (start, length, count), because decoding makes thousands of one token; and the end of the last.

    Raises ValueError if they do not continue from ``end`` within a log of ``tokens``.
    """
    runs: list[tuple[int, int, int]] = []
    for start, length in chunks:
        if start != end or length < 1 or start + length > tokens:
            raise ValueError(
                f"chunk at {start} of {length} tokens: the next starts at {end}, within a log of {tokens} tokens"
            )
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0], length, runs[-1][2] + 1)
        else:
            runs.append((int(start), int(length), 1))
        end = int(start + length)
    return runs, end


def expand_runs(rows: Iterable[tuple[int, int, int, int]], end: int) -> list[tuple[int, int]]:
    """The chunks (start, length) of rows (start, length, count, crc) that together reach ``end``."""
    chunks: list[tuple[int, int]] = []
    reached = 0
    for start, length, count, crc in rows:
        expect(start == reached and crc == checksum(start, length, count), f"its chunk boundaries at {start}")
        chunks += [(start + i * length, length) for i in range(count)]
        reached += length * count
    expect(reached == end, "its chunk boundaries: some are missing")
    return chunks


def as_token_ids(token_ids: Sequence[int]) -> array[int]:
    """Token ids as 32-bit integers. Raises ValueError for one that is not."""
    try:
        ids = array("i", token_ids)
    except OverflowError as error:
        raise ValueError("a token id does not fit in 32 bits") from error
    if ids and min(ids) < 0:
        raise ValueError(f"token id {min(ids)} is negative")
    return ids


def token_row(ids: array[int]) -> tuple[bytes, int]:
    """Token ids as little-endian bytes, with their checksum."""
    data = _swapped_if_big_endian(ids[:]).tobytes()
    return data, zlib.crc32(data)


def joined_token_ids(rows: Sequence[tuple[int, bytes, int]], first: int, last: int) -> array[int]:
    """The token ids [first, last) of consecutive rows (start, ids, crc) that hold at least these."""
    ids = array("i")
    offset = end = rows[0][0] if rows else 0
    for start, data, crc in rows:
        good = start == end and isinstance(data, bytes) and len(data) % 4 == 0 and zlib.crc32(data) == crc
        expect(good, f"its token ids at {start}")
        ids.frombytes(data)
        end += len(data) // 4
    expect(offset <= first and last <= end, "its token ids: some are missing")
    return _swapped_if_big_endian(ids)[first - offset : last - offset]


def _swapped_if_big_endian(ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
