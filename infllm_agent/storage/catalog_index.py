"""``catalog.db``: what a list of sessions shows, a row for each, so that not every folder need be opened.

It is an index, made again from the folders whenever it is missing, damaged or behind. It is not synced, so what it says
after a power cut is believed only after a comparison (``Rows.as_of``).
"""

from __future__ import annotations

import json
import logging
import sqlite3
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from infllm_agent.errors import CorruptSession, InfLLMError
from infllm_agent.platform.faults import storage_errors
from infllm_agent.storage.database import CATALOG_SCHEMA, connect, reading, transaction
from infllm_agent.storage.rows import read_generation, read_session

log = logging.getLogger(__name__)
T = TypeVar("T")

_COLUMNS = ("id", "name", "generation", "messages", "tokens", "blocks", "bytes_on_disk", "created", "updated", "model")
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM sessions"
#: Of a name, and of it and its branches: a range of the index, from ``name.b`` to before ``name.c``.
_BY_NAME = f"{_SELECT} WHERE name = ?1"
_BY_FAMILY = f"{_BY_NAME} OR (name >= ?1 || '.b' AND name < ?1 || '.c')"


@dataclass(frozen=True)
class SessionInfo:
    """What a list of sessions shows. Times are unix seconds; ``model`` is the fingerprint's entry of that name.

    ``bytes`` has device, host and disk; the first two are 0 here, as a session at rest is on disk only.
    """

    name: str
    id: str
    generation: int
    messages: int
    tokens: int
    blocks: int
    bytes: dict[str, int]
    created: float
    updated: float
    model: str


def read_info(conn: sqlite3.Connection, id: str) -> SessionInfo:
    """A session's line in the catalogue, read from its own database. Call it inside ``storage_errors``."""
    session, last = read_session(conn), read_generation(conn)
    return SessionInfo(
        name=session.name,
        id=id,
        generation=last.number,
        messages=last.messages,
        tokens=last.tokens,
        blocks=last.blocks,
        bytes={"device": 0, "host": 0, "disk": last.bytes_on_disk},
        created=session.created,
        updated=last.updated,
        model=str(json.loads(session.fingerprint).get("model", "")),
    )


class Stamp(NamedTuple):
    """Tells whether a folder's entries are still those that were compared with the rows.

    Attributes:
        boot: of the machine. Rows that another boot has written are not believed: nothing here is synced.
        folder: what the system says of the folder; any entry that comes or goes changes it. Empty: it was changing.
    """

    boot: str
    folder: str


class Rows(NamedTuple):
    """Some rows of the catalogue.

    Attributes:
        infos: by id.
        as_of: when all rows were last what the folders say; None: it is not known.
        ids: of all rows, where they were asked for.
    """

    infos: dict[str, SessionInfo]
    as_of: Stamp | None = None
    ids: Collection[str] = ()


