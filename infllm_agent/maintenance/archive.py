"""A session as one file, to keep or to take elsewhere.

The file is a plain tar archive: ``session.db``, the tail, the block files in their order, and ``manifest.json`` with
the size and SHA-256 of each. What a member must be called, and how large a block file is, follows from those before
it; so an archive is read in one pass, and nothing in it decides where something is written.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from infllm_agent.errors import CorruptSession, InfLLMError, SessionExists, SessionLocked, StorageError
from infllm_agent.maintenance.archive_file import ArchiveReader, ArchiveWriter, Progress, Readable
from infllm_agent.maintenance.committed import Stored, copy_commit, no_damage
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import sync_folder, write_atomically
from infllm_agent.storage.catalog import SESSION_DATABASE, Catalog, SessionInfo, check_name
from infllm_agent.storage.database import SESSION_SCHEMA, connect, transaction
from infllm_agent.storage.integrity import FOREIGN, row_damages
from infllm_agent.storage.rows import Extent, copy_rows, write_generation, write_session
from infllm_agent.storage.session_store import SessionStore

_STATE = ("memory", "tail", "tail_crc", "arriving")  # what a commit's state says that lasts


# -- out ---------------------------------------------------------------------------------------------------------------


def export_session(
    root: str | PathLike[str], name: str, path: str | PathLike[str], *, progress: Progress = lambda size: None
) -> int:
    """Write a session to a file, as of its last commit; another process may go on with it meanwhile.

    The file appears under its name when it is complete, with mode 0600; one of that name is replaced.

    Args:
        progress: told of the bytes that were written, as it goes on.

    Returns:
        The size of the file in bytes.

    Raises:
        UnknownSession, InvalidName.
        CorruptSession: what is stored is damaged; nothing is written.
        StorageError.
    """
    path = Path(path)
    sizes = []
    with storage_errors(path):
        write_atomically(path, lambda file: sizes.append(write_archive(root, name, file, progress=progress)))
    return sizes[0]


def write_archive(
    root: str | PathLike[str], name: str, file: BinaryIO, *, progress: Progress = lambda size: None
) -> int:
    """Like ``export_session``, to an open file or pipe."""
    with suppress(SessionLocked, StorageError):  # what a killed process left is finished first
        SessionStore.open(root, name).close()
    catalog = Catalog(root)
    folder = catalog.folder(catalog.require(name))
    with tempfile.TemporaryDirectory(prefix="infllm-agent-") as temporary:
        private = Path(temporary)
        with _own_words(f'session "{name}" is damaged (sessions check says more)', {private: folder}):
            stored = copy_commit(folder, private)
            blocks = stored.blocks(private, elsewhere=folder)
            files = [] if blocks is None else [(path, size, _inode(path)) for path, size in blocks.files()]
            if blocks is not None:
                no_damage(blocks.damages())
        archive = ArchiveWriter(file, int(stored.head.updated), progress)
        archive.add(private / SESSION_DATABASE)
        if stored.tail is not None:
            archive.add(private / stored.tail)
        for path, size, inode in files:
            archive.add(path, size, inode)
        return archive.finish(stored)


# -- in ----------------------------------------------------------------------------------------------------------------


def import_session(
    root: str | PathLike[str],
    path: str | PathLike[str],
    name: str | None = None,
    *,
    progress: Progress = lambda size: None,
) -> SessionInfo:
    """Make a session of a file that ``export_session`` wrote. It is there, checked to the last byte, or not at all.

    Args:
        name: of the new session; None: the one that it was exported under.
        progress: told of the bytes that were read, as it goes on.

    Raises:
        SessionExists, InvalidName: of ``name``, or of the name in the file.
        CorruptSession: the file is no such archive, or damaged.
        StorageError: it cannot be read, or is of a newer version; there is no room.
    """
    with storage_errors(Path(path)), open(path, "rb") as file:
        return read_archive(root, file, name, origin=str(path), progress=progress)


def read_archive(
    root: str | PathLike[str],
    file: Readable,
    name: str | None = None,
    *,
    origin: str = "the archive",
    progress: Progress = lambda size: None,
) -> SessionInfo:
    """Like ``import_session``, from anything that reads like a file. ``origin`` is what errors call it."""
    catalog = Catalog(root)
    _check_free(catalog, name)
    with catalog.staging() as staged, _own_words(f"{origin}: refused", {staged: Path()}):
        folder = staged / "session"
        folder.mkdir(0o700)
        archive = ArchiveReader(file, progress)
        archive.take(staged / SESSION_DATABASE)
        stored = _copy_rows(staged / SESSION_DATABASE, folder / SESSION_DATABASE)
        name = name or stored.session.name
        _check_free(catalog, name)
        if stored.tail is not None:
            archive.take(folder / stored.tail)
        if (blocks := stored.blocks(folder)) is not None:
            for path, size in blocks.files():
                archive.take(path, size)
            no_damage(blocks.damages())
        archive.finish()
        _write_commit(folder, stored, name)
        sync_folder(folder)

        def fill(made: Path) -> None:
            for path in folder.iterdir():
                os.rename(path, made / path.name)

        with SessionStore.add(root, name, fill) as store:
            return store.info


def _check_free(catalog: Catalog, name: str | None) -> None:
    if name is not None and catalog.find(check_name(name)) is not None:
        raise SessionExists(f'session "{name}" already exists in {catalog.root}; give the new one another with --name')


def _copy_rows(source: Path, target: Path) -> Stored:
    """Copy the rows of an archive's database into one of our own making: nothing else of it is taken over."""
    with storage_errors(source), closing(connect(target, SESSION_SCHEMA, create=True)) as ours:
        _only_tables(source)
        with closing(connect(source, SESSION_SCHEMA)) as theirs:  # brings an older one up to date
            tables = "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '\\_%' ESCAPE '\\'"
            if sorted(theirs.execute(tables)) != sorted(ours.execute(tables)):
                raise CorruptSession("its session.db has other tables than a session")
            no_damage(row_damages(theirs.conn, source))
            stored = Stored.of(theirs.conn)
        ours.conn.execute("ATTACH ? AS source", (f"{source.as_uri()}?mode=ro",))
        with transaction(ours.conn):
            copy_rows(ours.conn, Extent(stored.head.messages, stored.head.tokens, stored.head.chunk_end))
    return stored


