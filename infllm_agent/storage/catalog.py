"""A root folder of sessions: their names, folders and locks, and the catalogue that indexes them.

The folders are the truth. ``catalog.db`` only saves opening each of them: it may be deleted, damaged, outdated or
unwritable at any time, and what it does not know is read from the folders.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from infllm_agent.errors import CorruptSession, InfLLMError, InvalidName, SessionExists, StorageError, UnknownSession
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import sync_folder
from infllm_agent.platform.locks import WriterLock, exclusive
from infllm_agent.storage.catalog_index import CatalogIndex, Rows, SessionInfo, Stamp, log, read_info, this_boot
from infllm_agent.storage.database import SESSION_SCHEMA, connect

__all__ = ["SESSION_DATABASE", "Catalog", "SessionInfo", "check_name", "read_info"]

SESSION_DATABASE = "session.db"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
_ID = re.compile(r"[0-9a-f]{32}")
_BRANCH = re.compile(r"\.b[1-9][0-9]*")
_NEW, _DELETED, _STAGED = _LEFTOVERS = (".new-", ".deleted-", ".staged-")
#: A folder's times are those of the clock's last tick, which may be 10 ms ago; of some file systems, of the last second
#: or the one before. A change in the tick in which the folder was read would not show.
_TICK_NS, _COARSE_TICK_NS = 50_000_000, 2_500_000_000


class _Found(NamedTuple):
    """Sessions as the folders say.

    Attributes:
        infos: by id.
        problems: of each folder that neither the catalogue knows nor anybody can read.
        indexed: whether the catalogue now says the same.
    """

    infos: dict[str, SessionInfo]
    problems: dict[str, str]
    indexed: bool


def check_name(name: str) -> str:
    """Return a name that a session may have; raise InvalidName for any other."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidName(
            f"session name {str(name)[:140]!r}: 1 to 128 of the letters A-Z a-z, digits and _ . : -, "
            "starting with a letter or digit"
        )
    return name