class CatalogIndex:
    """The file ``catalog.db``. Holds nothing open between calls."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Rows:
        """Read every row; none if the file is missing or unusable."""

        def look(conn: sqlite3.Connection) -> Rows:
            with reading(conn):
                infos = _infos(conn.execute(_SELECT))
                return Rows(infos, _compared(conn), infos.keys())

        return self._ask(look) or Rows({})

    def named(self, name: str, *, family: bool = False, all_ids: bool = False) -> Rows:
        """Look up the sessions of a name, or of its family; some other names may be among them. None if the file is
        unusable."""

        def look(conn: sqlite3.Connection) -> Rows:
            with reading(conn):
                infos = _infos(conn.execute(_BY_FAMILY if family else _BY_NAME, (name,)))
                ids = {id for (id,) in conn.execute("SELECT id FROM sessions")} if all_ids else ()
                return Rows(infos, _compared(conn), ids)

        return self._ask(look) or Rows({})

    def newest(self, limit: int) -> tuple[list[str], int]:
        """Return the names of the sessions with the latest commits, and the number of all sessions."""

        def look(conn: sqlite3.Connection) -> tuple[list[str], int]:
            names = conn.execute("SELECT name FROM sessions ORDER BY updated DESC LIMIT ?", (limit,)).fetchall()
            return [name for (name,) in names], int(conn.execute("SELECT count(*) FROM sessions").fetchone()[0])

        return self._ask(look) or ([], 0)

    def damage(self) -> str | None:
        """Return what is wrong with the file, in a line; None if it is whole or missing. Raises StorageError."""
        if not self.path.exists():
            return None
        try:
            with storage_errors(self.path), closing(connect(self.path, CATALOG_SCHEMA, readonly=True)) as db:
                result = str(db.conn.execute("PRAGMA integrity_check(1)").fetchone()[0])
        except CorruptSession as error:
            return str(error)
        return None if result == "ok" else f"{self.path} is damaged: {result}"

    def store(self, infos: Iterable[SessionInfo], gone: Iterable[str] = (), *, replace: bool = False) -> None:
        """Write rows and remove others; a file that is damaged is made anew. Raises StorageError.

        Args:
            replace: write them even if there are rows of later generations.
        """
        infos, gone = list(infos), list(gone)
        try:
            self._write(infos, gone, replace=replace)
        except CorruptSession:
            self.discard()
            self._write(infos, gone, replace=replace)

    def follow(self, infos: Iterable[SessionInfo], gone: Iterable[str], count: int, as_of: Stamp | None) -> bool:
        """Write what a comparison with the folders has found. Returns whether that worked.

        Args:
            count: how many sessions there are.
            as_of: when the folders were read, if that is to be kept.
        """
        infos, gone = list(infos), list(gone)
        if not (infos or gone or (as_of and self.path.exists())):  # looking at an empty root leaves no file
            return True
        try:
            try:
                self._write(infos, gone, count=count, as_of=as_of)
            except CorruptSession:
                self.store(infos, gone)
        except InfLLMError as error:
            log.info("catalogue not updated: %s", error)
            return False
        return True

    def discard(self) -> None:
        """Remove the file. Raises StorageError."""
        with storage_errors(self.path):
            for suffix in ("", "-journal", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _ask(self, look: Callable[[sqlite3.Connection], T]) -> T | None:
        """Return what ``look`` finds; None if the file is missing or unusable."""
        if not self.path.exists():
            return None
        try:
            with storage_errors(self.path), closing(connect(self.path, CATALOG_SCHEMA, readonly=True)) as db:
                return look(db.conn)
        except InfLLMError as error:
            log.info("catalogue not readable, the session folders are read instead: %s", error)
            return None

    def _write(
        self,
        infos: list[SessionInfo],
        gone: list[str],
        *,
        replace: bool = False,
        count: int = 0,
        as_of: Stamp | None = None,
    ) -> None:
        # Whoever read a folder may come here later than the commit that followed: never go back a generation.
        guard = "" if replace else " WHERE excluded.generation >= sessions.generation"
        updates = ", ".join(f"{column} = excluded.{column}" for column in _COLUMNS)
        with (
            storage_errors(self.path),
            closing(connect(self.path, CATALOG_SCHEMA, create=True, durable=False)) as db,
            transaction(db.conn),
        ):
            conn = db.conn
            if as_of is not None and not conn.execute("SELECT 1 FROM comparison WHERE boot = ?", as_of[:1]).fetchone():
                conn.execute("REINDEX")  # a power cut may have kept rows, and lost what points to them
            conn.executemany(
                f"INSERT INTO sessions ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
                f" ON CONFLICT (id) DO UPDATE SET {updates}{guard}",
                [_as_row(info) for info in infos],
            )
            conn.executemany("DELETE FROM sessions WHERE id = ?", [(id,) for id in gone])
            if gone:  # by who looked at the folders long ago, perhaps: they may be there again
                conn.execute("UPDATE comparison SET folder = ''")
            if as_of is not None and conn.execute("SELECT count(*) FROM sessions").fetchone()[0] == count:
                conn.execute("INSERT OR REPLACE INTO comparison VALUES (1, ?, ?)", as_of)


@cache
def this_boot() -> str:
    """A name for the time since the machine was started; where the system has none, for this process's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        return uuid.uuid4().hex


def _compared(conn: sqlite3.Connection) -> Stamp | None:
    if conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'comparison'").fetchone() is None:
        return None  # made by an older version
    row = conn.execute("SELECT boot, folder FROM comparison").fetchone()
    return Stamp(*row) if row else None


def _infos(rows: Iterable[tuple[Any, ...]]) -> dict[str, SessionInfo]:
    return {row[0]: _from_row(row) for row in rows}


def _as_row(info: SessionInfo) -> tuple[object, ...]:
    """The values of ``_COLUMNS``."""
    return tuple(info.bytes["disk"] if column == "bytes_on_disk" else getattr(info, column) for column in _COLUMNS)


def _from_row(row: tuple[Any, ...]) -> SessionInfo:
    values = dict(zip(_COLUMNS, row, strict=True))
    sizes = {"device": 0, "host": 0, "disk": values.pop("bytes_on_disk")}
    return SessionInfo(bytes=sizes, **values)
