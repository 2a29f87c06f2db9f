"""A stored session to check, export and prune; and processes that are killed at each step of what they do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from infllm_agent import AgentRuntime, MemoryConfig, Session
from infllm_agent.blocks.layout import BlockShape
from infllm_agent.blocks.segments import PAGE, SEGMENT_BLOCKS
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.rows import checksum

SMALL = MemoryConfig(n_init=4, n_local=32, block_size=4, topk=6, chunk_size=16, max_cached_block=8, candidates=9)
SHAPE = BlockShape(layers=3, kv_heads=2, block_size=4, head_dim=8, dtype="float32")  # of the tiny model
KEYS = PAGE  # where the keys that stand for blocks begin
RECORDS = PAGE + SEGMENT_BLOCKS * SHAPE.layers * SHAPE.key_bytes
FORK = multiprocessing.get_context("fork")


def talk(session: Session, blocks: int) -> None:
    """Messages, a traced answer, and tokens that wait for more, until there are so many blocks; committed."""
    session.append_user("the tool printed a line of its log and the agent asked what it means")
    session.reply(max_tokens=4)
    while session.memory.store.count < blocks:
        session.append_tool_result("shell", "error 404 at 12:30, retry in 5 s\n" * 20)
        session.commit()
    session.append_user("what it means")
    session.commit()


def make(root: Path, model: LocalModel, name: str = "ops", blocks: int = SEGMENT_BLOCKS + 6) -> None:
    with AgentRuntime(root, model, SMALL) as runtime:
        talk(runtime.session(name), blocks)


def folder_of(root: Path, name: str = "ops") -> Path:
    return root / "sessions" / Catalog(root).require(name)


def next_logits(root: Path, model: LocalModel, name: str = "ops") -> torch.Tensor:
    """As the stored session goes on."""
    with AgentRuntime(root, model) as runtime:
        session = runtime.session(name)
        memory = session.memory.fork()
        fed = [*session.working.pending, *range(5, 45)]
        logits = [model.forward(fed[start : start + 16], memory) for start in range(0, len(fed), 16)]
        session.store.close()  # nothing is committed
        session.close()
        return torch.stack(logits)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change(folder: Path, sql: str, *values: Any) -> None:
    with closing(sqlite3.connect(folder / "session.db")) as db, db:
        db.execute(sql, values)


def change_generation(folder: Path, **fields: Any) -> None:
    """With a good checksum."""
    with closing(sqlite3.connect(folder / "session.db")) as db, db:
        names = "number, state, messages, tokens, message_end, chunk_end, blocks, bytes_on_disk, updated"
        row = dict(zip(names.split(", "), db.execute(f"SELECT {names} FROM generation").fetchone(), strict=True))
        row |= fields
        changes = ", ".join(f"{name} = ?" for name in row)
        db.execute(f"UPDATE generation SET {changes}, crc = ?", (*row.values(), checksum(*row.values())))


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a process that is killed before its so-many-th call that changes files. False if it had fewer."""

    def run() -> None:
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        work()
        os._exit(0)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal step
            step -= 1
            if step == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counting

    process = FORK.Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