class Catalog:
    """All sessions of one root. Holds nothing open between calls; any number of them may be in use at once.

    What a killed ``add``, ``delete`` or ``staging`` left behind is removed by the next who looks at the folders.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(os.path.realpath(root))
        self._sessions = self.root / "sessions"
        self._index = CatalogIndex(self.root / "catalog.db")

    def list(self) -> Sequence[SessionInfo]:
        """List every readable session, by name. Raises StorageError if the root cannot be read."""
        return sorted(self._current().infos.values(), key=lambda info: (info.name, info.id))

    def problems(self) -> Sequence[str]:
        """Return a line for each session folder that cannot be read, whether or not the catalogue knows its name."""
        return list(self._read(self._folder_ids())[1].values())

    def survey(self) -> tuple[dict[str, SessionInfo], dict[str, str]]:
        """Read every folder: the sessions by id, and what is wrong with each folder that cannot be read.

        Raises StorageError if the root cannot be read.
        """
        self._collect_leftovers()
        return self._read(self._folder_ids())

    def name_of(self, id: str) -> str | None:
        """Return the name that the catalogue has for a session, whose folder may be unreadable."""
        info = self._index.rows().infos.get(id)
        return info.name if info else None

    def strays(self) -> Sequence[Path]:
        """List what lies among the session folders without being one."""
        with storage_errors(self._sessions), suppress(FileNotFoundError), os.scandir(self._sessions) as entries:
            ours = (_NEW, _DELETED, _STAGED)
            return [
                Path(e.path)
                for e in entries
                if not e.name.startswith(ours) and not (_ID.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
            ]
        return []

    def damage(self) -> str | None:
        """Return what is wrong with the catalogue itself, in a line; None if it is whole, missing, or only behind."""
        if (damage := self._index.damage()) is not None:
            return damage
        rows = self._index.rows().infos
        for id, info in self._read(rows.keys() & self._folder_ids())[0].items():
            # Rows follow commits, so that one may be behind; one that is not says what the folder says.
            if rows[id].generation >= info.generation and rows[id] != info:
                return f'{self._index.path}: says of session "{info.name}" what its folder does not'
        return None

    def find(self, name: str) -> str | None:
        """Return the id of the session called ``name``, or None.

        Raises InvalidName, or StorageError if the root cannot be read or holds two sessions by that name (a folder
        was copied in by hand).
        """
        return self._only(name, self._named(check_name(name)).infos)

    def family(self, base: str) -> Sequence[SessionInfo]:
        """List the session called ``base`` and its branches, ``base.b2`` and so on, by name, as of their last commits.

        Raises InvalidName, StorageError.
        """
        found = self._named(check_name(base), family=True).infos.values()
        return sorted(found, key=lambda info: (info.name, info.id))

    def require(self, name: str) -> str:
        """Like ``find``, but raises UnknownSession, with the names there are, instead of returning None."""
        found = self._named(check_name(name))
        id = self._only(name, found.infos)
        if id is not None:
            return id
        if found.indexed:
            names, count = self._index.newest(5)
        else:
            known = sorted(self._current().infos.values(), key=lambda info: -info.updated)
            names, count = [info.name for info in known[:5]], len(known)
        listed = ", ".join(names) + (f" and {count - 5} more" if count > 5 else "")
        hint = f"; sessions there: {listed}" if names else "; there are none yet"
        if found.problems:
            hint += f"; not readable: {next(iter(found.problems.values()))}"
        raise UnknownSession(f'no session "{name}" in {self.root}{hint}')

    def _only(self, name: str, found: Collection[str]) -> str | None:
        if len(found) > 1:
            folders = ", ".join(sorted(found))
            raise StorageError(f'{self._sessions}: several folders hold a session "{name}" ({folders}); move one away')
        return next(iter(found), None)

    def rebuild(self) -> None:
        """Read every folder again and make the catalogue say what they say. Raises StorageError if it cannot.

        A folder that cannot be read keeps the line it had, and so its name.
        """
        ids = self._folder_ids()
        found, _ = self._read(ids)
        rows = self._index.rows().infos
        if self.damage():
            self._index.discard()
        kept = {id: info for id, info in (rows | found).items() if id in ids}
        self._index.store(kept.values(), rows.keys() - ids, replace=True)

    def delete(self, name: str) -> None:
        """Remove a session and all its bytes.

        Raises UnknownSession, InvalidName, SessionLocked if it is open for writing, StorageError if its files cannot
        be removed. Killed half-way, the session is either whole or gone; the next Catalog of the root removes the rest.
        """
        self._remove(self.require(name), name)

    def delete_unchanged(self, info: SessionInfo) -> bool:
        """Like ``delete``, but only if the last commit is still the one that ``info`` tells of; else False."""
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
        self._note((), (id,))
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
            if self._named(name, tidy=False).infos:  # tidying takes this lock, too
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
        self._note((info,), ())

    def _note(self, infos: Iterable[SessionInfo], gone: Iterable[str]) -> None:
        try:
            self._index.store(infos, gone)
        except InfLLMError as error:
            log.info("catalogue not updated: %s", error)

    def _named(self, name: str, *, family: bool = False, tidy: bool = True) -> _Found:
        """Find the sessions called ``name``, and its branches if its family is asked for. The catalogue alone is asked,
        unless something came or went among the folders since the two were last compared."""
        if (status := self._status()) is None:
            return _Found({}, {}, indexed=True)
        stamp, rows = _stamp(status), self._index.named(name, family=family)
        if rows.as_of == stamp and all(self._is_folder(id) for id in rows.infos):
            found = _Found(rows.infos, {}, indexed=True)
        elif rows.as_of is not None and rows.as_of.boot == stamp.boot:
            rows = self._index.named(name, family=family, all_ids=True)
            moved = {id for id in rows.infos if not self._is_folder(id)}
            found = self._compared(rows, known=set(rows.ids) - moved, tidy=tidy)
        else:
            found = self._current(tidy=tidy)
        infos = {
            id: info
            for id, info in found.infos.items()
            if info.name == name or (family and info.name.startswith(name) and _BRANCH.fullmatch(info.name, len(name)))
        }
        return found._replace(infos=infos)

    def _current(self, *, tidy: bool = True) -> _Found:
        """Find every session."""
        return self._compared(self._index.rows(), tidy=tidy)

    def _compared(self, rows: Rows, *, known: Collection[str] = (), tidy: bool) -> _Found:
        """Compare the catalogue with the folders, and make it follow them.

        Args:
            rows: those that are looked for, and the ids of all. They were read before the folders are: a row is written
                after its folder, so a row without folder was deleted, not just created.
            known: ids of which it need not be asked whether they are folders.

        Returns:
            Of the rows those that have a folder, and the sessions that the catalogue did not know.
        """
        now, status = time.time_ns(), self._status()
        there, unfinished = self._listed(known)
        found, problems = self._read(there - set(rows.ids))
        as_of = None
        if status is not None:
            as_of = _stamp(status)
            if problems or unfinished or not _shows_changes(status, now):
                as_of = as_of._replace(folder="")
            if as_of == rows.as_of or (not as_of.folder and rows.as_of is not None and as_of.boot == rows.as_of.boot):
                as_of = None  # nothing new
        indexed = self._index.follow(found.values(), set(rows.ids) - there, len(there), as_of)
        if tidy and unfinished:
            self._collect_leftovers()
        return _Found({id: info for id, info in (rows.infos | found).items() if id in there}, problems, indexed)

    def _status(self) -> os.stat_result | None:
        """Look at the folder of the sessions; None before the first session. Raises StorageError."""
        with storage_errors(self._sessions), suppress(FileNotFoundError):
            status = os.lstat(self._sessions)
            if stat.S_ISLNK(status.st_mode):
                raise StorageError(f"{self._sessions}: refused, because it is a symbolic link")
            return status
        return None

    def _folder_ids(self) -> set[str]:
        return self._listed()[0]

    def _listed(self, known: Collection[str] = ()) -> tuple[set[str], bool]:
        """List the ids of the sessions that are there, and tell whether anything beside them is under way or left
        behind. Raises StorageError."""
        ids, unfinished = set(), False
        if self._status() is not None:
            with storage_errors(self._sessions), suppress(FileNotFoundError), os.scandir(self._sessions) as entries:
                for entry in entries:
                    name = entry.name
                    if name in known or (_ID.fullmatch(name) and entry.is_dir(follow_symlinks=False)):
                        ids.add(name)
                    elif name.startswith(_LEFTOVERS):
                        unfinished = True
        return ids, unfinished

    def _is_folder(self, id: str) -> bool:
        try:
            return stat.S_ISDIR(os.lstat(self._sessions / id).st_mode)
        except OSError:
            return False

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

    def _make_root(self) -> None:
        with storage_errors(self._sessions):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self._sessions.mkdir(mode=0o700)
                sync_folder(self.root)
            self._status()  # refuses a symbolic link

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
            return [self._sessions / e.name for e in entries if e.name.startswith(_LEFTOVERS)]


def _stamp(status: os.stat_result) -> Stamp:
    """What ``CatalogIndex`` keeps of a folder."""
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return Stamp(this_boot(), " ".join(map(str, (status.st_dev, status.st_ino, status.st_nlink, *times))))


def _shows_changes(status: os.stat_result, now: int) -> bool:
    """Whether a change of a folder from now (in ns) on would give it another time."""
    coarse = status.st_mtime_ns % 1_000_000_000 == 0
    return now - max(status.st_mtime_ns, status.st_ctime_ns) > (_COARSE_TICK_NS if coarse else _TICK_NS)
