"""Sessions in an object store: published as of a commit, fetched elsewhere, their blocks only when they are needed.

SQLite cannot live in an object store, so the folder of a session is always on a local disk; the bucket has what other
machines need to go on from a commit. Everything in it is written once:

    sessions/<digest of the name>/<number>.json    the manifest of a published commit; the one with the highest number
                                                   that is whole counts
    sessions/<digest of the name>/<id>.db, .tail   its database and tail
    segments/<segment's id>/<first>-<stop>-<id>    blocks (``blocks.remote``)

A manifest is written last and names the next number, so an upload that is killed changes nothing, and of two machines
that go on from one commit the second fails: at once where the store can create an object only if there is none (S3,
local files), else as soon as it looks.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from infllm_agent.blocks.remote import Origin, bucket_errors, open_bucket, part_name
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.errors import BucketError, CorruptSession, Diverged, InfLLMError, UnknownSession
from infllm_agent.maintenance.committed import Stored, copy_commit
from infllm_agent.maintenance.manifest import Manifest
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import write_atomically
from infllm_agent.storage.catalog import SESSION_DATABASE, Catalog, check_name
from infllm_agent.storage.session_store import SessionStore


class Published(NamedTuple):
    """What a publication took: objects and bytes that were uploaded."""

    objects: int
    bytes: int


class Bucket:
    """A place in an object store.

    Args:
        url: as fsspec takes it: ``s3://bucket/path``, ``gs://...``, ``file:///mnt/...``, ``memory://...``.

    Besides what they name, all methods raise BucketError if the store cannot be reached, and CorruptSession if what it
    holds is damaged.
    """

    def __init__(self, url: str) -> None:
        """
        Raises:
            ConfigError: fsspec knows no such store, or lacks a package for it.
        """
        self.url = url.rstrip("/")
        self._fs, self._path = open_bucket(self.url)

    def publish(self, root: str | PathLike[str], name: str) -> Published:
        """Make a session's last commit the one that others go on from. What the bucket has already is not sent again,
        but for database and tail. The session may be open in this process, or none.

        Raises:
            UnknownSession.
            Diverged: another machine has published meanwhile; the local session is left as it is.
        """
        catalog = Catalog(root)
        folder = catalog.folder(catalog.require(name))
        found = self._list(self._session(name))  # before the last manifest is read: what comes later is of a later one
        last, origin = self._newest(name), self._origin(folder)
        if last is not None and last.id in origin.publishing:  # the process ended just behind it
            origin = Origin(self.url, last.id, last.generation, (), last.parts)
        if not self._continues(origin, last):
            raise self._diverged(name, last)
        with tempfile.TemporaryDirectory(prefix="infllm-agent-") as temporary:
            private = Path(temporary)
            stored = copy_commit(folder, private)
            generation = stored.head.number
            if origin.base is not None and generation == origin.generation:
                return Published(0, 0)
            blocks = stored.blocks(private, elsewhere=folder)
            database = (private / SESSION_DATABASE).read_bytes()
            tail = b"" if stored.tail is None else (private / stored.tail).read_bytes()
            id = uuid.uuid4().hex
            new = Manifest(
                1 + max(self._numbers(self._session(name)), default=0),
                id,
                name,
                generation,
                stored.tail,
                (hashlib.sha256(database).hexdigest(), hashlib.sha256(tail).hexdigest()),
                {} if blocks is None else blocks.parts(origin.parts, id),
            )
            with storage_errors(folder):
                replace(origin, publishing=(*origin.publishing, id)).write(folder)
            count = size = 0
            for path, data in self._objects(new, blocks, database, tail):
                self._write(path, data)
                count, size = count + 1, size + len(data)
            manifest = new.to_bytes()
            try:
                self._write(f"{self._session(name)}/{new.number:012d}.json", manifest, create=True)
            except FileExistsError:
                there = self._newest(name)
                if there is None or there.id != id:  # else the store was asked twice, and had done it the first time
                    raise self._diverged(name, there) from None
        with storage_errors(folder):
            Origin(self.url, id, generation, (), new.parts).write(folder)
        self._collect(found, {new.id, f"{new.number:012d}", *((last.id, f"{last.number:012d}") if last else ())})
        self._collect_parts(new, origin)
        return Published(count + 1, size + len(manifest))

    def pull(self, root: str | PathLike[str], name: str) -> bool:
        """Have a session as of its last published commit, if the local folder is behind it or there is none. Blocks are
        not fetched yet.

        Returns:
            Whether anything was fetched.

        Raises:
            SessionLocked: it is behind, and open.
            Diverged: it is behind, and has commits that were never published.
        """
        while True:
            last = self._newest(name)
            try:
                return last is not None and self._pull(root, last)
            except CorruptSession:
                if self._newest(name) == last:  # else it was replaced while it was fetched
                    raise

    def _pull(self, root: str | PathLike[str], last: Manifest) -> bool:
        catalog, name = Catalog(root), last.name
        info = None
        if (id := catalog.find(name)) is not None:
            folder = catalog.folder(id)
            origin = self._origin(folder)
            if self._continues(origin, last) or last.id in origin.publishing:
                return False
            with SessionStore.open(root, name) as store:  # SessionLocked: somebody works with it
                if store.generation != origin.generation:
                    raise self._diverged(name, last)
                info = store.info
        with catalog.staging() as staged:
            if not last.deleted:
                self._fetch(last, staged)
                with storage_errors(staged):
                    Origin(self.url, last.id, last.generation, (), last.parts).write(staged)
                blocks = Stored.read(staged).blocks(staged)
                if blocks is not None:
                    with storage_errors(staged):
                        if info is not None:
                            self._give(folder, blocks)
                        blocks.make_sparse()
            if info is not None and not catalog.delete_unchanged(info):
                raise self._diverged(name, last)
            if last.deleted:
                return info is not None

            def fill(folder: Path) -> None:
                for path in staged.iterdir():
                    path.rename(folder / path.name)

            SessionStore.add(root, name, fill).close()
        return True

    def is_current(self, root: str | PathLike[str], name: str) -> bool:
        """Whether no other machine has published the session, or deleted it, since the local folder was."""
        last, catalog = self._newest(name), Catalog(root)
        if last is None:
            return True
        if (id := catalog.find(name)) is None:
            return last.deleted
        origin = self._origin(catalog.folder(id))
        return self._continues(origin, last) or last.id in origin.publishing

    def names(self) -> Sequence[str]:
        """The published sessions."""
        found = (self._last(path) for path in self._list("sessions"))
        return sorted(manifest.name for manifest in found if manifest is not None and not manifest.deleted)

    def delete(self, name: str) -> None:
        """Remove a session, and the blocks that no other published session has. Publish a fork before its source is
        deleted: it may still have blocks there.

        Raises:
            UnknownSession.
            Diverged: another machine has published it at the same time.
        """
        found, last = self._list(self._session(check_name(name))), self.last(name)
        if last is None:
            raise UnknownSession(f'session "{name}" is not in the bucket {self.url}')
        gone = Manifest(last.number + 1, uuid.uuid4().hex, name, 0, None, ("", ""), {}, deleted=True)
        try:
            self._write(f"{self._session(name)}/{gone.number:012d}.json", gone.to_bytes(), create=True)
        except FileExistsError:
            raise self._diverged(name, self._newest(name)) from None
        self._collect(found, {gone.id, f"{gone.number:012d}"})
        self._remove_segments(last.parts.keys(), name)

    def has(self, root: str | PathLike[str], name: str) -> bool:
        """Whether the bucket has a session that is here, and nobody has continued it elsewhere."""
        return Catalog(root).find(name) is not None and self.last(name) is not None and self.is_current(root, name)

    def last(self, name: str) -> Manifest | None:
        """Return the last published commit of a session; None if nothing was published, or the session was deleted."""
        newest = self._newest(name)
        return None if newest is None or newest.deleted else newest

    # -- how -----------------------------------------------------------------------------------------------------------

    def _newest(self, name: str) -> Manifest | None:
        """The last manifest of a session, perhaps that of its deletion."""
        manifest = self._last(self._session(check_name(name)))
        if manifest is not None and manifest.name != name:
            raise CorruptSession(f'bucket {self.url}: session "{manifest.name}" is in the place of "{name}"')
        return manifest

    @staticmethod
    def _continues(origin: Origin, last: Manifest | None) -> bool:
        """Tell whether a folder continues the last manifest, or begins a session that was never published."""
        if origin.base is None:
            return last is None or last.deleted
        return last is not None and last.id == origin.base

    def _last(self, session: str) -> Manifest | None:
        for number in sorted(self._numbers(session), reverse=True):
            try:
                with bucket_errors(self.url):
                    data = self._fs.cat_file(f"{self._path}/{session}/{number:012d}.json")
            except CorruptSession:  # gone: a later one is there, or the session was deleted
                continue
            if (manifest := Manifest.of(data)) is not None:
                return manifest
        return None

    def _numbers(self, session: str) -> Iterator[int]:
        for path in self._list(session):
            stem, _, kind = path.rpartition("/")[2].partition(".")
            if kind == "json" and stem.isdecimal():
                yield int(stem)

    def _list(self, path: str) -> list[str]:
        """What is under a path of the bucket, as paths in it."""
        with bucket_errors(self.url):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(f"{self._path}/{path}", detail=False)
            except FileNotFoundError:
                return []
        return [f"{path}/{one.rstrip('/').rpartition('/')[2]}" for one in found]

    def _write(self, path: str, data: bytes, *, create: bool = False) -> None:
        """Write an object; with ``create``, raise FileExistsError if it is there."""
        place = f"{self._path}/{path}"
        try:
            with bucket_errors(self.url):
                if getattr(self._fs, "local_file", False):  # fsspec's own way to create looks first, and writes then
                    self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
                    write_atomically(Path(place), data, create=create)
                else:
                    self._fs.pipe_file(place, data, mode="create" if create else "overwrite")
        except BucketError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise error.__cause__ from None
            raise

    def _objects(
        self, new: Manifest, blocks: BlockFiles | None, database: bytes, tail: bytes
    ) -> Iterator[tuple[str, bytes]]:
        """What is uploaded before the manifest."""
        for segment, (name, parts) in enumerate(new.parts.items()):
            if blocks is not None and parts[-1][2] == new.id:
                yield part_name(name, parts[-1]), blocks.part(segment, *parts[-1][:2])
        place = f"{self._session(new.name)}/{new.id}"
        yield f"{place}.db", database
        if new.tail is not None:
            yield f"{place}.tail", tail

    def _fetch(self, manifest: Manifest, folder: Path) -> None:
        place = f"{self._path}/{self._session(manifest.name)}/{manifest.id}"
        wanted = [(SESSION_DATABASE, "db")] + ([(manifest.tail, "tail")] if manifest.tail else [])
        for (path, kind), digest in zip(wanted, manifest.digests, strict=False):
            with bucket_errors(self.url):
                data = self._fs.cat_file(f"{place}.{kind}")
            if hashlib.sha256(data).hexdigest() != digest:
                raise CorruptSession(f'bucket {self.url}: the {kind} of "{manifest.name}" is not what was published')
            with storage_errors(folder):
                write_atomically(folder / path, data)

    @staticmethod
    def _give(folder: Path, blocks: BlockFiles) -> None:
        """Let new files have what a local folder has of them: what was fetched is not fetched again."""
        with suppress(CorruptSession):
            if (before := Stored.read(folder).blocks(folder)) is not None:
                before.give(blocks)

    def _origin(self, folder: Path) -> Origin:
        origin = Origin.of(folder)
        if origin is None:
            return Origin(self.url)
        if origin.url != self.url:
            raise InfLLMError(f"{folder}: belongs to the bucket {origin.url}, not to {self.url}")
        return origin

    def _diverged(self, name: str, last: Manifest | None) -> Diverged:
        if last is None:
            what = f"the bucket {self.url} does not have it any more, though it was published there"
        else:
            what = f"another machine has {'deleted' if last.deleted else 'published'} it since"
        return Diverged(
            f'session "{name}": {what}; what was committed here is kept in this root: '
            "fork or export it under another name, then delete it here and pull"
        )

    def _collect(self, found: Sequence[str], keep: set[str]) -> None:
        """Remove objects of earlier commits; the last but one stays, for who is just fetching it. What cannot be
        removed now is removed after the next commit.

        Args:
            found: what there was before the commit that is kept. What came later is of who goes on from it.
        """
        for path in found:
            if path.rpartition("/")[2].partition(".")[0] not in keep:
                self._remove(path)

    def _collect_parts(self, new: Manifest, before: Origin) -> None:
        """Remove the parts that this folder uploaded for commits that never were, and those of segments that the
        session does not have any more."""
        if before.publishing:
            for segment, parts in new.parts.items():
                for path in self._list(f"segments/{segment}") if parts[-1][2] == new.id else ():
                    if path.rpartition("-")[2] in before.publishing:
                        self._remove(path)
        self._remove_segments(before.parts.keys() - new.parts.keys(), new.name)

    def _remove_segments(self, ids: Collection[str], name: str) -> None:
        """Remove segments, unless a session of another name has them."""
        if not ids:
            return
        others = [self.last(other) for other in self.names() if other != name]
        for id in set(ids).difference(*(other.parts for other in others if other is not None)):
            self._remove(f"segments/{id}", recursive=True)

    def _remove(self, path: str, *, recursive: bool = False) -> None:
        with suppress(Exception):
            self._fs.rm(f"{self._path}/{path}", recursive=recursive)

    @staticmethod
    def _session(name: str) -> str:
        return f"sessions/{hashlib.sha256(name.encode()).hexdigest()[:32]}"