def _only_tables(path: Path) -> None:
    """Refuse a database in which reading a table may run an expression."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as conn:
        conn.execute("PRAGMA trusted_schema=OFF")
        for kind, sql in conn.execute("SELECT type, sql FROM sqlite_master"):
            if kind not in ("table", "index") or re.search(r"\bAS\b", str(sql), re.IGNORECASE):
                raise CorruptSession("its session.db has more than tables")


def _write_commit(folder: Path, stored: Stored, name: str) -> None:
    state = None if stored.state is None else {key: stored.state[key] for key in _STATE if key in stored.state}
    size = sum(path.stat().st_size for path in folder.iterdir())
    head = stored.head._replace(state=None if state is None else json.dumps(state), bytes_on_disk=size)
    with closing(connect(folder / SESSION_DATABASE, SESSION_SCHEMA)) as db, transaction(db.conn):
        write_session(db.conn, stored.session._replace(name=name))
        write_generation(db.conn, head)


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):  # which the check then says
        return path.stat().st_ino
    return None


@contextmanager
def _own_words(what: str, places: dict[Path, Path]) -> Iterator[None]:
    """Inside, damage is told as CorruptSession: ``what``, and how it shows, with some paths given as others."""
    try:
        yield
    except CorruptSession as error:
        text = str(error)
        for inside, outside in places.items():
            text = text.replace(f"{inside}/", f"{outside}/" if outside != Path() else "")
        raise CorruptSession(f"{what}: {text}") from error
    except InfLLMError:
        raise
    except FOREIGN as error:
        raise CorruptSession(f"{what}: {type(error).__name__}: {str(error)[:80]}") from error
