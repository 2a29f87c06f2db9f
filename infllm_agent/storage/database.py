"""SQLite as this package uses it: how a database is opened, the two schemas, and SQLite's errors in our own words.

Never open, copy or hash a live database with plain file calls: closing any descriptor of a file drops every
POSIX lock that this process holds on it, SQLite's included.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from sqlite_utils import Database, Migrations

from infllm_agent.errors import CorruptSession, StorageError
from infllm_agent.platform.faults import storage_errors

BUSY_SECONDS = 5.0

SESSION_SCHEMA = Migrations("infllm_agent.session")
CATALOG_SCHEMA = Migrations("infllm_agent.catalog")


@SESSION_SCHEMA(name="001_session")
def _session_001(db: Database) -> None:
    db.execute(
        """CREATE TABLE session (
            only INTEGER PRIMARY KEY CHECK (only = 1), name TEXT NOT NULL, fingerprint TEXT NOT NULL,
            created REAL NOT NULL, crc INTEGER NOT NULL)"""
    )
    db.execute(
        """CREATE TABLE generation (
            only INTEGER PRIMARY KEY CHECK (only = 1), number INTEGER NOT NULL, state TEXT,
            messages INTEGER NOT NULL, tokens INTEGER NOT NULL,
            message_end INTEGER NOT NULL, chunk_end INTEGER NOT NULL,
            blocks INTEGER NOT NULL, bytes_on_disk INTEGER NOT NULL, updated REAL NOT NULL, crc INTEGER NOT NULL)"""
    )
    db.execute(
        """CREATE TABLE messages (
            position INTEGER PRIMARY KEY, role TEXT NOT NULL, name TEXT, call_id TEXT, text TEXT NOT NULL,
            time REAL NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, crc INTEGER NOT NULL)"""
    )
    # ids: little-endian int32
    db.execute("CREATE TABLE tokens (start INTEGER PRIMARY KEY, ids BLOB NOT NULL, crc INTEGER NOT NULL)")
    # one row: `count` consecutive execution chunks of `length` tokens each
    db.execute(
        """CREATE TABLE chunks (
            start INTEGER PRIMARY KEY, length INTEGER NOT NULL, count INTEGER NOT NULL, crc INTEGER NOT NULL)"""
    )
    db.execute(
        """CREATE VIRTUAL TABLE messages_fts USING fts5 (
            text, content='messages', content_rowid='position', tokenize='unicode61 remove_diacritics 2')"""
    )


@SESSION_SCHEMA(name="002_tools")
def _session_002(db: Database) -> None:
    # JSON: the calls that an assistant's message makes, the tools that a system message announces; NULL: none
    db.execute("ALTER TABLE messages ADD COLUMN calls TEXT")
    db.execute("ALTER TABLE messages ADD COLUMN tools TEXT")
    db.execute("CREATE INDEX messages_tools ON messages (position) WHERE tools IS NOT NULL")


@SESSION_SCHEMA(name="003_traces")
def _session_003(db: Database) -> None:
    # what the answer at that position attended to: its figures as JSON, its arrays as little-endian bytes
    db.execute(
        """CREATE TABLE traces (
            position INTEGER PRIMARY KEY, head TEXT NOT NULL, arrays BLOB NOT NULL, crc INTEGER NOT NULL)"""
    )


@CATALOG_SCHEMA(name="001_catalog")
def _catalog_001(db: Database) -> None:
    db.execute(
        """CREATE TABLE sessions (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, generation INTEGER NOT NULL, messages INTEGER NOT NULL,
            tokens INTEGER NOT NULL, blocks INTEGER NOT NULL, bytes_on_disk INTEGER NOT NULL,
            created REAL NOT NULL, updated REAL NOT NULL, model TEXT NOT NULL)"""
    )


@CATALOG_SCHEMA(name="002_names")
def _catalog_002(db: Database) -> None:
    db.execute("CREATE INDEX sessions_name ON sessions (name)")
    db.execute("CREATE INDEX sessions_updated ON sessions (updated)")
    # when the rows were last compared with the session folders: which boot of the machine, and the folders' own state
    db.execute(
        """CREATE TABLE comparison (
            only INTEGER PRIMARY KEY CHECK (only = 1), boot TEXT NOT NULL, folder TEXT NOT NULL)"""
    )


#: Migrations that only add columns, tables and indexes: whoever just reads can do without them.
ADDITIONS = frozenset({"002_tools", "003_traces", "002_names"})


def connect(
    path: Path, schema: Migrations, *, readonly: bool = False, create: bool = False, durable: bool = True
) -> Database:
    """Open the database at ``path`` and bring its schema up to date (never when ``readonly``).

    ``create`` makes the file if it is missing. A ``durable`` database survives power loss; one that is not survives
    a killed process only. A reader changes no content, works next to a writer and on a read-only file system.

    Raises StorageError if the file cannot be opened or was made by a newer version, CorruptSession if it is missing
    or no database of ours.
    """
    with storage_errors(path):
        if create:
            # Made here because SQLite would apply the umask only; its -wal and -shm copy this file's mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        elif not path.exists():
            raise CorruptSession(f"{path} is missing")
        conn = _reader(path) if readonly else _open(path, "mode=rw")
        try:
            db = Database(conn, execute_plugins=False)  # no hooks of other packages in our files
            if not readonly:
                conn.execute(f"PRAGMA journal_mode={'WAL' if durable else 'DELETE'}").fetchone()
                conn.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
                if not durable:  # the catalogue, the one where rows go: they leave no trace in the file
                    conn.execute("PRAGMA secure_delete=ON").fetchone()
            _bring_up_to_date(db, schema, path, readonly=readonly, create=create)
        except BaseException:
            conn.close()
            raise
    return db


@contextmanager
def transaction(conn: sqlite3.Connection) -> Iterator[None]:
    """One write transaction, rolled back on any exception.

    IMMEDIATE, because a deferred one that reads first can fail to become a writer.
    """
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        if conn.in_transaction:  # SQLite has already rolled back after some I/O errors
            conn.execute("ROLLBACK")
        raise


@contextmanager
def reading(conn: sqlite3.Connection) -> Iterator[None]:
    """One read transaction: everything inside is of one commit, whatever a writer does meanwhile."""
    conn.execute("BEGIN")
    try:
        yield
    finally:
        if conn.in_transaction:
            conn.execute("ROLLBACK")


def _open(path: Path, how: str) -> sqlite3.Connection:
    conn = sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,  # transactions begin where we say so
        check_same_thread=False,
    )
    try:
        conn.execute("PRAGMA foreign_keys=ON")
        conn.execute("PRAGMA trusted_schema=OFF")  # a session folder may come from elsewhere
        conn.execute("PRAGMA cell_size_check=ON")
        conn.execute("SELECT count(*) FROM sqlite_master").fetchone()  # SQLite opens the file only now
    except BaseException:
        conn.close()
        raise
    return conn


def _reader(path: Path) -> sqlite3.Connection:
    try:
        return _open(path, "mode=ro")
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) or not os.access(path, os.R_OK):
            raise
    # A WAL database needs its -shm file, which cannot be made here. Without a log the file alone is the database;
    # with one (a killed writer) `immutable` would not see the last commits, so read a private copy of both.
    log = path.with_name(path.name + "-wal")
    if not log.exists() or log.stat().st_size == 0:
        return _open(path, "immutable=1")
    with tempfile.TemporaryDirectory(prefix="infllm-agent-") as private:
        copy = Path(private) / path.name
        shutil.copyfile(path, copy)
        shutil.copyfile(log, copy.with_name(log.name))
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        with closing(_open(copy, "mode=rw")) as source:
            source.backup(memory)
    return memory


def _bring_up_to_date(db: Database, schema: Migrations, path: Path, *, readonly: bool, create: bool) -> None:
    if missing := _missing(db, schema, path, create=create):
        if readonly:
            if missing <= ADDITIONS:
                return
            raise StorageError(f"{path} was made by an older version; open it for writing once to upgrade it")
        with transaction(db.conn):
            # Asked again inside: another process may have upgraded it in the meantime.
            if _missing(db, schema, path, create=create):
                schema.apply(db)


def _missing(db: Database, schema: Migrations, path: Path, *, create: bool) -> frozenset[str]:
    """The migrations that are to be applied. Raises where this is no database that they could be applied to."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone():
        rows = db.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = ?", [schema.name]).fetchall()
        applied = {str(name) for (name,) in rows}
    else:
        applied = set()
    known = _names(schema)
    if applied - known:
        raise StorageError(f"{path} was made by a newer version ({max(applied - known)}); upgrade infllm-agent")
    if not applied and not create:
        raise CorruptSession(f"{path} is damaged: no database of infllm-agent")
    return known - applied


@cache
def _names(schema: Migrations) -> frozenset[str]:
    with closing(Database(memory=True, execute_plugins=False)) as empty:
        return frozenset(migration.name for migration in schema.pending(empty))
