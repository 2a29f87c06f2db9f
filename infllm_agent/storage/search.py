"""Messages found by their words."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from infllm_agent.messages import Message
from infllm_agent.storage.rows import as_messages, message_columns


def search(
    conn: sqlite3.Connection,
    query: str,
    limit: int,
    *,
    after: datetime | None,
    before: datetime | None,
    stop: int | None,
    not_from: Sequence[str],
) -> list[Message]:
    """What ``SessionStore.search`` says, in an open database."""
    literal = query.encode("utf-8", "replace").decode("utf-8").strip()
    if not literal or limit < 1:
        return []
    # Each word in quotes is a phrase, whatever is in it; a NUL would end the expression for SQLite.
    words = dict.fromkeys(word for word in literal.replace("\0", " ").split() if any(map(str.isalnum, word)))
    expression = " ".join('"' + word.replace('"', '""') + '"' for word in words)
    bounds: list[tuple[str, Any]] = [("position >= ?", 0)]
    bounds += [("time >= ?", after.timestamp())] if after else []
    bounds += [("time < ?", before.timestamp())] if before else []
    bounds += [("position < ?", stop)] if stop is not None else []
    bounds += [("name IS NOT ?", name) for name in not_from]
    within = " AND ".join(bound for bound, _ in bounds)
    values = [value for _, value in bounds]
    table = f"(SELECT {message_columns(conn)} FROM messages) AS m"
    rows = []
    if expression:
        rows = conn.execute(
            f"SELECT m.* FROM messages_fts JOIN {table} ON position = messages_fts.rowid"
            f" WHERE messages_fts MATCH ? AND {within} ORDER BY messages_fts.rowid DESC LIMIT ?",
            (expression, *values, limit),
        ).fetchall()
    if not rows:
        rows = conn.execute(
            f"SELECT m.* FROM {table} WHERE (instr(m.text, ?) > 0 OR instr(calls, ?) > 0) AND {within}"
            " ORDER BY position DESC LIMIT ?",
            (literal, literal, *values, limit),
        ).fetchall()
    return as_messages(rows)
