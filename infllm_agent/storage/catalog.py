"""A root folder of sessions: their names, folders and locks, and the catalogue that indexes them.

The folders are the truth. ``catalog.db`` only saves opening each of them: it may be deleted, damaged, outdated or
unwritable at any time, and what it does not know is read from the folders.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infllm_agent.errors import CorruptSession, InfLLMError, InvalidName, SessionExists, StorageError, UnknownSession
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import sync_folder
from infllm_agent.platform.locks import WriterLock, exclusive
from infllm_agent.storage.database import CATALOG_SCHEMA, SESSION_SCHEMA, connect, transaction
from infllm_agent.storage.rows import read_generation, read_session

log = logging.getLogger(__name__)

SESSION_DATABASE = "session.db"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
_ID = re.compile(r"[0-9a-f]{32}")
_NEW, _DELETED, _STAGED = ".new-", ".deleted-", ".staged-"
_COLUMNS = ("id", "name", "generation", "messages", "tokens", "blocks", "bytes_on_disk", "created", "updated", "model")


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


def check_name(name: str) -> str:
    """The name itself, if a session may be called so; else InvalidName."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidName(
            f"session name {str(name)[:140]!r}: 1 to 128 of the letters A-Z a-z, digits and _ . : -, "
            "starting with a letter or digit"
        )
    return name


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


