"""A session's memory computed again from its log, where blocks or tail are damaged or missing."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from infllm_agent.blocks.budgets import Tiers
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.config import MemoryConfig
from infllm_agent.memory import snapshot
from infllm_agent.model.replay import replay
from infllm_agent.platform.faults import storage_errors
from infllm_agent.platform.files import sync_folder
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.storage.tail import remove_other_tails, write_tail

if TYPE_CHECKING:
    from infllm_agent.model.local_model import LocalModel

#: Blocks are written about so often; until then they lie in host memory.
WRITTEN_TOKENS = 8192


def rebuild(
    store: SessionStore,
    model: LocalModel,
    config: MemoryConfig,
    *,
    tiers: Tiers | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Read a session's log again, in the same chunks, and commit the memory that this makes as a new generation.

    Messages and tokens stay as they are. The old files are replaced when the new ones are on stable storage: killed
    midway, the session is as before, or rebuilt. To the bit what it was, where the model computes as it did then.

    Args:
        store: open for writing.
        tiers: what the memory may take meanwhile; None: as much as it needs.
        cancelled: asked between chunks.
        progress: told how many tokens have been read, of how many.

    Returns:
        The number of the new generation.

    Raises:
        CorruptSession: the log itself is damaged.
        Cancelled: ``cancelled`` said so; nothing has changed.
        StorageError, BudgetExceeded: likewise. Until it is done, old and new blocks are on disk.
    """
    store.verify()
    ids, state = store.token_ids(), store.state or {}
    total, folder = store.committed.chunk_end, store.folder
    made = folder / f"rebuilt-{uuid.uuid4().hex}"
    with storage_errors(made):
        os.mkdir(made, 0o700)
        tail = None
        try:
            memory = model.new_memory(config, tiers)
            memory.attach(BlockFiles(made, memory.store.shape))
            for chunks in _stretches(store.chunks(), WRITTEN_TOKENS):
                replay(model, config, ids, chunks, cancelled, memory)
                memory.store.write()
                progress(memory.length, total)
            sync_folder(made)
            tensors, record = snapshot.pack(memory.state(), config, memory.store.files.marks)
            tail, crc = write_tail(folder, tensors)
            count = memory.store.count
            memory.dismiss()
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            if tail is not None:
                (folder / tail).unlink(missing_ok=True)
            raise
        arriving = {"arriving": state["arriving"]} if state.get("arriving") else {}
        # Whatever happens from here on, the new files may be those of the last commit.
        generation = store.commit(
            messages=(),
            token_ids=(),
            chunks=(),
            state={"memory": record, "tail": tail, "tail_crc": crc, "rebuilt": made.name} | arriving,
            bytes_on_disk=store.info.bytes["disk"],
            blocks=count,
        )
        store.settle()
        remove_other_tails(folder, keep=tail)
    return generation


def _stretches(chunks: list[tuple[int, int]], tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Group the chunks (start, length) into stretches of about ``tokens`` tokens."""
    first = 0
    for i, (start, length) in enumerate(chunks, 1):
        if i == len(chunks) or start + length - chunks[first][0] >= tokens:
            yield chunks[first:i]
            first = i
