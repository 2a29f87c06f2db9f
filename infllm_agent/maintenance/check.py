"""Whether stored sessions are whole, to the last byte; and what can be put right without their model.

A session that another process writes to is checked all the same: its database as of one commit, and what that commit
refers to. Nothing of that ever changes, but that the tail is replaced by the next commit.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_agent.blocks.remote import ORIGIN_FILE
from infllm_agent.blocks.segments import ID_BYTES, BlockFiles, Marks
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import CorruptSession, InfLLMError, SessionLocked, StorageError, UnknownSession
from infllm_agent.memory import snapshot
from infllm_agent.memory.state import Division, MemoryState, WindowState
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import UNFINISHED
from infllm_agent.platform.locks import LOCK_FILE
from infllm_agent.storage.catalog import SESSION_DATABASE, Catalog
from infllm_agent.storage.integrity import FOREIGN
from infllm_agent.storage.rows import Generation
from infllm_agent.storage.session_store import REBUILT, SessionStore
from infllm_agent.storage.tail import TAIL_NAME, read_tail

FILE_MODE, FOLDER_MODE = 0o600, 0o700

_DATABASE = frozenset(SESSION_DATABASE + suffix for suffix in ("", "-wal", "-shm", "-journal"))
_BLOCKS = re.compile(r"segment-[0-9]+\.kv")
_OURS = (TAIL_NAME, _BLOCKS, REBUILT, UNFINISHED)


class Cure(StrEnum):
    """What to do about a problem."""

    REPAIR = "run sessions check --repair"
    REBUILD = "run sessions check --rebuild"
    RESTORE = "restore the session's folder from a backup"
    MOVE = "move it away"
    OTHER = "see the message"


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be. ``what`` is one line that begins with the file's path."""

    what: str
    cure: Cure

    def __str__(self) -> str:
        return self.what if self.cure is Cure.OTHER else f"{self.what}: {self.cure}"


@dataclass
class Checked:
    """What became of a check.

    Attributes:
        name: of the session, or its id where the name cannot be read; None: what is beside the sessions.
        problems: what is not as it should be, after any repair.
        repaired: what was, and was put right.
        read_only: whether it could not be locked for the check, because another process writes to it or nothing can be
            written there. Then files that no commit names are not looked for, nor is the full-text index examined.
    """

    name: str | None
    problems: list[Problem] = field(default_factory=list)
    repaired: list[Problem] = field(default_factory=list)
    read_only: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    def has(self, cure: Cure) -> bool:
        return any(problem.cure is cure for problem in self.problems)

    def add(self, problem: Problem, cure: Callable[[], object] | None = None) -> None:
        """A problem; with a cure, one that is to be put right now."""
        try:
            if cure is not None:
                with storage_errors(Path()):
                    cure()
                self.repaired.append(problem)
                return
        except InfLLMError as error:
            problem = Problem(f"{problem.what} ({error})", problem.cure)
        self.problems.append(problem)


Read = Callable[[int], None]


def check(
    root: str | PathLike[str], names: Sequence[str] = (), *, repair: bool = False, read: Read = lambda size: None
) -> Iterator[Checked]:
    """Check sessions, one after the other; all of them, and what is beside them, if none is named.

    Args:
        repair: put right what needs no model: files that nothing refers to are removed, modes set, the catalogue and
            the full-text index made anew.
        read: told of the bytes of blocks that were read, as it goes on.

    Raises:
        UnknownSession, InvalidName: of ``names``.
        StorageError: the root cannot be read.
    """
    catalog = Catalog(root)
    if not names:
        yield _check_root(catalog, repair)
        found, problems = catalog.survey()
        unreadable = {id: catalog.name_of(id) or id for id in problems}
        for id, name in sorted({id: info.name for id, info in found.items()}.items(), key=lambda item: item[1]):
            if (checked := _check_session(catalog, id, name, repair, read)) is not None:
                yield checked
        for id, problem in problems.items():
            yield Checked(unreadable[id], [Problem(problem, Cure.RESTORE)])
    for name in names:
        if (checked := _check_session(catalog, catalog.require(name), name, repair, read)) is None:
            catalog.require(name)  # raises: it was deleted meanwhile
        else:
            yield checked


def stored_bytes(root: str | PathLike[str], names: Sequence[str] = ()) -> int:
    """About how many bytes of blocks a check will read."""
    infos = Catalog(root).survey()[0].values()
    return sum(info.bytes["disk"] for info in infos if not names or info.name in names)


