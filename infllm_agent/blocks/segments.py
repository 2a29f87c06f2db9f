"""The files of a session's sealed blocks: append-only segments at a fixed stride, where a place follows from a number.

    segment = page of 4096 bytes: magic, JSON (shape, number, the segment's own id), zeros, CRC-32
            | the keys that stand for its blocks: SEGMENT_BLOCKS x (layers, kv_heads, head_dim) in the model's dtype
            | up to SEGMENT_BLOCKS records (``layout``)

A block's keys and values are read, and checked, plane by plane when they are needed; the keys that stand for blocks all
at once when a session is opened. What was committed is never overwritten. What lies past the committed number of blocks
is a leftover of a crash and is written over.

A session that was fetched from a bucket has its blocks there at first: see ``remote``.

Which files these must be is written elsewhere, in the session's tail, as ``Marks``: a segment in another's place, of
another session or of another time is found out.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infllm_agent.blocks.layout import CRC_BYTES, BlockShape, checksum
from infllm_agent.blocks.remote import Origin, Parts
from infllm_agent.errors import CorruptSession, StorageError
from infllm_agent.platform.files import copy_beginning, share, sync_folder
from infllm_agent.platform.threads import in_background, in_parallel

PAGE = 4096
MAGIC = b"INFLLM-KV2\n"
SEGMENT_BLOCKS = 128
ID_BYTES = 16
#: Most buffers of one write; systems allow 1024.
BUFFERS = 512
#: Planes that are worth a thread of their own to read.
READ_TOGETHER = 32


class Marks(NamedTuple):
    """What is known of the segments besides their files."""

    ids: Tensor  # (segments, 16) uint8
    crcs: Tensor  # (segments,) int64: the CRC-32 of the keys of each segment's blocks, as far as they count

    @classmethod
    def none(cls) -> Marks:
        return cls(torch.empty((0, ID_BYTES), dtype=torch.uint8), torch.empty(0, dtype=torch.int64))


class BlockFiles:
    """The first ``count`` blocks of a session, in the files of its folder."""

    def __init__(self, folder: Path, shape: BlockShape, count: int = 0, marks: Marks | None = None) -> None:
        """
        Raises:
            CorruptSession: there are not as many marks as segments.
        """
        marks = marks or Marks.none()
        self.folder = folder
        self.shape = shape
        self.count = count
        self._ids = [bytes(row.tolist()) for row in marks.ids]
        self._crcs: list[int] = marks.crcs.tolist()
        self._known: set[int] = set()  # segments whose head was read and is right
        self.origin = Origin.of(folder)  # where blocks are that have not been read yet since they were fetched
        if not len(self._ids) == len(self._crcs) == -(-count // SEGMENT_BLOCKS):
            raise CorruptSession(f"{folder}: the tail names {len(self._ids)} segments, but there are {count} blocks")

    @property
    def marks(self) -> Marks:
        ids = np.frombuffer(b"".join(self._ids), dtype=np.uint8).reshape(-1, ID_BYTES).copy()
        return Marks(torch.from_numpy(ids), torch.tensor(self._crcs, dtype=torch.int64))

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(self, records: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Write the next blocks and put them on stable storage. They count only once the session's database says so.

        Args:
            records: each (stride,) uint8 with its checksums.
            keys: each (layers · kv_heads · head_dim · itemsize,) uint8.

        Raises:
            OSError: nothing of it counts; what was there before is whole.
        """
        ids, crcs, done = list(self._ids), list(self._crcs), 0
        while done < len(records):
            segment, index = divmod(self.count + done, SEGMENT_BLOCKS)
            batch = slice(done, done + SEGMENT_BLOCKS - index)
            new = index == 0
            if new:
                ids[segment:], crcs[segment:] = [uuid.uuid4().bytes], [0]
                self._known.discard(segment)
                with suppress(FileNotFoundError):  # a leftover: its inode may be another session's too
                    os.unlink(segment_path(self.folder, segment))
            rows = [row.numpy().data for row in keys[batch]]
            for row in rows:
                crcs[segment] = zlib.crc32(row, crcs[segment])
            flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if new else 0)
            descriptor = os.open(segment_path(self.folder, segment), flags, 0o600)
            try:
                if new:
                    _write(descriptor, [memoryview(self._head(segment, ids[segment]))], 0)
                _write(descriptor, rows, PAGE + index * self._row_bytes)
                _write(descriptor, [record.numpy().data for record in records[batch]], self._place(index))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                sync_folder(self.folder)
            done += len(rows)
        self._ids, self._crcs = ids, crcs
        self.count += done

    def fork(self, folder: Path, count: int, shared: int) -> BlockFiles:
        """The first ``count`` blocks in another folder.

        Args:
            shared: how many of them never change here. Segments that they fill are immutable: both folders name the
                same files (hard links). The rest is copied.

        Raises:
            OSError, CorruptSession.
        """
        full = min(count, shared) // SEGMENT_BLOCKS
        for segment in range(full):
            with self._open(segment):  # is it the one?
                share(segment_path(self.folder, segment), segment_path(folder, segment))
        marks = self.marks
        if self.origin is not None:
            ids = [id.hex() for id in self._ids[:full]]
            parts = {id: self.origin.parts[id] for id in ids if id in self.origin.parts}
            Origin(self.origin.url, parts=parts).write(folder)
        fork = BlockFiles(folder, self.shape, full * SEGMENT_BLOCKS, Marks(marks.ids[:full], marks.crcs[:full]))
        for first in range(fork.count, count, SEGMENT_BLOCKS):
            blocks = range(first, min(count, first + SEGMENT_BLOCKS))
            keys = self._keys(first // SEGMENT_BLOCKS, len(blocks))
            fork.append([self.record(block) for block in blocks], list(keys))
        return fork

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, blocks: Sequence[int], plane: int, into: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
        """Read one plane of some blocks, several at once.

        Args:
            blocks: ascending.
            into: (len(blocks), ≥ plane_bytes) uint8.

        Raises:
            CorruptSession: a file is missing, too short, another one, or a plane fails its checksum.
            StorageError: a file cannot be read.
        """
        in_parallel(
            lambda part: self._read(blocks[part], plane, into[part]),
            [slice(at, at + READ_TOGETHER) for at in range(0, len(blocks), READ_TOGETHER)],
        )

    def expect(self, blocks: Sequence[int], plane: int) -> None:
        """Some of these will probably be read soon: the system may fetch them. Returns at once."""
        in_background(lambda: self._advise(blocks, plane))

    def _advise(self, blocks: Sequence[int], plane: int) -> None:
        size, place = self.shape.plane_bytes(plane), self.shape.place(plane)
        for segment, group in groupby(blocks, lambda block: block // SEGMENT_BLOCKS):
            with suppress(OSError), open(segment_path(self.folder, segment), "rb", buffering=0) as file:
                for block in group:
                    at = self._place(block % SEGMENT_BLOCKS) + place
                    os.posix_fadvise(file.fileno(), at, size + CRC_BYTES, os.POSIX_FADV_WILLNEED)

    def _read(self, blocks: Sequence[int], plane: int, into: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
        size, place = self.shape.plane_bytes(plane), self.shape.place(plane)
        done = 0
        while done < len(blocks):
            segment, absent = blocks[done] // SEGMENT_BLOCKS, []
            with self._open(segment) as descriptor:
                while done < len(blocks) and blocks[done] // SEGMENT_BLOCKS == segment:
                    block, data, crc = blocks[done], into[done, :size].data, bytearray(CRC_BYTES)
                    at = self._place(block % SEGMENT_BLOCKS) + place
                    whole = os.preadv(descriptor, [data, crc], at) == size + CRC_BYTES
                    if not whole or checksum(data, block, plane) != crc or self._may_be_hole(crc, block):
                        absent.append(done)
                    done += 1
            if absent:
                self._fetch(segment, {blocks[at]: into[at, :size].data for at in absent}, plane)

    def _fetch(self, segment: int, absent: dict[int, memoryview], plane: int) -> None:
        """Planes that are not in the folder come from the origin, and stay."""
        if self.origin is None or any(self._object(block) is None for block in absent):
            raise self._damage(next(iter(absent)), plane)
        start, size = self.shape.place(plane), self.shape.plane_bytes(plane)
        wanted = [(block % SEGMENT_BLOCKS, start, start + size + CRC_BYTES) for block in absent]
        pieces = self.origin.records(self._ids[segment], wanted, self._row_bytes, self.shape.stride)
        for (block, into), piece in zip(absent.items(), pieces, strict=True):
            if checksum(memoryview(piece)[:size], block, plane) != piece[size:]:
                raise self._damage(block, plane, self._object(block))
            into[:] = piece[:size]
        self._keep(segment, [(self._place(w[0]) + w[1], piece) for w, piece in zip(wanted, pieces, strict=True)])

    def _keep(self, segment: int, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Write what was fetched. If that fails, or is cut off by a crash, it is fetched again."""
        with suppress(OSError):
            descriptor = os.open(segment_path(self.folder, segment), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                for place, piece in pieces:
                    os.pwrite(descriptor, piece, place)
            finally:
                os.close(descriptor)

    def record(self, block: int) -> Tensor:
        """A whole record (stride,) uint8, checked."""
        record = np.zeros(self.shape.stride, dtype=np.uint8)
        with self._open(block // SEGMENT_BLOCKS) as descriptor:
            os.preadv(descriptor, [record.data], self._place(block % SEGMENT_BLOCKS))
        if (damaged := self._first_damaged(record, block, here=True)) is not None:
            segment = block // SEGMENT_BLOCKS
            if self.origin is None or self._object(block) is None:
                raise self._damage(block, damaged)
            wanted = [(block % SEGMENT_BLOCKS, 0, self.shape.stride)]
            [piece] = self.origin.records(self._ids[segment], wanted, self._row_bytes, self.shape.stride)
            record = np.frombuffer(piece.ljust(self.shape.stride, b"\0"), dtype=np.uint8).copy()
            if (damaged := self._first_damaged(record, block)) is not None:
                raise self._damage(block, damaged, self._object(block))
            self._keep(segment, [(self._place(block % SEGMENT_BLOCKS), piece)])
        return torch.from_numpy(record)

    def _object(self, block: int) -> str | None:
        """Where in the bucket a block is."""
        segment, index = divmod(block, SEGMENT_BLOCKS)
        return None if self.origin is None else self.origin.object(self._ids[segment], index)

    def _may_be_hole(self, crc: bytes | bytearray, block: int) -> bool:
        """Zeros have the checksum 0 in one place of four billion: where the bucket has the block, it is asked."""
        return not any(crc) and self._object(block) is not None

    def _first_damaged(
        self, record: np.ndarray[tuple[int], np.dtype[np.uint8]], block: int, *, here: bool = False
    ) -> int | None:
        """The first plane of a record that fails its checksum, or, if it was read here, may be a hole."""
        for plane in range(self.shape.planes):
            start = self.shape.place(plane)
            stop = start + self.shape.plane_bytes(plane)
            crc = record[stop : stop + CRC_BYTES].tobytes()
            if checksum(record[start:stop].data, block, plane) != crc or (here and self._may_be_hole(crc, block)):
                return plane
        return None

    def keys(self, into: Sequence[Tensor]) -> None:
        """Read the keys that stand for the blocks, in the model's dtype.

        Args:
            into: for each layer (count, kv_heads, head_dim), of any float type, on any device.

        Raises:
            CorruptSession.
        """
        shape = self.shape

        def load(segment: int) -> None:
            first = segment * SEGMENT_BLOCKS
            rows = self._keys(segment, min(SEGMENT_BLOCKS, self.count - first)).view(shape.torch_dtype)
            for layer, part in enumerate(rows.view(-1, shape.layers, shape.kv_heads, shape.head_dim).unbind(1)):
                into[layer][first : first + part.shape[0]] = part

        in_parallel(load, range(len(self._ids)))

    def _keys(self, segment: int, count: int) -> Tensor:
        """The keys of a segment's first blocks, (count, bytes) uint8, checked as far as the marks go."""
        path = segment_path(self.folder, segment)
        known = min(SEGMENT_BLOCKS, self.count - segment * SEGMENT_BLOCKS)
        rows = np.empty((known, self._row_bytes), dtype=np.uint8)
        with self._open(segment) as descriptor:
            got = os.preadv(descriptor, [rows.data.cast("B")], PAGE)
        if (got < rows.nbytes or zlib.crc32(rows.data) != self._crcs[segment]) and self.origin is not None:
            fetched = self.origin.keys(self._ids[segment], known, self._row_bytes)
            rows.reshape(-1)[: len(fetched)] = np.frombuffer(fetched, dtype=np.uint8)
            self._keep(segment, [(PAGE, fetched)])
            got = rows.nbytes
        if got < rows.nbytes or zlib.crc32(rows.data) != self._crcs[segment]:
            raise CorruptSession(f"{path}: the keys of its blocks fail their checksum")
        return torch.from_numpy(rows[:count])

    def make_sparse(self) -> None:
        """In an empty folder: the files as far as they follow from the tail. The rest comes from the origin.

        Raises:
            OSError.
        """
        for segment, (path, size) in enumerate(self.files()):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(descriptor).st_size < PAGE:
                    _write(descriptor, [memoryview(self._head(segment, self._ids[segment]))], 0)
                if os.fstat(descriptor).st_size < size:
                    os.ftruncate(descriptor, size)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def parts(self, before: Mapping[str, Parts], id: str) -> dict[str, Parts]:
        """What parts a bucket needs to have all blocks.

        Args:
            before: those that it has.
            id: of the commit with which the others are published.
        """
        found: dict[str, Parts] = {}
        for segment, name in enumerate(row.hex() for row in self._ids):
            parts, count = before.get(name, ()), min(SEGMENT_BLOCKS, self.count - segment * SEGMENT_BLOCKS)
            stop = parts[-1][1] if parts else 0
            found[name] = parts if stop >= count else (*parts, (stop, count, id))
        return found

    def part(self, segment: int, first: int, stop: int) -> bytes:
        """The bytes of a part: blocks of one segment.

        Raises:
            CorruptSession, StorageError.
        """
        keys = self._keys(segment, stop)[first:stop]
        records = [self.record(segment * SEGMENT_BLOCKS + index) for index in range(first, stop)]
        return b"".join(part.numpy().tobytes() for part in [keys, *records])

    def give(self, other: BlockFiles) -> None:
        """Let another folder, which is empty, have what is here of the same segments.

        What lies behind the blocks that count here was never committed. There other blocks are in its place, so a
        segment that is not full is copied without it.

        Raises:
            OSError.
        """
        for number, (path, size) in enumerate(self.files()):
            if number < len(other._ids) and self._ids[number] == other._ids[number] and path.is_file():
                if size == self._place(SEGMENT_BLOCKS):
                    share(path, segment_path(other.folder, number))
                else:
                    copy_beginning(path, segment_path(other.folder, number), size)

    def files(self) -> Iterator[tuple[Path, int]]:
        """The files, each with how many of its first bytes are needed; what is behind them is of no commit."""
        for segment in range(len(self._ids)):
            count = min(SEGMENT_BLOCKS, self.count - segment * SEGMENT_BLOCKS)
            yield segment_path(self.folder, segment), self._place(count)

    def damages(self, read: Callable[[int], None] = lambda size: None) -> Iterator[str]:
        """Read everything; one line for each file that is damaged or unreadable, naming its first damage.

        Args:
            read: told of the bytes that were read, as it goes on.
        """
        for segment in range(len(self._ids)):
            first = segment * SEGMENT_BLOCKS
            try:
                self._known.discard(segment)
                self._keys(segment, 1)
                for block in range(first, min(self.count, first + SEGMENT_BLOCKS)):
                    self.record(block)
                    read(self.shape.stride)
            except (CorruptSession, StorageError) as error:
                yield str(error)

    @contextmanager
    def _open(self, segment: int) -> Iterator[int]:
        path = segment_path(self.folder, segment)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):  # gone, or a link
                raise CorruptSession(f"{path}: {error.strerror}") from error
            raise StorageError(f"{path}: {error.strerror}") from error
        try:
            if segment not in self._known:
                if os.pread(descriptor, PAGE, 0) != self._head(segment, self._ids[segment]):
                    raise CorruptSession(f"{path}: its head is damaged, or it is a file of another session")
                size, count = os.fstat(descriptor).st_size, min(SEGMENT_BLOCKS, self.count - segment * SEGMENT_BLOCKS)
                if size < self._place(count):
                    raise CorruptSession(f"{path}: cut off at {size:,} bytes, fewer than its {count} blocks take")
                self._known.add(segment)
            yield descriptor
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _damage(self, block: int, plane: int, path: Path | str | None = None) -> CorruptSession:
        path = path or segment_path(self.folder, block // SEGMENT_BLOCKS)
        what = f"layer {plane // 2}: {'values' if plane % 2 else 'keys'}"
        return CorruptSession(f"{path}: block {block}, {what} are cut off or fail their checksum")

    @property
    def _row_bytes(self) -> int:
        return self.shape.layers * self.shape.key_bytes

    def _place(self, index: int) -> int:
        return PAGE + SEGMENT_BLOCKS * self._row_bytes + index * self.shape.stride

    def _head(self, segment: int, id: bytes) -> bytes:
        text = json.dumps({**asdict(self.shape), "segment": segment, "id": id.hex()}, sort_keys=True).encode()
        body = (MAGIC + text).ljust(PAGE - 4, b"\0")
        return body + zlib.crc32(body).to_bytes(4, "little")


def segment_path(folder: Path, segment: int) -> Path:
    return folder / f"segment-{segment:06d}.kv"


def _write(descriptor: int, parts: list[memoryview], place: int) -> None:
    """All of some buffers, one behind the other."""
    for at in range(0, len(parts), BUFFERS):
        batch = parts[at : at + BUFFERS]
        while batch:
            written = os.pwritev(descriptor, batch, place)
            place += written
            while batch and written >= batch[0].nbytes:  # a write may stop anywhere
                written -= batch.pop(0).nbytes
            if batch and written:
                batch[0] = batch[0].cast("B")[written:]
