"""What is ahead of a session's last commit: its memory, new messages and tokens, and what the session is doing."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from infllm_agent.blocks.budgets import Tiers
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import Cancelled, SessionBusy, SessionClosed
from infllm_agent.memory import snapshot
from infllm_agent.memory.context import ContextMemory
from infllm_agent.messages import Message, Turn
from infllm_agent.model.local_model import LocalModel
from infllm_agent.model.turns import Urgency
from infllm_agent.platform.faults import storage_errors
from infllm_agent.session.observer import Observer
from infllm_agent.storage.fork import check_messages
from infllm_agent.storage.rows import Extent, Log
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.storage.tail import read_tail, remove_other_tails, write_tail
from infllm_agent.tools import ToolSpec
from infllm_agent.trace import Trace


class State(Enum):
    """What a session is doing."""

    IDLE = auto()
    ARRIVING = auto()  # a streamed message is open
    GENERATING = auto()
    BROKEN = auto()  # the memory was left between two chunks: only a rollback helps
    CLOSED = auto()


class Branch(NamedTuple):
    """Where a fork leaves its source.

    Attributes:
        memory: the fork's; None if the source's cannot go back that far, so that it must be computed again.
        token_ids, chunks: what to compute it from; empty if it is there.
        kept, log, shared: as ``write_fork`` takes them.
    """

    memory: ContextMemory | None
    token_ids: Sequence[int]
    chunks: Sequence[tuple[int, int]]
    kept: Extent
    log: Log
    shared: int


class WorkingCopy:
    """A session as it stands, with what has not been committed yet.

    Methods expect the lock to be held: ``use`` takes it.

    Attributes:
        lock: guards everything here, ``state`` above all.
        state: what the session is doing.
        turn: what writes the message that is open: a ``MessageStream`` or an ``Answer``.
        memory: what the model has read.
        pending: tokens in the log that have not gone through the model yet.
        tools: those that the session announced last.
        last_start: the token at which the last message starts.
        cancelled, eager, batch: as ``Session`` says.
    """

    def __init__(
        self,
        model: LocalModel,
        config: MemoryConfig,
        store: SessionStore,
        *,
        tiers: Tiers,
        observer: Observer,
        batch: int,
    ) -> None:
        self.model = model
        self.config = config
        self.store = store
        self.tiers = tiers
        self.observer = observer
        self.batch = batch
        self.cancelled: Callable[[], bool] = lambda: False
        self.eager = True
        self.lock = threading.RLock()
        self.state = State.BROKEN  # until it is loaded
        self.turn: object | None = None
        self.tools: tuple[ToolSpec, ...] = ()

    # -- what it is doing ----------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it cannot be worked with any more: closed, or broken."""
        return self.state in (State.BROKEN, State.CLOSED)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Hold the lock of a session that is open. Raises SessionClosed."""
        with self.lock:
            if self.closed:
                raise self._closed_error()
            yield

    def check_not_generating(self) -> None:
        """Raise SessionBusy while a reply is being generated."""
        if self.state is State.GENERATING:
            raise SessionBusy(f'session "{self.store.name}" is generating a reply; finish or close it first')

    def check_idle(self) -> None:
        """Raise SessionBusy while any message is being written."""
        self.check_not_generating()
        if self.state is State.ARRIVING:
            raise SessionBusy(f'session "{self.store.name}" has a streamed message open; close it first')

    def begin(self, state: State, turn: object) -> None:
        """Open a message. Raises SessionBusy if one is open."""
        self.check_idle()
        self.state, self.turn = state, turn

    def end(self) -> None:
        """Let go of the message that was open."""
        self.turn = None
        if not self.closed:
            self.state = State.IDLE

    def close(self) -> None:
        """Release the files and the memory, for good; more than once does no harm."""
        self.state, self.turn = State.CLOSED, None
        self.store.close()
        self.memory.dismiss()

    # -- what stands in it ---------------------------------------------------------------------------------------------

    @property
    def message_count(self) -> int:
        return self.store.message_count + len(self._new_messages)

    @property
    def token_count(self) -> int:
        """Count the tokens, those that still wait to go through the model included."""
        return self._committed + len(self._new_ids)

    @property
    def uncommitted_tokens(self) -> int:
        """Count the tokens that came since the last commit."""
        return len(self._new_ids)

    @property
    def uncommitted_blocks(self) -> int:
        """Count the sealed blocks that lie in host memory until the next commit."""
        return self.memory.store.count - self._committed_blocks

    def messages(self, start: int = 0, stop: int | None = None) -> list[Message]:
        """Slice the history as ``list[start:stop]`` would."""
        first, last, _ = slice(start, stop).indices(self.message_count)
        stored = self.store.message_count
        new = self._new_messages[max(0, first - stored) : max(0, last - stored)]
        return [*self.store.messages(first, min(last, stored)), *new]

    def token_ids(self) -> list[int]:
        """Give every token of the session, in order."""
        return [*self.store.token_ids(), *self._new_ids]

    def chunks(self) -> list[tuple[int, int]]:
        """Give every execution chunk as (start, length)."""
        return [*self.store.chunks(), *self._new_chunks]

    def disk_bytes(self, tail: str | None = None) -> int:
        """Add up the bytes of the session's files; with ``tail``, as if every other tail were gone."""
        files = [path for path in self.store.folder.iterdir() if path.is_file()]
        return sum(p.stat().st_size for p in files if tail in (None, p.name) or not p.name.startswith("tail-"))

    # -- what comes in -------------------------------------------------------------------------------------------------

    def take(self, ids: Sequence[int]) -> None:
        """Append tokens to the log, where they wait to go through the model."""
        self._new_ids.extend(ids)
        self.pending.extend(ids)

    def record(self, turn: Turn, start: int, when: float) -> Message:
        """Enter a message in the history, whose tokens are all taken, the first of them at ``start``."""
        role, text, name, call_id, calls, tools = turn
        message = Message(self.message_count, role, name, call_id, text, when, start, self.token_count, calls, tools)
        self._new_messages.append(message)
        self.tools = tools or self.tools
        self.last_start = start
        self.observer.message(self.store.name, message)
        return message

    def keep_trace(self, trace: Trace) -> None:
        """Store an answer's trace with the next commit."""
        self._new_traces.append(trace)

    def ingest(self, chunks: int | None = None) -> None:
        """Put full chunks of what waits through the model: all of them, or that many at most."""
        size = self.config.chunk_size
        full = len(self.pending) // size
        self.feed((full if chunks is None else min(chunks, full)) * size)

    def feed(self, count: int, *, before_answer: bool = False, first: bool = False) -> Tensor | None:
        """Put the first ``count`` waiting tokens through the model, chunk by chunk.

        Args:
            before_answer: they are the last before an answer.
            first: an answer's first token waits for them.

        Returns:
            The logits after the last; None if there were no tokens.

        Raises:
            Cancelled: ``cancelled`` said so; what waits keeps waiting.
        """
        logits, left = None, count
        for size in self.config.chunks(count, before_answer=before_answer):
            if count > 1 and self.cancelled():
                raise Cancelled(f'session "{self.store.name}": stopped with {len(self.pending)} tokens still to ingest')
            chunk = list(islice(self.pending, size))
            start = self.memory.length
            try:
                urgency = self._urgency(left, first or before_answer)
                # New blocks may have to be written now, to make room.
                with self.observer.reading(self.memory, len(chunk)), storage_errors(self.store.folder):
                    logits = self.model.forward(chunk, self.memory, urgency=urgency, batch=self.batch)
            except BaseException as error:
                # The past is untouched unless the chunk was being made part of it.
                if not self.closed and self.memory.length != start:
                    self.state = State.BROKEN
                self.observer.failed(self.store.name, error)
                raise
            left -= size
            for _ in chunk:
                self.pending.popleft()
            self._new_chunks.append((start, len(chunk)))
        return logits

    def _urgency(self, left: int, first: bool) -> Urgency:
        """Rate reading on, with ``left`` tokens to go. An answer that has more than one chunk still to read is no more
        urgent than other reading."""
        if self.state is not State.GENERATING or left > self.config.chunk_size:
            return Urgency.NOBODY
        return Urgency.FIRST_TOKEN if first else Urgency.NEXT_TOKEN

    # -- what lasts ----------------------------------------------------------------------------------------------------

    def load(self, memory: ContextMemory | None = None) -> dict[str, Any] | None:
        """Go to the last commit; with ``memory``, which is that of the commit, nothing is read from disk for it.

        Returns:
            The record of the message that was arriving then, if there was one.

        Raises:
            SessionClosed: it was closed for good.
            CorruptSession, StorageError, BudgetExceeded: it is broken, and can be loaded again.
        """
        if self.state is State.CLOSED:
            raise self._closed_error()
        self.state, self.turn = State.BROKEN, None  # unless all of it can be loaded
        state = self.store.state or {}
        self.memory = self._stored_memory(state) if memory is None else memory
        self._committed_now()
        # What had not gone through the model yet waits again.
        self.pending = deque(self.store.token_ids(self.memory.length))
        announcing = self.store.announcing_message()
        self.tools = announcing.tools if announcing else ()
        last = self.store.messages(-1)
        self.last_start = last[0].start if last else 0
        self.state = State.IDLE
        return state.get("arriving")

    def rollback(self) -> dict[str, Any] | None:
        """Drop everything since the last commit and load that, as ``load`` says."""
        if self.state is State.CLOSED:
            raise self._closed_error()
        self.state = State.BROKEN
        self.memory.dismiss()
        return self.load()

    def commit(self, arriving: dict[str, Any] | None = None) -> int:
        """Make everything so far last, with the record of the message that is arriving, and return the number of the
        generation. Raises SessionBusy while a reply is being generated."""
        began = time.perf_counter()
        self.check_not_generating()
        if not self._new_ids and not self._new_chunks and arriving is None and self.store.generation:
            return self.store.generation
        state = self.store.state
        if state is None or self._new_chunks:  # else the memory is what it was, and only the log is longer
            self.memory.store.write()
            tensors, record = snapshot.pack(self.memory.state(), self.config, self.memory.store.files.marks)
            self.tiers.reserve_disk(sum(part.nbytes for part in tensors.values()))
            tail, crc = write_tail(self.store.folder, tensors)
            state = {"memory": record, "tail": tail, "tail_crc": crc}
        state = {key: state[key] for key in ("memory", "tail", "tail_crc")}
        if arriving is not None:
            state["arriving"] = arriving
        generation = self.store.commit(
            messages=self._new_messages,
            token_ids=self._new_ids,
            chunks=self._new_chunks,
            state=state,
            bytes_on_disk=self.disk_bytes(tail=state["tail"]),
            blocks=self.memory.store.count,
            traces=self._new_traces,
        )
        self._committed_now()
        remove_other_tails(self.store.folder, keep=state["tail"])
        self.observer.committed(self.store.name, generation, self.token_count, time.perf_counter() - began)
        return generation

    def branch(self, messages: int | None) -> Branch:
        """Work out what a fork after the first ``messages`` messages, or after all, takes over. Raises
        UnknownMessage."""
        kept_messages = check_messages(self.store.name, messages, self.message_count)
        end = self.messages(kept_messages - 1, kept_messages)[0].end if kept_messages else 0
        chunks = [(start, length) for start, length in self._new_chunks if start + length <= end]

        def fits(size: int, end: int) -> bool:
            return end == self.memory.length or self.config.looks_up_anew(size, end)

        while chunks and not fits(chunks[-1][1], sum(chunks[-1])):
            chunks.pop()
        length = sum(chunks[-1]) if chunks else self.store.chunk_boundary(min(end, self._committed), fits)
        stored = self.store.message_count
        log = Log(
            self._new_messages[: max(0, kept_messages - stored)],
            self._new_ids[: max(0, end - self._committed)],
            chunks,
            [trace for trace in self._new_traces if trace.answer < kept_messages],
        )
        kept = Extent(min(kept_messages, stored), min(end, self._committed), chunks[0][0] if chunks else length)
        if self.memory.can_rewind(length):
            return Branch(self.memory.fork(length), (), (), kept, log, self._committed_blocks)
        fed = [chunk for chunk in self.chunks() if chunk[0] < length]
        return Branch(None, self.token_ids(), fed, kept, log, 0)

    def _stored_memory(self, state: dict[str, Any]) -> ContextMemory:
        memory, folder = self.model.new_memory(self.config, self.tiers), self.store.folder
        if not state:
            memory.attach(BlockFiles(folder, memory.store.shape))
            return memory
        tensors = read_tail(folder, state["tail"], state["tail_crc"])
        saved = snapshot.unpack(tensors, state["memory"])
        snapshot.restore(memory, saved, snapshot.block_files(folder, tensors, saved, self.config))
        return memory

    def _committed_now(self) -> None:
        self._new_messages: list[Message] = []
        self._new_ids: list[int] = []
        self._new_chunks: list[tuple[int, int]] = []
        self._new_traces: list[Trace] = []
        self._committed = self.store.token_count
        self._committed_blocks = self.memory.store.count

    def _closed_error(self) -> SessionClosed:
        return SessionClosed(f'session "{self.store.name}" is closed; open it again')
