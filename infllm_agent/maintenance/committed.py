"""A session as of its last commit: what its database says, and a copy of database and tail while others write."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.errors import CorruptSession
from infllm_agent.maintenance.check import stored_blocks
from infllm_agent.platform.faults import storage_errors
from infllm_agent.storage.catalog import SESSION_DATABASE
from infllm_agent.storage.database import SESSION_SCHEMA, connect
from infllm_agent.storage.integrity import row_damages
from infllm_agent.storage.rows import Generation, SessionRow, read_generation, read_session
from infllm_agent.storage.tail import TAIL_NAME


class Stored(NamedTuple):
    """What a session's database says of it."""

    session: SessionRow
    head: Generation
    fingerprint: dict[str, Any]
    state: dict[str, Any] | None

    @classmethod
    def of(cls, conn: sqlite3.Connection) -> Stored:
        session, head = read_session(conn), read_generation(conn)
        state = None if head.state is None else json.loads(head.state)
        return cls(session, head, json.loads(session.fingerprint), state)

    @classmethod
    def read(cls, folder: Path) -> Stored:
        """Of a session's folder. Raises CorruptSession, StorageError."""
        path = folder / SESSION_DATABASE
        with storage_errors(path), closing(connect(path, SESSION_SCHEMA, readonly=True)) as db:
            return cls.of(db.conn)

    @property
    def tail(self) -> str | None:
        """The name of the tail; None if nothing is committed."""
        if self.state is None:
            return None
        return tail_name(self.state)

    def blocks(self, folder: Path, *, elsewhere: Path | None = None) -> BlockFiles | None:
        """The files of its blocks, as the tail in ``folder`` says, which is checked; None if nothing is committed."""
        if self.state is None:
            if self.head.chunk_end or self.head.blocks:
                raise CorruptSession("its last generation has chunks or blocks, but no state")
            return None
        return stored_blocks(folder, self.fingerprint, self.head, self.state, elsewhere=elsewhere)


def tail_name(state: dict[str, Any]) -> str:
    """The name of a commit's tail, which says no other folder."""
    name = state["tail"]
    if not TAIL_NAME.fullmatch(name):
        raise CorruptSession(f"its tail is called {name[:80]!r}")
    return str(name)


def copy_commit(folder: Path, private: Path) -> Stored:
    """Copy database and tail of a session, as of one commit, into an empty folder; another process may write meanwhile.

    Raises:
        CorruptSession, StorageError.
    """
    path, copied = folder / SESSION_DATABASE, private / SESSION_DATABASE
    with storage_errors(path), closing(connect(path, SESSION_SCHEMA, readonly=True)) as db:
        with _one_commit(db.conn, folder) as tail:
            with closing(sqlite3.connect(copied)) as copy:
                db.conn.backup(copy)
            with closing(connect(copied, SESSION_SCHEMA, durable=False)) as upgraded:
                no_damage(row_damages(upgraded.conn, copied))
                stored = Stored.of(upgraded.conn)
            if stored.tail is not None and tail is not None:
                with open(private / stored.tail, "xb") as file:
                    shutil.copyfileobj(tail, file, 1 << 20)
        return stored


@contextmanager
def _one_commit(conn: sqlite3.Connection, folder: Path) -> Iterator[BinaryIO | None]:
    """See one commit in ``conn``, and its tail, however many follow: they delete the tail, but not from who reads."""
    number = -1
    while True:
        conn.execute("BEGIN")
        try:
            head = read_generation(conn)
            name = None if head.state is None else tail_name(json.loads(head.state))
            try:
                opened = nullcontext() if name is None else open(folder / name, "rb")  # noqa: SIM115 (closed below)
            except FileNotFoundError as error:
                if head.number == number:  # else the next commit has come between
                    raise CorruptSession(f"{error.filename}: {error.strerror}") from None
                number = head.number
                continue
            with opened as tail:
                yield tail
            return
        finally:
            conn.execute("ROLLBACK")


def no_damage(found: Iterable[str]) -> None:
    """Raise CorruptSession for the first damage, if there is any."""
    for damage in found:
        raise CorruptSession(damage)