def stored_blocks(
    folder: Path, fingerprint: dict[str, Any], head: Generation, state: dict[str, Any], *, elsewhere: Path | None = None
) -> BlockFiles:
    """The files of a commit's blocks, unread, after a check that the tail is what the log says it must be.

    Args:
        folder: of database and tail; the blocks are there too, or ``elsewhere``.

    Raises:
        CorruptSession: the tail is missing or damaged, or does not belong to the log.
        StorageError: the session is of another version's format.
    """
    database = folder / SESSION_DATABASE
    try:
        if (format := fingerprint["format"]) != snapshot.FORMAT:
            raise StorageError(
                f"{database}: a session of format {str(format)[:20]}, of which this version can only read the messages "
                f"(it opens format {snapshot.FORMAT})"
            )
        config = MemoryConfig.from_record(fingerprint["memory"])
        record, name, crc = state["memory"], state["tail"], state["tail_crc"]
        length, blocks = record["length"], Division.of(head.chunk_end, config).blocks
        if (length, record["blocks"], head.blocks) != (head.chunk_end, blocks, blocks):
            raise CorruptSession(
                f"{database} is damaged: its state is of {length} tokens and {head.blocks} blocks, its chunks make "
                f"{head.chunk_end} tokens and {blocks} blocks"
            )
        if (arriving := state.get("arriving")) is not None and not _is_arriving(arriving, head):
            raise CorruptSession(f"{database} is damaged: its message that was arriving")
        if not TAIL_NAME.fullmatch(name):
            raise CorruptSession(f"{database} is damaged: its tail is called {name[:80]!r}")
        tensors = read_tail(folder, name, crc)
        memory = snapshot.unpack(tensors, record)
        if not _fits(memory, tensors, config, str(fingerprint["dtype"])):
            raise CorruptSession(f"{folder / name}: holds other tensors than a memory of {length} tokens has")
        return snapshot.block_files(elsewhere or folder, tensors, memory, config)
    except FOREIGN as error:
        raise CorruptSession(f"{database} is damaged: its state ({type(error).__name__}: {str(error)[:80]})") from error


def _is_arriving(record: dict[str, Any], head: Generation) -> bool:
    """Whether ``MessageStream.resume`` can go on with it."""
    datetime.fromtimestamp(record["time"])
    texts = [record[key] for key in ("role", "text", "held")] + [record[key] or "" for key in ("name", "call_id")]
    return all(isinstance(text, str) for text in texts) and head.message_end <= record["start"] <= head.tokens


def _fits(memory: MemoryState, tensors: dict[str, Tensor], config: MemoryConfig, dtype: str) -> bool:
    """Whether a state has all the tensors that one of its length has, and no others."""
    division = Division.of(memory.length, config)
    in_window = memory.length - division.first_window_token(config)
    with_queries = config.block_key == "representatives"
    held = [x for name, x in tensors.items() if name.startswith("layer.") and not name.endswith(".candidates")]
    marks = Marks(*(tensors[f"segments.{name}"] for name in Marks._fields))
    layers = list(memory.layers.values())
    heads, dim = layers[0].window.k.shape[0], layers[0].window.k.shape[2]
    return (
        snapshot.pack(memory, config, marks)[0].keys() == tensors.keys()
        and all(str(tensor.dtype) == f"torch.{dtype}" for tensor in held)
        and (marks.ids.dtype, marks.crcs.dtype, marks.ids.shape[1:]) == (torch.uint8, torch.int64, (ID_BYTES,))
        and all(layer.sinks.shape == (2, heads, division.sinks, dim) for layer in layers)
        and all(_has(layer.window, (heads, in_window, dim), with_queries) for layer in layers)
        and all(_are_blocks(layer.candidates, division.blocks) for layer in layers if layer.candidates is not None)
        and all(_has(window, tuple(window.k.shape), False) for window in memory.sliding.values())
        and all(window.k.shape[1] <= memory.length for window in memory.sliding.values())
    )


def _are_blocks(candidates: Tensor, count: int) -> bool:
    """Whether they are numbers of blocks, ascending."""
    if candidates.dtype != torch.int32 or candidates.dim() != 1:
        return False
    numbers = candidates.tolist()
    return all(0 <= a < b for a, b in zip(numbers, [*numbers[1:], count], strict=True))


def _has(window: WindowState, shape: tuple[int, ...], with_queries: bool) -> bool:
    held = [part for part in window if part is not None]
    return len(held) == 2 + with_queries and all(part.shape == shape for part in held)


def _check_session(catalog: Catalog, id: str, name: str, repair: bool, read: Read) -> Checked | None:
    """None if the session was deleted meanwhile."""
    checked = Checked(name)
    folder = catalog.folder(id)
    try:
        store, checked.read_only = _opened(catalog, name)
        with store:
            blocks = _check_locked(store, checked, repair)
        # The lock is given back: what is committed of the blocks is only replaced by a rebuild.
        damages = [] if blocks is None else list(blocks.damages(read))
        if blocks is not None and damages and _replaced(catalog, name, blocks):
            return _check_session(catalog, id, name, repair, read)
        for damage in damages:
            checked.add(Problem(damage, Cure.REBUILD))
    except UnknownSession:
        return None
    except (CorruptSession, StorageError) as error:
        checked.add(Problem(str(error), Cure.RESTORE if isinstance(error, CorruptSession) else Cure.OTHER))
    return checked if checked.ok or folder.exists() else None


