"""Whether the rows of a session's database are whole, and agree with each other and with the last commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from infllm_agent.errors import CorruptSession
from infllm_agent.messages import Message
from infllm_agent.platform.faults import storage_errors
from infllm_agent.storage.database import reading
from infllm_agent.storage.rows import (
    Generation,
    as_messages,
    as_traces,
    checksum,
    expect,
    joined_token_ids,
    message_columns,
    read_generation,
    read_session,
)

#: What reading a row may raise whose checksum is good but whose content this package never wrote.
FOREIGN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

SEARCH_INDEX = "messages_fts"


def row_damages(conn: sqlite3.Connection, path: Path) -> list[str]:
    """What is wrong with a session's database at ``path``, a line each: of each kind of rows, the first bad one.

    All of one commit, also while a writer goes on. Takes time proportional to the history. Raises StorageError.
    """
    found: dict[str, None] = {}
    with reading(conn):
        for check in (_pages, _session, _messages, _tokens, _chunks, _traces):
            if line := _told(lambda check=check: check(conn), path):  # type: ignore[misc]
                found[line] = None
    return list(found)


def search_index_damage(conn: sqlite3.Connection, path: Path) -> str | None:
    """What is wrong with the full-text index; None: nothing. FTS5 takes the question as a write: ``conn`` can write."""
    return _told(
        lambda: conn.execute(f"INSERT INTO {SEARCH_INDEX} ({SEARCH_INDEX}, rank) VALUES ('integrity-check', 1)"), path
    )


def rebuild_search_index(conn: sqlite3.Connection) -> None:
    """Make the full-text index anew, from the messages."""
    conn.execute(f"INSERT INTO {SEARCH_INDEX} ({SEARCH_INDEX}) VALUES ('rebuild')")


def has_traces(conn: sqlite3.Connection) -> bool:
    """A reader may find a database from before there were any."""
    return conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'traces'").fetchone() is not None


def _told(check: Callable[[], object], path: Path) -> str | None:
    try:
        with storage_errors(path):
            check()
    except CorruptSession as error:
        return str(error)
    except FOREIGN as error:
        return f"{path} is damaged: what no version of this package writes ({type(error).__name__}: {str(error)[:80]})"
    return None


def _pages(conn: sqlite3.Connection) -> None:
    result = str(conn.execute("PRAGMA integrity_check(1)").fetchone()[0])
    # Newer versions of SQLite look into the full-text index, too. That one can be made anew.
    expect(result == "ok" or SEARCH_INDEX in result, " ".join(result.split()))


def _session(conn: sqlite3.Connection) -> None:
    session, head = read_session(conn), read_generation(conn)
    datetime.fromtimestamp(session.created)
    datetime.fromtimestamp(head.updated)
    counts = [value for name, value in head._asdict().items() if name not in ("state", "updated")]
    expect(all(isinstance(count, int) and count >= 0 for count in counts), "the counts of its last generation")


def _messages(conn: sqlite3.Connection) -> None:
    head, position, end = read_generation(conn), 0, 0
    for row in conn.execute(f"SELECT {message_columns(conn)} FROM messages ORDER BY position"):
        (message,) = as_messages([row])
        in_order = message.index == position and end <= message.start <= message.end <= head.tokens
        expect(in_order and _is_message(message), f"message {message.index}")
        position, end = position + 1, message.end
    _reaches(head, "messages", position, "message_end", end)


def _is_message(message: Message) -> bool:
    datetime.fromtimestamp(message.time)
    texts = (message.role, message.text, message.name or "", message.call_id or "")
    return all(isinstance(text, str) for text in texts)


def _tokens(conn: sqlite3.Connection) -> None:
    head, reached = read_generation(conn), 0
    for start, data, crc in conn.execute("SELECT start, ids, crc FROM tokens ORDER BY start"):
        count = len(data) // 4
        ids = joined_token_ids([(start, data, crc)], start, start + count)
        expect(start == reached and (not ids or min(ids) >= 0), f"its token ids at {start}")
        reached += count
    _reaches(head, "tokens", reached)


def _chunks(conn: sqlite3.Connection) -> None:
    head, reached = read_generation(conn), 0
    for start, length, count, crc in conn.execute("SELECT start, length, count, crc FROM chunks ORDER BY start"):
        good = start == reached and length > 0 and count > 0 and crc == checksum(start, length, count)
        expect(good, f"its chunk boundaries at {start}")
        reached += length * count
    _reaches(head, "chunk_end", reached)
    expect(reached <= head.tokens, "its chunk boundaries: they reach past its tokens")


def _traces(conn: sqlite3.Connection) -> None:
    if has_traces(conn):
        messages = read_generation(conn).messages
        for row in conn.execute("SELECT position, head, arrays, crc FROM traces ORDER BY position"):
            as_traces([row])
            expect(0 <= row[0] < messages, f"the trace of answer {row[0]}: there is no such message")


def _reaches(head: Generation, *pairs: object) -> None:
    """Whether the rows reach exactly as far as the last generation says."""
    for name, reached in zip(pairs[::2], pairs[1::2], strict=True):
        told = getattr(head, str(name))
        expect(reached == told, f"its rows reach {name} {reached}, its last generation says {told}")