class Catalog:
    """All sessions of one root. Holds nothing open between calls; any number of them may be in use at once."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Writes nothing, except that it removes what a killed ``add``, ``delete`` or ``staging`` left behind."""
        self.root = Path(os.path.realpath(root))
        self._sessions = self.root / "sessions"
        self._index = self.root / "catalog.db"
        self._collect_leftovers()

    def list(self) -> Sequence[SessionInfo]:
        """Every readable session, by name. Raises StorageError if the root cannot be read."""
        return sorted(self._current()[0].values(), key=lambda info: (info.name, info.id))

    def problems(self) -> Sequence[str]:
        """One line for each session folder that cannot be read, whether or not the catalogue still knows its name."""
        return list(self._read(self._folder_ids())[1].values())

    def survey(self) -> tuple[dict[str, SessionInfo], dict[str, str]]:
        """Every session by id, read from its folder; and of each folder that cannot be read, what is wrong with it.

        Raises StorageError if the root cannot be read.
        """
        return self._read(self._folder_ids())

    def name_of(self, id: str) -> str | None:
        """What the catalogue calls a session, whose folder may be unreadable."""
        info = self._rows().get(id)
        return info.name if info else None

    def strays(self) -> Sequence[Path]:
        """What lies among the session folders and is none."""
        with storage_errors(self._sessions), suppress(FileNotFoundError), os.scandir(self._sessions) as entries:
            ours = (_NEW, _DELETED, _STAGED)
            return [
                Path(e.path)
                for e in entries
                if not e.name.startswith(ours) and not (_ID.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
            ]
        return []

    def damage(self) -> str | None:
        """What is wrong with the catalogue itself, in a line; None if it is whole, missing, or only behind."""
        if not self._index.exists():
            return None
        try:
            with storage_errors(self._index), closing(connect(self._index, CATALOG_SCHEMA, readonly=True)) as db:
                result = str(db.conn.execute("PRAGMA integrity_check(1)").fetchone()[0])
                if result != "ok":
                    return f"{self._index} is damaged: {result}"
        except CorruptSession as error:
            return str(error)
        rows = self._rows()
        for id, info in self._read(rows.keys() & self._folder_ids())[0].items():
            # Rows follow commits, so that one may be behind; one that is not says what the folder says.
            if rows[id].generation >= info.generation and rows[id] != info:
                return f'{self._index}: says of session "{info.name}" what its folder does not'
        return None

    def find(self, name: str) -> str | None:
        """The id of the session called ``name``, or None.

        Raises InvalidName, or StorageError if the root cannot be read or holds two sessions by that name (a folder
        was copied in by hand).
        """
        check_name(name)
        ids = [id for id, info in self._current()[0].items() if info.name == name]
        if len(ids) > 1:
            folders = ", ".join(sorted(ids))
            raise StorageError(f'{self._sessions}: several folders hold a session "{name}" ({folders}); move one away')
        return ids[0] if ids else None

    def require(self, name: str) -> str:
        """As ``find``, but raises UnknownSession, with the names there are, instead of returning None."""
        id = self.find(name)
        if id is not None:
            return id
        known, problems = self._current()
        names = [info.name for info in sorted(known.values(), key=lambda info: -info.updated)]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        hint = f"; sessions there: {listed}" if names else "; there are none yet"
        if problems:
            hint += f"; not readable: {next(iter(problems.values()))}"
        raise UnknownSession(f'no session "{name}" in {self.root}{hint}')

    def rebuild(self) -> None:
        """Read every folder again and make the catalogue say what they say. Raises StorageError if it cannot.

        A folder that cannot be read keeps the line it had, and so its name.
        """
        ids = self._folder_ids()
        found, _ = self._read(ids)
        rows = self._rows()
        if self.damage():
            self._discard()
        kept = {id: info for id, info in (rows | found).items() if id in ids}
        self._store(kept.values(), rows.keys() - ids, replace=True)

    def delete(self, name: str) -> None:
        """Remove a session and all its bytes.

        Raises UnknownSession, InvalidName, SessionLocked if it is open for writing, StorageError if its files cannot
        be removed. Killed half-way, the session is either whole or gone; the next Catalog of the root removes the rest.
        """
        self._remove(self.require(name), name)

    def delete_unchanged(self, info: SessionInfo) -> bool:
        """As ``delete``, but only if the session's last commit is still the one that ``info`` tells of; else False."""
        return self._remove(info.id, info.name, info.generation)

    def _remove(self, id: str, name: str, generation: int | None = None) -> bool:
        folder = self.folder(id)
        lock = WriterLock(folder, name)
        try:
            if generation is not None:
                now = self._read([id])[0].get(id)
                if now is None or now.generation != generation:
                    return False
            doomed = self._sessions / (_DELETED + id)
            with storage_errors(folder):
                os.rename(folder, doomed)
                sync_folder(self._sessions)
                while doomed.exists():
                    with suppress(FileNotFoundError):  # another process collects leftovers at the same time
                        shutil.rmtree(doomed)
        finally:
            lock.release()
        self._store_if_possible((), (id,))
        return True

    def folder(self, id: str) -> Path:
        """The folder of a session. Raises StorageError if it, or anything in it, is a symbolic link."""
        folder = self._sessions / id
        if not _ID.fullmatch(id):
            raise InvalidName(f"no session id: {id[:140]!r}")
        with storage_errors(folder):
            if os.path.realpath(folder) != str(folder):
                raise StorageError(f"{folder}: refused, because symbolic links lead to it")
            with suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        raise StorageError(f"{entry.path}: refused, because it is a symbolic link")
        return folder

    def add(self, name: str, fill: Callable[[Path], None]) -> tuple[str, WriterLock]:
        """Make a session folder, its content written by ``fill``, and return its id with the lock already taken.

        Of several processes that add one name, one wins and the others get SessionExists. Raises InvalidName and
        StorageError too; the folder then does not exist.
        """
        check_name(name)
        self._make_root()
        with exclusive(self._sessions):
            if self.find(name) is not None:
                raise SessionExists(f'session "{name}" already exists in {self.root}')
            id = uuid.uuid4().hex
            prepared = self._sessions / (_NEW + id)
            lock = None
            try:
                with storage_errors(prepared):
                    os.mkdir(prepared, 0o700)
                    fill(prepared)
                    lock = WriterLock(prepared, name)
                    sync_folder(prepared)
                    os.rename(prepared, self._sessions / id)
                    sync_folder(self._sessions)
            except BaseException:
                if lock is not None:
                    lock.release()
                shutil.rmtree(prepared, ignore_errors=True)
                raise
        return id, lock

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder, on the file system of the sessions, for what takes long to prepare and ``add`` then moves
        in. It is removed at the end; that of a killed process, by the next Catalog. Raises StorageError."""
        self._make_root()
        staged = self._sessions / (_STAGED + uuid.uuid4().hex)
        with ExitStack() as held:
            with exclusive(self._sessions), storage_errors(staged):  # leftovers are collected under this lock
                os.mkdir(staged, 0o700)
                held.callback(shutil.rmtree, staged, ignore_errors=True)
                held.enter_context(exclusive(staged))
            yield staged

    def record(self, info: SessionInfo) -> None:
        """Note a session's new figures. Never fails: the catalogue is an index, and the folder has the truth."""
        self._store_if_possible((info,), ())

    def _current(self) -> tuple[dict[str, SessionInfo], dict[str, str]]:
        """Sessions by id, and the problem of each folder that is neither in the catalogue nor readable."""
        # The rows first: a row is written after its folder, so a row without folder was deleted, not just created.
        rows = self._rows()
        ids = self._folder_ids()
        found, problems = self._read(ids - rows.keys())
        gone = rows.keys() - ids
        if found or gone:
            self._store_if_possible(found.values(), gone)
        return {id: info for id, info in (rows | found).items() if id in ids}, problems

    def _folder_ids(self) -> set[str]:
        with storage_errors(self._sessions):
            try:
                if self._sessions.is_symlink():
                    raise StorageError(f"{self._sessions}: refused, because it is a symbolic link")
                with os.scandir(self._sessions) as entries:
                    return {e.name for e in entries if _ID.fullmatch(e.name) and e.is_dir(follow_symlinks=False)}
            except FileNotFoundError:
                return set()

    def _read(self, ids: Iterable[str]) -> tuple[dict[str, SessionInfo], dict[str, str]]:
        found, problems = {}, {}
        for id in ids:
            try:
                path = self.folder(id) / SESSION_DATABASE
                with storage_errors(path), closing(connect(path, SESSION_SCHEMA, readonly=True)) as db:
                    found[id] = read_info(db.conn, id)
            except (StorageError, CorruptSession) as error:
                if (self._sessions / id).exists():  # else it was deleted while we looked
                    problems[id] = str(error)
        return found, problems

    def _rows(self) -> dict[str, SessionInfo]:
        """What the catalogue says; nothing if it is missing or unusable."""
        if not self._index.exists():
            return {}
        try:
            with storage_errors(self._index), closing(connect(self._index, CATALOG_SCHEMA, readonly=True)) as db:
                rows = db.conn.execute(f"SELECT {', '.join(_COLUMNS)} FROM sessions").fetchall()
        except InfLLMError as error:
            log.info("catalogue not readable, the session folders are read instead: %s", error)
            return {}
        return {row[0]: _from_row(row) for row in rows}

    def _store_if_possible(self, infos: Iterable[SessionInfo], gone: Iterable[str]) -> None:
        try:
            self._store(infos, gone)
        except InfLLMError as error:
            log.info("catalogue not updated: %s", error)

    def _store(self, infos: Iterable[SessionInfo], gone: Iterable[str], *, replace: bool = False) -> None:
        infos, gone = list(infos), list(gone)
        try:
            self._write(infos, gone, replace=replace)
        except CorruptSession:
            self._discard()
            self._write(infos, gone, replace=replace)

    def _discard(self) -> None:
        with storage_errors(self._index):
            for suffix in ("", "-journal", "-wal", "-shm"):
                self._index.with_name(self._index.name + suffix).unlink(missing_ok=True)

    def _write(self, infos: Iterable[SessionInfo], gone: Iterable[str], *, replace: bool) -> None:
        # Whoever read a folder may come here later than the commit that followed: never go back a generation.
        guard = "" if replace else " WHERE excluded.generation >= sessions.generation"
        updates = ", ".join(f"{column} = excluded.{column}" for column in _COLUMNS)
        with (
            storage_errors(self._index),
            closing(connect(self._index, CATALOG_SCHEMA, create=True, durable=False)) as db,
            transaction(db.conn),
        ):
            db.conn.executemany(
                f"INSERT INTO sessions ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
                f" ON CONFLICT (id) DO UPDATE SET {updates}{guard}",
                [_as_row(info) for info in infos],
            )
            db.conn.executemany("DELETE FROM sessions WHERE id = ?", [(id,) for id in gone])

    def _make_root(self) -> None:
        with storage_errors(self._sessions):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self._sessions.mkdir(mode=0o700)
                sync_folder(self.root)
            self._folder_ids()  # refuses a symbolic link

    def _collect_leftovers(self) -> None:
        # On a root that we cannot write to, they stay; they are never taken for sessions.
        with suppress(OSError, StorageError):
            if self._leftovers():
                with exclusive(self._sessions):  # whoever adds holds this lock, so what is there now is nobody's
                    for path in self._leftovers():
                        with suppress(StorageError), exclusive(path, seconds=0):  # a staging folder may be in use
                            shutil.rmtree(path, ignore_errors=True)

    def _leftovers(self) -> Sequence[Path]:
        with os.scandir(self._sessions) as entries:
            return [self._sessions / e.name for e in entries if e.name.startswith((_NEW, _DELETED, _STAGED))]


def _as_row(info: SessionInfo) -> tuple[object, ...]:
    """The values of ``_COLUMNS``."""
    return tuple(info.bytes["disk"] if column == "bytes_on_disk" else getattr(info, column) for column in _COLUMNS)


def _from_row(row: tuple[Any, ...]) -> SessionInfo:
    values = dict(zip(_COLUMNS, row, strict=True))
    sizes = {"device": 0, "host": 0, "disk": values.pop("bytes_on_disk")}
    return SessionInfo(bytes=sizes, **values)
