"""One session on disk: messages, token ids, chunk boundaries and the committed generation, in its session.db.

Everything is append-only except the generation, which a commit moves forward in the same transaction. What a commit
refers to in other files (blocks, tail) must be on stable storage before it.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from infllm_agent.errors import CorruptSession, SessionClosed, SessionExists, StorageError, UnknownSession
from infllm_agent.messages import Message
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import sync_folder
from infllm_agent.platform.locks import WriterLock
from infllm_agent.storage.catalog import SESSION_DATABASE, Catalog, SessionInfo, read_info
from infllm_agent.storage.database import SESSION_SCHEMA, connect, transaction
from infllm_agent.storage.integrity import has_traces, rebuild_search_index, row_damages, search_index_damage
from infllm_agent.storage.rows import (
    Extent,
    Generation,
    Log,
    SessionRow,
    append_rows,
    as_messages,
    as_traces,
    chunk_run,
    copy_rows,
    expand_runs,
    expect,
    joined_token_ids,
    message_columns,
    read_generation,
    read_session,
    write_generation,
    write_session,
)
from infllm_agent.storage.search import search
from infllm_agent.trace import Trace

__all__ = ["Message", "SessionStore"]

#: A folder of block files that a rebuild has made; the state of a commit names it until they are in their places.
REBUILT = re.compile(r"rebuilt-[0-9a-f]{32}")


class SessionStore:
    """An open session folder. Any number of threads may use one; only one writer per session exists at a time.

    Besides what each method names, all of them raise SessionClosed after ``close``, CorruptSession if stored bytes
    are damaged and StorageError if the disk cannot be read or written.
    """

    def __init__(self, catalog: Catalog, id: str, name: str, lock: WriterLock | None) -> None:
        """Use ``create``, ``open`` or ``open_or_create``."""
        self.id = id
        self.name = name
        self.folder: Path = catalog.folder(id)
        self._catalog = catalog
        self._lock = lock
        self._closed = False
        self._mutex = threading.RLock()
        self._path = self.folder / SESSION_DATABASE
        self._db = connect(self._path, SESSION_SCHEMA, readonly=lock is None)
        try:
            with self._using() as conn:
                row = read_session(conn)
                expect(row.name == name, f'it holds session "{row.name}", not "{name}"')
            self.fingerprint: dict[str, Any] = json.loads(row.fingerprint)
            self.created = row.created
            if lock is not None:
                self.settle()
                catalog.record(self.info)
        except BaseException:
            self._db.close()
            raise

    @classmethod
    def create(cls, root: str | PathLike[str], name: str, fingerprint: dict[str, Any]) -> SessionStore:
        """Make a session and open it for writing. ``fingerprint`` is kept as JSON: tuples come back as lists.

        Raises SessionExists (also in the loser of two processes that create one name), InvalidName, StorageError.
        """
        text = json.dumps(fingerprint, allow_nan=False)

        def fill(folder: Path) -> None:
            now = time.time()
            with closing(connect(folder / SESSION_DATABASE, SESSION_SCHEMA, create=True)) as db, transaction(db.conn):
                write_session(db.conn, SessionRow(name, text, now))
                write_generation(db.conn, Generation(0, None, 0, 0, 0, 0, 0, 0, now))

        return cls.add(root, name, fill)

    @classmethod
    def add(cls, root: str | PathLike[str], name: str, fill: Callable[[Path], None]) -> SessionStore:
        """Make a session whose files ``fill`` writes into its folder, and open it for writing. It is there whole or not
        at all. Raises what ``create`` raises, and CorruptSession."""
        catalog = Catalog(root)
        id, lock = catalog.add(name, fill)
        return cls._locked(catalog, id, name, lock)

    @classmethod
    def open(cls, root: str | PathLike[str], name: str, *, readonly: bool = False) -> SessionStore:
        """Open a session. A reader takes no lock and follows a writer's commits as they happen.

        Raises UnknownSession, InvalidName, SessionLocked (at once) if another writer has it, StorageError,
        CorruptSession.
        """
        catalog = Catalog(root)
        id = catalog.require(name)
        if readonly:
            return cls(catalog, id, name, None)
        return cls._locked(catalog, id, name, WriterLock(catalog.folder(id), name))

    @classmethod
    def open_or_create(cls, root: str | PathLike[str], name: str, fingerprint: dict[str, Any]) -> SessionStore:
        """Open a session for writing; make it if it does not exist.

        An existing one keeps its own fingerprint: compare it. Raises what ``open`` and ``create`` raise, except
        UnknownSession and SessionExists.
        """
        while True:
            try:
                return cls.open(root, name)
            except UnknownSession:
                pass
            try:
                return cls.create(root, name, fingerprint)
            except SessionExists:
                pass  # made by another process just now

    def check_free(self, name: str) -> None:
        """Raise SessionExists or InvalidName unless a new session in the same root may have this name."""
        if self._catalog.find(name) is not None:
            raise SessionExists(f'session "{name}" already exists in {self._catalog.root}')

    def fork(
        self, name: str, kept: Extent, log: Log, fill: Callable[[Path], tuple[dict[str, Any], int]]
    ) -> SessionStore:
        """Make a session that begins as this one, and open it for writing. It is there whole or not at all.

        The rows are copied from database to database; this session may go on meanwhile.

        Args:
            kept: how much of what is committed here; ``log`` continues it.
            fill: writes the other files into the new folder; returns the state and the number of blocks.

        Raises SessionExists, InvalidName, SessionClosed, StorageError, CorruptSession.
        """

        def fill_all(folder: Path) -> None:
            state, blocks = fill(folder)
            with closing(connect(folder / SESSION_DATABASE, SESSION_SCHEMA, create=True)) as db:
                conn, now = db.conn, time.time()
                conn.execute("ATTACH ? AS source", (f"{self._path.as_uri()}?mode=ro",))
                with transaction(conn):
                    write_session(conn, SessionRow(name, json.dumps(self.fingerprint, allow_nan=False), now))
                    with storage_errors(self._path):
                        head = copy_rows(conn, kept)
                    # A row of tokens or chunks that is kept in part only is written anew.
                    head = append_rows(conn, head, self._rest(head, kept))
                    new = append_rows(conn, head, log)
                size = sum(path.stat().st_size for path in folder.iterdir())
                with transaction(conn):
                    write_generation(
                        conn,
                        new._replace(number=1, state=json.dumps(state), blocks=blocks, bytes_on_disk=size, updated=now),
                    )

        with self._mutex:  # it cannot be closed, and so not deleted, before the fork is there
            self._head()
            id, lock = self._catalog.add(name, fill_all)
        return self._locked(self._catalog, id, name, lock)

    def _rest(self, head: Generation, kept: Extent) -> Log:
        """Tokens and chunks of ``kept`` behind the generation ``head``."""
        ids = self.token_ids(head.tokens, kept.tokens)
        chunks = []
        if head.chunk_end < kept.chunk_end:
            with self._using() as conn:
                start, length, _ = chunk_run(conn, head.chunk_end)
            chunks = [(start, length) for start in range(start, kept.chunk_end, length)]
        return Log((), ids, chunks)

    @classmethod
    def _locked(cls, catalog: Catalog, id: str, name: str, lock: WriterLock) -> SessionStore:
        try:
            return cls(catalog, id, name, lock)
        except BaseException:
            lock.release()
            raise

    @property
    def root(self) -> Path:
        """The folder that holds all sessions."""
        return self._catalog.root

    @property
    def readonly(self) -> bool:
        """Whether it was opened for reading only."""
        return self._lock is None

    @property
    def generation(self) -> int:
        """The number of the last commit; 0 before the first."""
        return self._head().number

    @property
    def state(self) -> dict[str, Any] | None:
        """The ``state`` that the last commit was given; None before the first."""
        text = self._head().state
        if text is None:
            return None
        state: dict[str, Any] = json.loads(text)
        return state

    @property
    def message_count(self) -> int:
        """Messages committed."""
        return self._head().messages

    @property
    def token_count(self) -> int:
        """Token ids committed."""
        return self._head().tokens

    @property
    def updated(self) -> float:
        """Unix seconds of the last commit; of the creation before the first."""
        return self._head().updated

    @property
    def info(self) -> SessionInfo:
        """The session's line in the catalogue, as of now."""
        with self._using() as conn:
            return read_info(conn, self.id)

    def commit(
        self,
        *,
        messages: Sequence[Message],
        token_ids: Sequence[int],
        chunks: Sequence[tuple[int, int]],
        state: dict[str, Any],
        bytes_on_disk: int,
        blocks: int = 0,
        traces: Sequence[Trace] = (),
    ) -> int:
        """Append messages, token ids, execution chunks (start, length) and the traces of answers among the messages,
        replace the state; all of it or nothing.

        Indexes continue without gaps; spans are in order, do not overlap, and lie within the token log as it is
        after this commit; chunks continue without gaps and lie within it too. ``state`` is kept as JSON.
        ``bytes_on_disk`` and ``blocks`` are totals for the catalogue. Returns the new generation.

        Raises ValueError for input that breaks these rules, StorageError if opened read-only. After any error the
        session is as before; but if the machine then dies before the next commit, a StorageError's commit may turn
        out to have happened, so keep its files until then.
        """
        text = json.dumps(state, allow_nan=False)
        with self._using() as conn:
            if self._lock is None:
                raise StorageError(f'session "{self.name}" was opened read-only')
            with transaction(conn):
                head = self._head()
                new = append_rows(conn, head, Log(messages, token_ids, chunks, traces))._replace(
                    number=head.number + 1, state=text, blocks=blocks, bytes_on_disk=bytes_on_disk, updated=time.time()
                )
                write_generation(conn, new)
            if head.number == 0:
                self._leave_the_log(conn)
            info = read_info(conn, self.id)
        self._catalog.record(info)
        return new.number

    def _leave_the_log(self, conn: sqlite3.Connection) -> None:
        """Move the first commit from SQLite's log into the database itself. Without its log, a database that lies
        behind names a tail that is gone, and is refused; only an empty one would pass for a new session."""
        with suppress(sqlite3.Error):  # the commit has happened
            conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def messages(self, start: int = 0, stop: int | None = None) -> list[Message]:
        """The messages of a slice, as ``list[start:stop]`` means it: ``messages(-5)`` are the last five."""
        with self._using() as conn:
            first, last, _ = slice(start, stop).indices(self.message_count)
            rows = conn.execute(
                f"SELECT {message_columns(conn)} FROM messages WHERE position >= ? AND position < ? ORDER BY position",
                (first, last),
            ).fetchall()
            messages = as_messages(rows)
            expect([m.index for m in messages] == list(range(first, last)), "some messages are missing")
            return messages

    def announcing_message(self) -> Message | None:
        """The last message that announces tools."""
        with self._using() as conn:
            rows = conn.execute("SELECT max(position) FROM messages WHERE tools IS NOT NULL").fetchall()
            return None if rows[0][0] is None else self.messages(rows[0][0], rows[0][0] + 1)[0]

    def token_ids(self, start: int = 0, stop: int | None = None) -> array[int]:
        """The token ids of a slice, as 32-bit integers (``torch.frombuffer(ids, dtype=torch.int32)`` shares them)."""
        with self._using() as conn:
            first, last, _ = slice(start, stop).indices(self.token_count)
            if first >= last:
                return array("i")
            rows = conn.execute(
                "SELECT start, ids, crc FROM tokens WHERE start < ? AND start >="
                " (SELECT max(start) FROM tokens WHERE start <= ?) ORDER BY start",
                (last, first),
            ).fetchall()
            return joined_token_ids(rows, first, last)

    def traces(self, start: int = 0, stop: int | None = None) -> list[Trace]:
        """What the answers among a slice of the messages attended to, where that was traced."""
        with self._using() as conn:
            if not has_traces(conn):
                return []
            first, last, _ = slice(start, stop).indices(self.message_count)
            rows = conn.execute(
                "SELECT position, head, arrays, crc FROM traces WHERE position >= ? AND position < ? ORDER BY position",
                (first, last),
            ).fetchall()
            return as_traces(rows)

    def traced(self) -> list[int]:
        """The indices of the messages that ``traces`` has something of."""
        with self._using() as conn:
            if not has_traces(conn):
                return []
            return [position for (position,) in conn.execute("SELECT position FROM traces ORDER BY position")]

    def chunks(self) -> list[tuple[int, int]]:
        """Every execution chunk as (start, length), in order."""
        with self._using() as conn:
            end = self._head().chunk_end
            rows = conn.execute("SELECT start, length, count, crc FROM chunks WHERE start < ? ORDER BY start", (end,))
            return expand_runs(rows, end)

    def chunk_boundary(self, token: int, fits: Callable[[int, int], bool] = lambda length, end: True) -> int:
        """Return the last end of an execution chunk, at or before a token, that ``fits(length, end)``; else 0."""
        with self._using() as conn:
            while token > 0:
                start, length, count = chunk_run(conn, token - 1)
                chunks = min((token - start) // length, count)
                end = start + chunks * length
                if chunks and fits(length, end):
                    return end
                token = end - 1 if chunks else start
        return 0

    def search(
        self,
        query: str,
        limit: int = 20,
        *,
        after: datetime | None = None,
        before: datetime | None = None,
        stop: int | None = None,
        not_from: Sequence[str] = (),
    ) -> list[Message]:
        """Messages whose text has all the words of ``query``, newest first; any text is a valid query.

        Case and accents do not matter. If no message has the words, messages that contain ``query`` literally
        (parts of words, punctuation, scripts without spaces), in their text or in the JSON of their calls.

        Args:
            after, before: bounds of the message's time, the first included, the second not.
            stop: only messages whose index is below it.
            not_from: names whose messages are left out.
        """
        with self._using() as conn:
            return search(conn, query, limit, after=after, before=before, stop=stop, not_from=not_from)

    @property
    def committed(self) -> Generation:
        """The last commit."""
        return self._head()

    def damages(self) -> list[str]:
        """What is wrong with the database, a line each that names the file; the full-text index left aside. Takes time
        proportional to the history."""
        with self._using() as conn:
            return row_damages(conn, self._path)

    def search_damage(self) -> str | None:
        """What is wrong with the full-text index. None: nothing, or the session is open for reading only."""
        if self._lock is None:
            return None
        with self._using() as conn:
            return search_index_damage(conn, self._path)

    def rebuild_search(self) -> None:
        """Make the full-text index anew. Raises StorageError if opened read-only."""
        with self._using() as conn:
            rebuild_search_index(conn)

    def verify(self) -> None:
        """Read and check everything in the database; CorruptSession says what is damaged."""
        for damage in (*self.damages(), self.search_damage()):
            if damage is not None:
                raise CorruptSession(damage)

    def settle(self) -> None:
        """Move the block files of a committed rebuild to their places. One that was killed before it had is finished
        when the session is next opened for writing. Raises StorageError."""
        name = (self.state or {}).get("rebuilt")
        if not isinstance(name, str) or not REBUILT.fullmatch(name) or not (made := self.folder / name).is_dir():
            return
        with storage_errors(made):
            for path in sorted(made.glob("segment-*.kv")):
                os.replace(path, self.folder / path.name)
            sync_folder(made)
            sync_folder(self.folder)
            with suppress(OSError):
                made.rmdir()

    def close(self) -> None:
        """Close the files and give the lock back; more than once does no harm."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            try:
                self._db.close()
            finally:
                if self._lock is not None:
                    self._lock.release()

    def __enter__(self) -> SessionStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            if self._closed:
                raise SessionClosed(f'session "{self.name}" is closed; open it again')
            with storage_errors(self._path):
                yield self._db.conn

    def _head(self) -> Generation:
        with self._using() as conn:
            return read_generation(conn)
