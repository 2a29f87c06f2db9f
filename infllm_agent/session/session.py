"""A session: messages go in, tokens stream into the memory, replies come out, commits make it last."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from os import PathLike
from typing import Any

from torch import Tensor

from infllm_agent.blocks.budgets import Tiers
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.chat.format import ChatFormat
from infllm_agent.config import MemoryConfig, SamplingConfig, TraceMode
from infllm_agent.errors import Cancelled, ConfigError, InfLLMError, SessionBusy, SessionClosed
from infllm_agent.generation.grammar import Grammars
from infllm_agent.maintenance.archive import export_session
from infllm_agent.memory import snapshot
from infllm_agent.memory.context import ContextMemory
from infllm_agent.messages import Message
from infllm_agent.model.local_model import LocalModel
from infllm_agent.model.turns import Urgency
from infllm_agent.platform.faults import storage_errors
from infllm_agent.reply import Reply
from infllm_agent.session.answering import generate, writer_for
from infllm_agent.session.message_stream import MessageStream
from infllm_agent.session.observer import Observer
from infllm_agent.storage.fork import check_messages, replay, write_fork
from infllm_agent.storage.rows import Extent, Log
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.storage.tail import read_tail, remove_other_tails, write_tail
from infllm_agent.tools import ToolCall, ToolSpec
from infllm_agent.trace import Trace


class Session:
    """An unbounded session on one model. Made by ``AgentRuntime.session``.

    Messages are tokenised when they come; full chunks go through the model at once, the rest waits for more or for
    ``reply``. One thread at a time works on a session; others wait.

    Attributes:
        eager: whether what comes in goes through the model at once, as far as it fills chunks; if not, ``ingest`` and
            ``reply`` do it.
        cancelled: asked between chunks and tokens; when it returns True, the work stops with ``Cancelled``.
        last_reply: the latest answer, since the session was opened.
        observer: told of what happens; the runtime's.
        trace: of which tokens it is recorded what they attend to, from the next answer on.
        batch: most sessions whose next tokens go through the model together (``RuntimeConfig.batch``).
        after_commit: called by ``commit`` at its end, also when there was nothing to commit.
        read_again: tokens that went through the model when the session was made, because its source could not go back.
    """

    def __init__(
        self,
        model: LocalModel,
        chat: ChatFormat,
        config: MemoryConfig,
        store: SessionStore,
        memory: ContextMemory | None = None,
        *,
        tiers: Tiers | None = None,
        resume_message: bool = False,
        observer: Observer | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """
        Args:
            memory: that of the last commit, where it is at hand; None loads it.
            tiers: what the memory may take; None: as much as it needs, or what a given one has.
            resume_message: a message that was arriving at the last commit is open again (``open_message``); otherwise
                it ends with what had arrived.
            observer: told of what happens; None: the log only.
            grammars: shared with the other sessions of the model; None: its own.
        """
        self.model = model
        self.chat = chat
        self.grammars = grammars or Grammars(chat)
        self.config = config
        self.store = store
        self.cancelled: Callable[[], bool] = lambda: False
        self.eager = True
        self.last_reply: Reply | None = None
        self.read_again = 0
        self.observer = observer or Observer()
        self.tiers = tiers or (memory.tiers if memory is not None else Tiers(pin=model.device.type == "cuda"))
        self.trace: TraceMode = "sampled"
        self.batch = 1
        self.after_commit: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self._stream: MessageStream | None = None
        self._broken = False
        self._load(memory, resume_message=resume_message)
        self.observer.opened(self.name, self.message_count, self.token_count)

    # -- what is stored --------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.store.name

    @property
    def token_count(self) -> int:
        """Tokens of the session, those that still wait to go through the model included."""
        return self._committed + len(self._new_ids)

    @property
    def pending_tokens(self) -> int:
        """Tokens that wait for a full chunk, or for a reply."""
        return len(self._pending)

    @property
    def uncommitted_blocks(self) -> int:
        """Sealed blocks that lie in host memory until the next commit."""
        return self.memory.store.count - self._committed_blocks

    def messages(self, start: int = 0, stop: int | None = None) -> list[Message]:
        """The history, as ``list[start:stop]`` means it."""
        with self._working():
            first, last, _ = slice(start, stop).indices(self.message_count)
            stored = self.store.message_count
            new = self._new_messages[max(0, first - stored) : max(0, last - stored)]
            return [*self.store.messages(first, min(last, stored)), *new]

    @property
    def message_count(self) -> int:
        return self.store.message_count + len(self._new_messages)

    def token_ids(self) -> list[int]:
        """Every token of the session, in order."""
        with self._working():
            return [*self.store.token_ids(), *self._new_ids]

    def chunks(self) -> list[tuple[int, int]]:
        """Every execution chunk as (start, length): replaying them gives the same memory."""
        with self._working():
            return [*self.store.chunks(), *self._new_chunks]

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """The tools that the session announced last."""
        return self._tools

    @property
    def usage(self) -> dict[str, Any]:
        """Sizes, in the form of ``sessions show``: messages, tokens, blocks, bytes by tier."""
        with self._working():
            return {
                "messages": self.message_count,
                "tokens": self.token_count,
                "blocks": self.memory.store.count,
                "bytes": {
                    "device": self.memory.device_bytes() + self.memory.index_bytes(),
                    "host": self.memory.store.host_bytes(),
                    "disk": self._disk_bytes(),
                },
            }

    # -- what comes in ---------------------------------------------------------------------------------------------

    def append(
        self,
        role: str,
        text: str,
        *,
        name: str | None = None,
        call_id: str | None = None,
        calls: Sequence[ToolCall] = (),
        tools: Sequence[ToolSpec] = (),
    ) -> Message:
        """Append a whole message.

        Args:
            role: ``system``, ``user``, ``assistant``, ``observation`` or ``tool``.
            text: any text; what looks like control tokens in it stays text.
            name: of the tool or the source of an observation.
            call_id: of the call that a tool's result answers.
            calls: that an assistant's message makes, after its text.
            tools: that a system message announces.

        Raises:
            InvalidName: an unknown role, or a name outside its alphabet.
            ConfigError: calls or tools in a message of another role.
            SessionBusy: a streamed message is open.
        """
        with self._working():
            with self._stream_message(role, name, call_id, tuple(calls), tuple(tools)) as stream:
                stream.write(text)
            return stream.close()

    def append_system(self, text: str, *, tools: Sequence[ToolSpec] = ()) -> Message:
        return self.append("system", text, tools=tools)

    def append_user(self, text: str) -> Message:
        return self.append("user", text)

    def append_assistant(self, text: str, *, calls: Sequence[ToolCall] = ()) -> Message:
        return self.append("assistant", text, calls=calls)

    def append_observation(self, text: str, name: str | None = None) -> Message:
        return self.append("observation", text, name=name)

    def append_tool_result(self, name: str, text: str, *, call_id: str | None = None) -> Message:
        return self.append("tool", text, name=name, call_id=call_id)

    def stream(self, role: str, *, name: str | None = None, call_id: str | None = None) -> MessageStream:
        """A message that arrives in pieces. No other message or reply is possible until it is closed."""
        return self._stream_message(role, name, call_id, (), ())

    def _stream_message(
        self,
        role: str,
        name: str | None,
        call_id: str | None,
        calls: tuple[ToolCall, ...],
        tools: tuple[ToolSpec, ...],
    ) -> MessageStream:
        if (calls and role != "assistant") or (tools and role != "system"):
            raise ConfigError(
                f"a message of the {role} has no calls and no tools: the assistant calls, the system tells"
            )
        with self._working():
            self._idle()
            stream = MessageStream(self, role, name, call_id, calls, tools).begin()
            self._stream = stream
            return stream

    def stream_tool_result(self, name: str, *, call_id: str | None = None) -> MessageStream:
        return self.stream("tool", name=name, call_id=call_id)

    def stream_observation(self, name: str | None = None) -> MessageStream:
        return self.stream("observation", name=name)

    def ingest(self, chunks: int | None = None) -> None:
        """Put full chunks of what waits through the model: all, or so many.

        Raises:
            Cancelled: ``cancelled`` said so; what waits keeps waiting, nothing is lost.
        """
        with self._working():
            size = self.config.chunk_size
            full = len(self._pending) // size
            self._feed((full if chunks is None else min(chunks, full)) * size)

    # -- what goes out ---------------------------------------------------------------------------------------------

    def reply(self, **options: Any) -> Reply:
        """The model's answer to the session as it stands. Options and errors are those of ``stream_reply``."""
        for _ in self.stream_reply(**options):
            pass
        assert self.last_reply is not None
        return self.last_reply

    def stream_reply(
        self,
        *,
        prefix: str = "",
        tools: Sequence[ToolSpec] | None = None,
        tool_choice: str = "auto",
        parallel_calls: bool = True,
        schema: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """As ``reply``, giving the text piece by piece; afterwards the answer is ``last_reply``.

        If the iterator is closed early, or ``cancelled`` says so, the answer so far is kept as the message.

        Args:
            prefix: words that the answer begins with; part of its text.
            tools: that may be called; None: those that the session announces.
            tool_choice: ``auto`` (the model decides), ``none``, ``any`` (one call at least), or a tool's name.
            parallel_calls: whether there may be several calls.
            schema: a JSON schema that the text of the answer is valid under. There are no calls then, unless ``tools``
                are given with it: the answer is calls or JSON.
            sampling: fields of ``SamplingConfig``.

        Raises:
            ConfigError: an unknown or impossible parameter; a prefix with which the answer cannot begin.
            UnsupportedSchema: a schema, or a tool's parameters, that the answer cannot be held to.
            SessionBusy: a streamed message is open.
        """
        config = SamplingConfig(**sampling)
        with self._working():
            self._idle()
            if self.message_count == 0:
                raise InfLLMError(f'session "{self.name}" is empty: append a message before asking for a reply')
            prefix = self.chat.encoder.clean(prefix)
            if tools is None:
                tools = self.tools if schema is None else ()
            writer = writer_for(
                self.grammars,
                config,
                prefix=prefix,
                tools=tools,
                tool_choice=tool_choice,
                parallel_calls=parallel_calls,
                schema=schema,
            )
        return generate(self, writer, prefix)

    @contextmanager
    def cancelled_by(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        """While this lasts, the session's work also stops when the given check says so."""
        before = self.cancelled
        self.cancelled = lambda: cancelled() or before()
        try:
            yield
        finally:
            self.cancelled = before

    # -- what lasts ------------------------------------------------------------------------------------------------

    def commit(self) -> int:
        """Make everything so far last: after it returns, a crash or a power cut does not lose it.

        Of a streamed message that is open, what has arrived lasts; if the process ends before more comes, the message
        ends with it.

        Returns:
            The number of the committed generation.

        Raises:
            SessionBusy: a reply is being generated.
            StorageError: the disk is full or cannot be written; the generation before is still whole. Or the bucket
                cannot be written: then it is committed here, and the next commit publishes it.
            Diverged: another machine has published the session meanwhile (``Bucket``).
            BudgetExceeded: it does not fit under ``disk_budget``; likewise.
        """
        with self._working(), self.observer.watching(self.name), storage_errors(self.store.folder):
            began = time.perf_counter()
            self._not_generating()
            if not self._new_ids and not self._new_chunks and self._stream is None and self.store.generation:
                self.after_commit()
                return self.store.generation
            state = self.store.state
            if state is None or self._new_chunks:  # else the memory is what it was, and only the log is longer
                self.memory.store.write()
                tensors, record = snapshot.pack(self.memory.state(), self.config, self.memory.store.files.marks)
                self.tiers.reserve_disk(sum(part.nbytes for part in tensors.values()))
                tail, crc = write_tail(self.store.folder, tensors)
                state = {"memory": record, "tail": tail, "tail_crc": crc}
            arriving = {"arriving": self._stream.record()} if self._stream else {}
            state = {key: state[key] for key in ("memory", "tail", "tail_crc")} | arriving
            generation = self.store.commit(
                messages=self._new_messages,
                token_ids=self._new_ids,
                chunks=self._new_chunks,
                state=state,
                bytes_on_disk=self._disk_bytes(tail=state["tail"]),
                blocks=self.memory.store.count,
                traces=self._new_traces,
            )
            self._committed_now()
            remove_other_tails(self.store.folder, keep=state["tail"])
            self.observer.committed(self.name, generation, self.token_count, time.perf_counter() - began)
            self.after_commit()
            return generation

    def rollback(self) -> None:
        """Go back to the last commit."""
        with self._lock:
            self._broken = True  # unless it can be loaded
            self.memory.dismiss()
            self._load()

    def fork(self, name: str, messages: int | None = None, *, cancelled: Callable[[], bool] | None = None) -> Session:
        """A new session that begins as this one: committed, open, and independent of it from then on.

        It takes over complete messages only, so a reply that is being generated, or a streamed message that is open,
        is not in it. Stored blocks are shared on disk and in memory. Where the memory does not hold what it was after
        the last of them (``ContextMemory.can_rewind``), the log is read again in the same chunks.

        Args:
            messages: take over the first so many; None takes all.
            cancelled: asked while the log is read again; None: this session's.

        Raises:
            UnknownMessage: there are not so many messages.
            SessionExists, InvalidName: the name is taken, or none that a session may have.
            Cancelled: ``cancelled`` said so.
            StorageError, CorruptSession.
        """
        self.store.check_free(name)
        with self._working():
            kept_messages = check_messages(self.name, messages, self.message_count)
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
            shared = self._committed_blocks
            memory = self.memory.fork(length) if self.memory.can_rewind(length) else None
            if memory is None:
                ids, fed = self.token_ids(), [chunk for chunk in self.chunks() if chunk[0] < length]
        read_again = 0
        if memory is None:
            memory, shared = replay(self.model, self.config, ids, fed, cancelled or self.cancelled), 0
            read_again = memory.length
        store = write_fork(
            self.store, name, memory.state(), memory.store, config=self.config, kept=kept, log=log, shared=shared
        )
        try:
            fork = Session(
                self.model, self.chat, self.config, store, memory, observer=self.observer, grammars=self.grammars
            )
        except BaseException:
            store.close()
            raise
        fork.read_again = read_again
        self.observer.forked(name, self.name, read_again)
        fork.trace, fork.batch = self.trace, self.batch
        return fork

    def export(self, path: str | PathLike[str]) -> None:
        """Commit, and write the session to one file, which ``AgentRuntime.import_session`` makes a session of again.

        Raises:
            SessionBusy: a reply is being generated.
            CorruptSession: what is stored is damaged; nothing is written.
            StorageError.
        """
        self.commit()
        export_session(self.store.root, self.name, path)

    @property
    def closed(self) -> bool:
        return self._broken

    @property
    def open_message(self) -> MessageStream | None:
        """The streamed message that is arriving."""
        return self._stream

    def abandon_stream(self) -> None:
        """Complete a streamed message that is still open with what has arrived."""
        if self._stream is not None and not self._broken:
            self._end_message()

    def _end_message(self) -> None:
        """Complete the streamed message; what has not gone through the model waits in the log."""
        assert self._stream is not None
        eager, self.eager = self.eager, False
        try:
            self._stream.close()
        finally:
            self.eager = eager

    def close(self) -> None:
        """Release the session without committing; more than once does no harm."""
        with self._lock:
            self.store.close()
            if not self._broken:
                self.observer.closed(self.name)
            self._broken = True
            self.memory.dismiss()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None and not self._broken:
                self.commit()
        finally:
            self.close()

    def _load(self, memory: ContextMemory | None = None, *, resume_message: bool = False) -> None:
        """The state of the last commit."""
        state = self.store.state or {}
        self.memory = self._stored_memory(state) if memory is None else memory
        self._new_messages: list[Message] = []
        self._new_ids: list[int] = []
        self._new_chunks: list[tuple[int, int]] = []
        self._new_traces: list[Trace] = []
        self._committed_now()
        # What had not gone through the model yet waits again.
        self._pending = deque(self.store.token_ids(self.memory.length))
        announcing = self.store.announcing_message()
        self._tools = announcing.tools if announcing else ()
        last = self.store.messages(-1)
        self._last_start = last[0].start if last else 0
        self._generating = False
        self._broken = False
        arriving = state.get("arriving")
        self._stream = MessageStream.resume(self, arriving) if arriving else None
        if self._stream and not resume_message:
            self._end_message()

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
        self._new_messages, self._new_ids, self._new_chunks, self._new_traces = [], [], [], []
        self._committed = self.store.token_count
        self._committed_blocks = self.memory.store.count

    # -- how ---------------------------------------------------------------------------------------------------------

    def _working(self) -> threading.RLock:
        """The session's lock, after a check that the session can be worked with."""
        if self._broken:
            raise SessionClosed(f'session "{self.name}" is closed; open it again')
        return self._lock

    def _not_generating(self) -> None:
        if self._generating:
            raise SessionBusy(f'session "{self.name}" is generating a reply; finish or close it first')

    def _idle(self) -> None:
        self._not_generating()
        if self._stream is not None:
            raise SessionBusy(f'session "{self.name}" has a streamed message open; close it first')

    def _ingest_if_eager(self) -> None:
        if self.eager:
            self.ingest()

    def _take(self, ids: Sequence[int]) -> None:
        """Tokens enter the session's log and wait to go through the model."""
        self._new_ids.extend(ids)
        self._pending.extend(ids)

    def _record(
        self,
        role: str,
        text: str,
        start: int,
        when: float,
        name: str | None,
        call_id: str | None,
        calls: tuple[ToolCall, ...] = (),
        tools: tuple[ToolSpec, ...] = (),
    ) -> Message:
        message = Message(self.message_count, role, name, call_id, text, when, start, self.token_count, calls, tools)
        self._new_messages.append(message)
        self._tools = tools or self._tools
        self._last_start = start
        self.observer.message(self.name, message)
        return message

    def _feed(self, count: int, *, before_answer: bool = False, first: bool = False) -> Tensor | None:
        """Put the first ``count`` waiting tokens through the model, chunk by chunk; the logits after the last.

        Args:
            before_answer: they are the last before an answer.
            first: an answer's first token waits for them.
        """
        logits, left = None, count
        for size in self.config.chunks(count, before_answer=before_answer):
            if count > 1 and self.cancelled():
                raise Cancelled(f'session "{self.name}": stopped with {len(self._pending)} tokens still to ingest')
            chunk = list(islice(self._pending, size))
            start = self.memory.length
            try:
                urgency = self._urgency(left, first or before_answer)
                # New blocks may have to be written now, to make room.
                with self.observer.reading(self.memory, len(chunk)), storage_errors(self.store.folder):
                    logits = self.model.forward(chunk, self.memory, urgency=urgency, batch=self.batch)
            except BaseException as error:
                # The past is untouched unless the chunk was being made part of it.
                self._broken = self.memory.length != start
                self.observer.failed(self.name, error)
                raise
            left -= size
            for _ in chunk:
                self._pending.popleft()
            self._new_chunks.append((start, len(chunk)))
        return logits

    def _urgency(self, left: int, first: bool) -> Urgency:
        """Of reading on, with so many tokens left. An answer that has more than one chunk still to read is no more
        urgent than other reading."""
        if not self._generating or left > self.config.chunk_size:
            return Urgency.NOBODY
        return Urgency.FIRST_TOKEN if first else Urgency.NEXT_TOKEN

    def _disk_bytes(self, tail: str | None = None) -> int:
        """Bytes of the session's files; once other tails than the given one are gone."""
        files = [path for path in self.store.folder.iterdir() if path.is_file()]
        return sum(p.stat().st_size for p in files if tail in (None, p.name) or not p.name.startswith("tail-"))
