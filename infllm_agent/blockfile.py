"""The files of a session's sealed blocks: append-only segments at a fixed stride, where a place follows from a number.

    segment = page of 4096 bytes: magic, JSON (shape, number, the segment's own id), zeros, CRC-32
            | the keys that stand for its blocks: SEGMENT_BLOCKS x (layers, kv_heads, head_dim) in the model's dtype
            | up to SEGMENT_BLOCKS records (``planes``)

A block's keys and values are read, and checked, plane by plane when they are needed; the keys that stand for blocks all
at once when a session is opened. What was committed is never overwritten. What lies past the committed number of blocks
is a leftover of a crash and is written over.

Which files these must be is written elsewhere, in the session's tail, as ``Marks``: a segment in another's place, of
another session or of another time is found out.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infllm_agent.errors import CorruptSession, StorageError
from infllm_agent.files import share, sync_folder
from infllm_agent.planes import CRC_BYTES, BlockShape, checksum
from infllm_agent.threads import in_background, in_parallel

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
            shared: so many of them never change here. Segments that they fill are immutable: both folders name the same
                files (hard links). The rest is copied.

        Raises:
            OSError, CorruptSession.
        """
        full = min(count, shared) // SEGMENT_BLOCKS
        for segment in range(full):
            with self._open(segment):  # is it the one?
                share(segment_path(self.folder, segment), segment_path(folder, segment))
        marks = self.marks
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
            segment = blocks[done] // SEGMENT_BLOCKS
            with self._open(segment) as descriptor:
                while done < len(blocks) and blocks[done] // SEGMENT_BLOCKS == segment:
                    block, data, crc = blocks[done], into[done, :size].data, bytearray(CRC_BYTES)
                    at = self._place(block % SEGMENT_BLOCKS) + place
                    whole = os.preadv(descriptor, [data, crc], at) == size + CRC_BYTES
                    if not whole or checksum(data, block, plane) != crc:
                        raise self._damage(block, plane)
                    done += 1

    def record(self, block: int) -> Tensor:
        """A whole record (stride,) uint8, checked."""
        record = np.zeros(self.shape.stride, dtype=np.uint8)
        with self._open(block // SEGMENT_BLOCKS) as descriptor:
            os.preadv(descriptor, [record.data], self._place(block % SEGMENT_BLOCKS))
        for plane in range(self.shape.planes):
            start = self.shape.place(plane)
            stop = start + self.shape.plane_bytes(plane)
            if checksum(record[start:stop].data, block, plane) != record[stop : stop + CRC_BYTES].tobytes():
                raise self._damage(block, plane)
        return torch.from_numpy(record)

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
        if got < rows.nbytes or zlib.crc32(rows.data) != self._crcs[segment]:
            raise CorruptSession(f"{path}: the keys of its blocks fail their checksum")
        return torch.from_numpy(rows[:count])

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

    def _damage(self, block: int, plane: int) -> CorruptSession:
        path = segment_path(self.folder, block // SEGMENT_BLOCKS)
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
