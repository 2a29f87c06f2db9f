"""A session that begins as another one: its folder, made from the other's without reading the history.

Full segments of blocks are immutable, so both folders name the same files (hard links). What is written anew: the
blocks of the last, partly used segment, the tail, and the rows of the database. Sizes on disk count shared files in
full for every session that has them.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from infllm_agent.blocks.store import BlockStore
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import NeedsModel, UnknownMessage
from infllm_agent.memory import snapshot
from infllm_agent.memory.state import Division, MemoryState
from infllm_agent.storage.catalog import SessionInfo
from infllm_agent.storage.rows import Extent, Log
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.storage.tail import read_tail, write_tail


def check_messages(name: str, messages: int | None, count: int) -> int:
    """Say how many of a session's ``count`` messages to keep; None keeps them all. Raises UnknownMessage."""
    if messages is None:
        return count
    if not 0 <= messages <= count:
        raise UnknownMessage(f'session "{name}" cannot be forked after {messages} messages: it has {count}')
    return messages


def write_fork(
    source: SessionStore,
    name: str,
    state: MemoryState,
    blocks: BlockStore,
    *,
    config: MemoryConfig,
    kept: Extent,
    log: Log,
    shared: int,
) -> SessionStore:
    """Make the session ``name`` and open it for writing.

    Args:
        state, blocks: the new session's memory.
        kept, log: its record: how much of what is committed in ``source``, and what comes after that.
        shared: how many blocks are the same as the first committed ones of ``source``.

    Raises:
        SessionExists, InvalidName, StorageError, CorruptSession.
    """

    def fill(folder: Path) -> tuple[dict[str, Any], int]:
        blocks.move(folder, shared)
        tensors, record = snapshot.pack(state, config, blocks.files.marks)
        tail, crc = write_tail(folder, tensors)
        return {"memory": record, "tail": tail, "tail_crc": crc}, blocks.count

    store = source.fork(name, kept, log, fill)
    blocks.files.folder = store.folder  # it was filled under another name
    return store


def fork_stored(root: str | PathLike[str], source: str, name: str, messages: int | None = None) -> SessionInfo:
    """Fork a session as it was last committed, without its model: after its first ``messages``; None: all.

    Raises:
        UnknownSession, SessionLocked (the source is open for writing), UnknownMessage, SessionExists, InvalidName,
        StorageError, CorruptSession.
        NeedsModel: the memory at that message is not held any more, and only the model can compute it again.
    """
    with SessionStore.open(root, source) as store:
        kept_messages = check_messages(source, messages, store.message_count)
        if (record := store.state) is None:  # nothing was ever committed
            with SessionStore.create(root, name, store.fingerprint) as fork:
                return fork.info
        config = MemoryConfig.from_record(store.fingerprint["memory"])
        tensors = read_tail(store.folder, record["tail"], record["tail_crc"])
        state = snapshot.unpack(tensors, record["memory"])
        blocks = BlockStore.of(snapshot.block_files(store.folder, tensors, state, config))
        tokens = store.messages(kept_messages - 1, kept_messages)[0].end if kept_messages else 0
        length = store.chunk_boundary(tokens, lambda size, end: end == state.length or config.looks_up_anew(size, end))
        if not state.can_rewind(length, config):
            raise NeedsModel(
                f'session "{source}": its memory does not hold what it was after {messages} messages; '
                "only its model can compute it again"
            )
        state = state.rewound(length, config, blocks)
        blocks = blocks.fork(Division.of(state.length, config).blocks)
        kept = Extent(kept_messages, tokens, length)
        with write_fork(store, name, state, blocks, config=config, kept=kept, log=Log(), shared=blocks.count) as fork:
            return fork.info
