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
from dataclasses import replace
from typing import Any, NamedTuple

from infllm_agent.messages import Message
from infllm_agent.tools import calls_from_json, calls_json, tools_from_json, tools_json
from infllm_agent.trace import Trace

TOKENS_PER_ROW = 1 << 16  # keeps a slice of a long log cheap to read
MESSAGE_COLUMNS = "position, role, name, call_id, text, time, start, stop, calls, tools, crc"


class Damaged(sqlite3.DatabaseError):
    """A row that fails its checksum, or is not there."""


class Log(NamedTuple):
    """A stretch of a session's record: what one commit appends. Chunks are (start, length); traces are of answers
    among the messages."""

    messages: Sequence[Message] = ()
    token_ids: Sequence[int] = ()
    chunks: Sequence[tuple[int, int]] = ()
    traces: Sequence[Trace] = ()


class Extent(NamedTuple):
    """How much of a session's record, from its beginning: messages, tokens, and tokens in chunks."""

    messages: int
    tokens: int
    chunk_end: int


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


def append_rows(conn: sqlite3.Connection, last: Generation, log: Log) -> Generation:
    """Write what continues the generation ``last``. Returns that one with the session's new reach, not yet written.

    Raises ValueError for a log that does not continue it.
    """
    ids = as_token_ids(log.token_ids)
    tokens = last.tokens + len(ids)
    message_end = messages_end(log.messages, last, tokens)
    runs, chunk_end = run_lengths(log.chunks, last.chunk_end, tokens)
    conn.executemany(
        f"INSERT INTO messages ({MESSAGE_COLUMNS}) VALUES ({', '.join('?' * 11)})",
        [message_row(message) for message in log.messages],
    )
    conn.executemany("INSERT INTO messages_fts (rowid, text) VALUES (?, ?)", [(m.index, m.text) for m in log.messages])
    for start in range(0, len(ids), TOKENS_PER_ROW):
        row = token_row(ids[start : start + TOKENS_PER_ROW])
        conn.execute("INSERT INTO tokens (start, ids, crc) VALUES (?, ?, ?)", (last.tokens + start, *row))
    conn.executemany(
        "INSERT INTO chunks (start, length, count, crc) VALUES (?, ?, ?, ?)",
        [(*run, checksum(*run)) for run in runs],
    )
    messages = last.messages + len(log.messages)
    conn.executemany(
        "INSERT INTO traces (position, head, arrays, crc) VALUES (?, ?, ?, ?)",
        [trace_row(trace, last.messages, messages) for trace in log.traces],
    )
    return last._replace(messages=messages, tokens=tokens, message_end=message_end, chunk_end=chunk_end)


def copy_rows(conn: sqlite3.Connection, kept: Extent) -> Generation:
    """Copy the rows of the attached database ``source`` that lie wholly in its first part, into empty tables.

    Returns a generation, not yet written, that reaches as far as they do.
    """
    columns = message_columns(conn, "source")
    conn.execute(
        f"INSERT INTO messages ({MESSAGE_COLUMNS}) SELECT {columns} FROM source.messages WHERE position < ?",
        (kept.messages,),
    )
    conn.execute("INSERT INTO messages_fts (messages_fts) VALUES ('rebuild')")
    conn.execute(
        "INSERT INTO tokens SELECT * FROM source.tokens WHERE start + length(ids) / 4 <= ? ORDER BY start",
        (kept.tokens,),
    )
    conn.execute(
        "INSERT INTO chunks SELECT * FROM source.chunks WHERE start + length * count <= ? ORDER BY start",
        (kept.chunk_end,),
    )
    conn.execute("INSERT INTO traces SELECT * FROM source.traces WHERE position < ?", (kept.messages,))
    messages, message_end = conn.execute("SELECT count(*), coalesce(max(stop), 0) FROM messages").fetchone()
    expect(messages == kept.messages, "some messages are missing")
    (tokens,) = conn.execute("SELECT coalesce(max(start + length(ids) / 4), 0) FROM tokens").fetchone()
    (chunk_end,) = conn.execute("SELECT coalesce(max(start + length * count), 0) FROM chunks").fetchone()
    return Generation(0, None, messages, tokens, message_end, chunk_end, 0, 0, 0.0)


def chunk_run(conn: sqlite3.Connection, token: int) -> tuple[int, int, int]:
    """The last run (start, length, count) of execution chunks that begins at or before a token; (0, 1, 0) if none."""
    row = conn.execute(
        "SELECT start, length, count, crc FROM chunks WHERE start <= ? ORDER BY start DESC LIMIT 1", (token,)
    ).fetchone()
    if row is None:
        return 0, 1, 0
    expect(row[-1] == checksum(*row[:-1]), f"its chunk boundaries at {row[0]}")
    start, length, count = row[:-1]
    return start, length, count


def message_row(message: Message) -> tuple[Any, ...]:
    """The message as ``MESSAGE_COLUMNS``. Raises ValueError unless its time is finite."""
    m = message
    if not math.isfinite(m.time):
        raise ValueError(f"message {m.index}: time {m.time} is not a time")
    # plain numbers: what SQLite returns must have the same checksum
    fields = (int(m.index), m.role, m.name, m.call_id, m.text, float(m.time), int(m.start), int(m.end))
    called = (calls_json(m.calls) if m.calls else None, tools_json(m.tools) if m.tools else None)
    return (*fields, *called, _message_checksum(*fields, *called))


def message_columns(conn: sqlite3.Connection, schema: str = "main") -> str:
    """``MESSAGE_COLUMNS`` of a database that a reader found, which may have been made before some of them."""
    there = {row[1] for row in conn.execute(f"PRAGMA {schema}.table_info(messages)")}
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


def trace_row(trace: Trace, first: int, stop: int) -> tuple[Any, ...]:
    """A trace as (position, head, arrays, crc). Raises ValueError unless its answer is among messages first..stop."""
    if not first <= trace.answer < stop:
        raise ValueError(f"a trace of message {trace.answer}: the messages of this commit are {first} to {stop - 1}")
    head, arrays = trace.pack()
    return trace.answer, head, arrays, _trace_checksum(trace.answer, head, arrays)


def as_traces(rows: Iterable[tuple[Any, ...]]) -> list[Trace]:
    """Traces from rows (position, head, arrays, crc)."""
    traces = []
    for position, head, arrays, crc in rows:
        expect(
            isinstance(arrays, bytes) and crc == _trace_checksum(position, head, arrays),
            f"the trace of answer {position}",
        )
        traces.append(Trace.unpack(head, arrays))
    return traces


def _trace_checksum(position: int, head: str, arrays: bytes) -> int:
    return checksum(position, head, zlib.crc32(arrays))


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