def _replaced(catalog: Catalog, name: str, blocks: BlockFiles) -> bool:
    """Whether other files than these now hold the session's first blocks."""
    with SessionStore.open(catalog.root, name, readonly=True) as store:
        _, now = _committed_blocks(store, Checked(name))
    return now is not None and not torch.equal(now.marks.ids[: len(blocks.marks.ids)], blocks.marks.ids)


def _opened(catalog: Catalog, name: str) -> tuple[SessionStore, bool]:
    """The session, locked if that can be; and whether it is not."""
    try:
        return SessionStore.open(catalog.root, name), False
    except (SessionLocked, StorageError):
        return SessionStore.open(catalog.root, name, readonly=True), True


def _check_locked(store: SessionStore, checked: Checked, repair: bool) -> BlockFiles | None:
    """All but the blocks. Returns their files, if it is known which they must be."""
    if (damage := store.search_damage()) is not None:
        checked.add(Problem(damage, Cure.REPAIR), store.rebuild_search if repair else None)
    damaged = store.damages()
    for damage in damaged:
        checked.add(Problem(damage, Cure.RESTORE))
    if damaged:  # what it refers to is not to be relied on
        return None
    head, blocks = _committed_blocks(store, checked)
    known = {LOCK_FILE, ORIGIN_FILE, f"{ORIGIN_FILE}.new", *_DATABASE, (store.state or {}).get("tail")}
    if blocks is not None:
        known |= {path.name for path, _ in blocks.files()}
    elif head.blocks:  # which they must be is told by the tail
        known |= {path.name for path in store.folder.iterdir() if _BLOCKS.fullmatch(path.name)}
    for problem, cure in _file_problems(store.folder, known, sure=not checked.read_only):
        checked.add(problem, cure if repair else None)
    return blocks


def _committed_blocks(store: SessionStore, checked: Checked) -> tuple[Generation, BlockFiles | None]:
    """The last commit, and the files of its blocks if the tail is whole."""
    while True:
        head, state = store.committed, store.state
        if state is None and not head.chunk_end and not head.blocks:
            return head, None
        try:
            return head, stored_blocks(store.folder, store.fingerprint, head, state or {})
        except CorruptSession as error:
            if store.generation == head.number:  # else another commit has replaced the tail
                unread = " (the blocks were not read)" if head.blocks else ""
                checked.add(Problem(f"{error}{unread}", Cure.REBUILD))
                return head, None


def _file_problems(
    folder: Path, known: set[Any], *, sure: bool
) -> Iterator[tuple[Problem, Callable[[], object] | None]]:
    """What is wrong with the files of a session, by their names and modes, each with its cure.

    Args:
        known: the names that belong to the last commit.
        sure: whether other files of ours belong to nobody; else a writer may be making them.
    """
    yield from _mode_problems(folder)
    for path in sorted(folder.iterdir()):
        if path.name in known:
            yield from _mode_problems(path)
        elif not any(pattern.fullmatch(path.name) for pattern in _OURS):
            yield Problem(f"{path}: no file of a session", Cure.MOVE), None
        elif sure:
            remove = partial(shutil.rmtree, path) if path.is_dir() else path.unlink
            yield Problem(f"{path}: no commit refers to it", Cure.REPAIR), remove


def _mode_problems(path: Path) -> Iterator[tuple[Problem, Callable[[], object]]]:
    try:
        found = path.lstat().st_mode
    except FileNotFoundError:
        return
    mode = FOLDER_MODE if stat.S_ISDIR(found) else FILE_MODE
    if stat.S_IMODE(found) != mode:
        what = f"{path}: its mode is {stat.S_IMODE(found):04o}, not {mode:04o}"
        yield Problem(what, Cure.REPAIR), partial(os.chmod, path, mode)


def _check_root(catalog: Catalog, repair: bool) -> Checked:
    """What is beside the sessions: the catalogue, their common folder, and what should not be in it."""
    checked = Checked(None)
    try:
        if (damage := catalog.damage()) is not None:
            checked.add(Problem(damage, Cure.REPAIR), catalog.rebuild if repair else None)
    except StorageError as error:
        checked.add(Problem(str(error), Cure.MOVE))
    for path in (catalog.root / "catalog.db", catalog.root / "sessions"):
        for problem, cure in _mode_problems(path):
            checked.add(problem, cure if repair else None)
    for path in catalog.strays():
        checked.add(Problem(f"{path}: no folder of a session", Cure.MOVE))
    return checked
