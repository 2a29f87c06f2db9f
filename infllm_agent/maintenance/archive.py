"""A session as one file, to keep or to take elsewhere.

The file is a plain tar archive: ``session.db``, the tail, the block files in their order, and ``manifest.json`` with
the size and SHA-256 of each. What a member must be called, and how large a block file is, follows from those before
it; so an archive is read in one pass, and nothing in it decides where something is written. Each header is read by
itself: links, sparse files and tar's extensions are refused, never followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.errors import CorruptSession, InfLLMError, SessionExists, SessionLocked, StorageError
from infllm_agent.maintenance.check import stored_blocks
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import new_file, sync_folder, write_atomically
from infllm_agent.storage.catalog import SESSION_DATABASE, Catalog, SessionInfo, check_name
from infllm_agent.storage.database import SESSION_SCHEMA, connect, transaction
from infllm_agent.storage.integrity import FOREIGN, row_damages
from infllm_agent.storage.rows import (
    Extent,
    Generation,
    SessionRow,
    copy_rows,
    read_generation,
    read_session,
    write_generation,
    write_session,
)
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.storage.tail import TAIL_NAME

FORMAT = 1
#: The folder that an archive unpacks to. Those of another format have another.
FOLDER = f"infllm-session-{FORMAT}"
MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 << 20
PIECE = 1 << 20

_FOLDER = re.compile(r"infllm-session-(\d+)/")
_STATE = ("memory", "tail", "tail_crc", "arriving")  # what a commit's state says that lasts

Progress = Callable[[int], None]


class Readable(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end."""
        ...


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
    """As ``export_session``, to an open file or pipe."""
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
                _no_damage(blocks.damages())
        archive = _Writer(file, int(stored.head.updated), progress)
        archive.add(private / SESSION_DATABASE)
        if stored.tail is not None:
            archive.add(private / stored.tail)
        for path, size, inode in files:
            archive.add(path, size, inode)
        return archive.finish(stored)


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
                _no_damage(row_damages(upgraded.conn, copied))
                stored = Stored.of(upgraded.conn)
            if stored.tail is not None and tail is not None:
                with open(private / stored.tail, "xb") as file:
                    shutil.copyfileobj(tail, file, PIECE)
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


class _Writer:
    """A tar archive under way."""

    def __init__(self, file: BinaryIO, time: int, progress: Progress) -> None:
        self._file = file
        self._time = time
        self._progress = progress
        self._members: list[dict[str, Any]] = []
        self._size = 0

    def add(self, path: Path, size: int | None = None, inode: int | None = None) -> None:
        """A file, or its first bytes. Raises CorruptSession if it is another file than the one by that inode."""
        with storage_errors(path), path.open("rb") as source:
            if inode not in (None, os.fstat(source.fileno()).st_ino):
                raise CorruptSession(f"{path}: the session was rebuilt while it was exported; export it again")
            size = os.fstat(source.fileno()).st_size if size is None else size
            self._head(path.name, size)
            digest, left = hashlib.sha256(), size
            while left:
                if not (piece := source.read(min(PIECE, left))):
                    raise CorruptSession(f"{path}: became shorter while it was read")
                digest.update(piece)
                self._write(piece)
                left -= len(piece)
        self._pad()
        self._members.append({"name": path.name, "size": size, "sha256": digest.hexdigest()})

    def finish(self, stored: Stored) -> int:
        """Write the manifest and the archive's end. Returns the archive's size."""
        head = stored.head
        manifest = {
            "format": FORMAT,
            "session": stored.session.name,
            "model": stored.fingerprint.get("model"),
            "messages": head.messages,
            "tokens": head.tokens,
            "blocks": head.blocks,
            "created": stored.session.created,
            "updated": head.updated,
            "members": self._members,
        }
        data = json.dumps(manifest, indent=1).encode()
        self._head(MANIFEST, len(data))
        self._write(data)
        self._pad()
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self._size

    def _head(self, name: str, size: int) -> None:
        info = tarfile.TarInfo(f"{FOLDER}/{name}")
        info.size, info.mtime, info.mode = size, self._time, 0o600
        self._write(info.tobuf(tarfile.GNU_FORMAT))

    def _pad(self) -> None:
        self._write(bytes(-self._size % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)
        self._progress(len(data))


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
    """As ``import_session``, from an open file or pipe, or whatever reads as one. ``origin`` is what errors call it."""
    catalog = Catalog(root)
    _check_free(catalog, name)
    with catalog.staging() as staged, _own_words(f"{origin}: refused", {staged: Path()}):
        folder = staged / "session"
        folder.mkdir(0o700)
        archive = _Reader(file, progress)
        archive.take(staged / SESSION_DATABASE)
        stored = _copy_rows(staged / SESSION_DATABASE, folder / SESSION_DATABASE)
        name = name or stored.session.name
        _check_free(catalog, name)
        if stored.tail is not None:
            archive.take(folder / stored.tail)
        if (blocks := stored.blocks(folder)) is not None:
            for path, size in blocks.files():
                archive.take(path, size)
            _no_damage(blocks.damages())
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
            _no_damage(row_damages(theirs.conn, source))
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


class _Reader:
    """A tar archive that is read, member by member as they are expected."""

    def __init__(self, file: Readable, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self._members: list[dict[str, Any]] = []

    def take(self, path: Path, size: int | None = None) -> None:
        """Write the next member, which must be called so, to a new file, and fsync it.

        Raises CorruptSession if it is another, or not of that size.
        """
        found = self._head(path.name)
        if size not in (None, found):
            raise CorruptSession(f"{path.name} has {found} bytes; it is of {size}")
        digest, left = hashlib.sha256(), found
        with new_file(path) as made:
            while left:
                piece = self._exactly(min(PIECE, left))
                digest.update(piece)
                made.write(piece)
                left -= len(piece)
        self._exactly(-found % tarfile.BLOCKSIZE)
        self._members.append({"name": path.name, "size": found, "sha256": digest.hexdigest()})

    def finish(self) -> None:
        """Compare all that was taken with the manifest, behind which nothing may follow."""
        size = self._head(MANIFEST)
        if size > MANIFEST_BYTES:
            raise CorruptSession(f"{MANIFEST} has {size} bytes, more than any session needs")
        manifest = json.loads(self._exactly(size))
        if manifest["format"] != FORMAT or manifest["members"] != self._members:
            raise CorruptSession(f"what it holds is not what its {MANIFEST} says")
        while piece := self._read(PIECE):
            if any(piece):
                raise CorruptSession(f"something follows its {MANIFEST}")

    def _head(self, name: str) -> int:
        """Read a member's header. Returns the member's size."""
        try:
            info = tarfile.TarInfo.frombuf(self._exactly(tarfile.BLOCKSIZE), "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise CorruptSession(f"no tar archive of a session: {error} where {name} should be") from None
        version = _FOLDER.match(info.name)
        if version and version[1] != str(FORMAT):
            raise StorageError(f"it was made by another version (format {version[1][:20]}); upgrade infllm-agent")
        if info.name != f"{FOLDER}/{name}" or info.type != tarfile.REGTYPE or info.size < 0:
            raise CorruptSession(f"{info.name[:140]!r} is where the file {FOLDER}/{name} should be")
        return info.size

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not (piece := self._read(size - len(data))):
                raise CorruptSession("it ends too early")
            data += piece
        return bytes(data)

    def _read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self._progress(len(piece))
        return piece


def _no_damage(found: Iterable[str]) -> None:
    for damage in found:
        raise CorruptSession(damage)


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
