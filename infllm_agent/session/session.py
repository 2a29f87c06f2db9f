"""A session: messages go in, tokens stream into the memory, replies come out, commits make it last."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

from infllm_agent.blocks.budgets import Tiers
from infllm_agent.chat.format import ChatFormat
from infllm_agent.config import MemoryConfig, SamplingConfig, TraceMode
from infllm_agent.errors import ConfigError, InfLLMError
from infllm_agent.generation.grammar import Grammars
from infllm_agent.maintenance.archive import export_session
from infllm_agent.memory.context import ContextMemory
from infllm_agent.messages import Message, Turn
from infllm_agent.model.local_model import LocalModel
from infllm_agent.model.replay import replay
from infllm_agent.platform.faults import storage_errors
from infllm_agent.reply import Reply
from infllm_agent.session.answering import Answer, writer_for
from infllm_agent.session.message_stream import MessageStream
from infllm_agent.session.observer import Observer
from infllm_agent.session.working_copy import WorkingCopy
from infllm_agent.storage.fork import write_fork
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.tools import ToolCall, ToolSpec

#: New tokens from which on a session is committed while it reads.
COMMIT_TOKENS = 4096


class Session:
    """An unbounded session on one model. Made by ``AgentRuntime.session``.

    Messages are tokenised when they come; full chunks go through the model at once, the rest waits for more or for
    ``reply``. One thread at a time works on a session; others wait.

    Attributes:
        working: what is ahead of the last commit, and the lock.
        last_reply: the latest answer, since the session was opened.
        observer: told of what happens; the runtime's.
        trace: of which tokens it is recorded what they attend to, from the next answer on.
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
        trace: TraceMode = "sampled",
        batch: int = 1,
        commit_s: float = 30.0,
        after_commit: Callable[[SessionStore], None] | None = None,
        read_again: int = 0,
    ) -> None:
        """
        Args:
            memory: that of the last commit, where it is at hand; None loads it.
            tiers: what the memory may take; None: as much as it needs, or what a given one has.
            resume_message: a message that was arriving at the last commit is open again (``open_message``); otherwise
                it ends with what had arrived.
            observer: told of what happens; None: the log only.
            grammars: shared with the other sessions of the model; None: its own.
            batch: most sessions whose next tokens go through the model together (``RuntimeConfig.batch``).
            commit_s: seconds after which a session that reads for long is committed again.
            after_commit: called by ``commit`` at its end, also when there was nothing to commit.
        """
        self.model = model
        self.chat = chat
        self.grammars = grammars or Grammars(chat)
        self.config = config
        self.store = store
        self.last_reply: Reply | None = None
        self.read_again = read_again
        self.observer = observer or Observer()
        self.tiers = tiers or (memory.tiers if memory is not None else Tiers(pin=model.device.type == "cuda"))
        self.trace = trace
        self._batch, self._commit_s, self._after_commit = batch, commit_s, after_commit
        self.working = WorkingCopy(model, config, store, tiers=self.tiers, observer=self.observer, batch=batch)
        self._resume(self.working.load(memory), keep_open=resume_message)
        self.observer.opened(self.name, self.message_count, self.token_count)

    # -- how it works --------------------------------------------------------------------------------------------------

    @property
    def eager(self) -> bool:
        """Whether what comes in goes through the model at once, as far as it fills chunks; if not, ``ingest`` and
        ``reply`` do it."""
        return self.working.eager

    @eager.setter
    def eager(self, eager: bool) -> None:
        self.working.eager = eager

    @property
    def cancelled(self) -> Callable[[], bool]:
        """Asked between chunks and tokens; when it returns True, the work stops with ``Cancelled``."""
        return self.working.cancelled

    @cancelled.setter
    def cancelled(self, cancelled: Callable[[], bool]) -> None:
        self.working.cancelled = cancelled

    # -- what is stored --------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.store.name

    @property
    def memory(self) -> ContextMemory:
        """What the model has read."""
        return self.working.memory

    @property
    def token_count(self) -> int:
        """Tokens of the session, those that still wait to go through the model included."""
        return self.working.token_count

    @property
    def pending_tokens(self) -> int:
        """Tokens that wait for a full chunk, or for a reply."""
        return len(self.working.pending)

    @property
    def uncommitted_blocks(self) -> int:
        """Sealed blocks that lie in host memory until the next commit."""
        return self.working.uncommitted_blocks

    def messages(self, start: int = 0, stop: int | None = None) -> list[Message]:
        """The history, as ``list[start:stop]`` means it."""
        with self.working.use():
            return self.working.messages(start, stop)

    @property
    def message_count(self) -> int:
        return self.working.message_count

    def token_ids(self) -> list[int]:
        """Every token of the session, in order."""
        with self.working.use():
            return self.working.token_ids()

    def chunks(self) -> list[tuple[int, int]]:
        """Every execution chunk as (start, length): replaying them gives the same memory."""
        with self.working.use():
            return self.working.chunks()

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """The tools that the session announced last."""
        return self.working.tools

    @property
    def usage(self) -> dict[str, Any]:
        """Sizes, in the form of ``sessions show``: messages, tokens, blocks, bytes by tier."""
        with self.working.use():
            return {
                "messages": self.message_count,
                "tokens": self.token_count,
                "blocks": self.memory.store.count,
                "bytes": {
                    "device": self.memory.device_bytes() + self.memory.index_bytes(),
                    "host": self.memory.store.host_bytes(),
                    "disk": self.working.disk_bytes(),
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
        return self.add(Turn(role, text, name, call_id, tuple(calls), tuple(tools)))

    def add(self, turn: Turn) -> Message:
        """Append a whole message, like ``append``."""
        with self.working.use():
            with self._open(turn) as stream:
                stream.write(turn.text)
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
        return self._open(Turn(role, "", name, call_id))

    def _open(self, turn: Turn) -> MessageStream:
        if (turn.calls and turn.role != "assistant") or (turn.tools and turn.role != "system"):
            raise ConfigError(
                f"a message of the {turn.role} has no calls and no tools: the assistant calls, the system tells"
            )
        with self.working.use():
            return MessageStream(self.working, self.chat, turn).begin()

    def stream_tool_result(self, name: str, *, call_id: str | None = None) -> MessageStream:
        return self.stream("tool", name=name, call_id=call_id)

    def stream_observation(self, name: str | None = None) -> MessageStream:
        return self.stream("observation", name=name)

    def ingest(self, chunks: int | None = None) -> None:
        """Put full chunks of what waits through the model: all, or so many.

        Raises:
            Cancelled: ``cancelled`` said so; what waits keeps waiting, nothing is lost.
        """
        with self.working.use():
            self.working.ingest(chunks)

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
        with self.working.use():
            self.working.check_idle()
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
        answer = Answer(self.working, self.chat, writer, prefix=prefix, trace=self.trace, finished=self._answered)
        return answer.pieces()

    def _answered(self, reply: Reply) -> None:
        self.last_reply = reply
        self.observer.answered(self.name, reply)

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
        with self.working.use(), self.observer.watching(self.name), storage_errors(self.store.folder):
            arriving = self.open_message
            generation = self.working.commit(arriving.record() if arriving else None)
            if self._after_commit is not None:
                self._after_commit(self.store)
            return generation

    @property
    def is_due(self) -> bool:
        """Whether what came since the last commit, or the time since then, is so much that it is time for another."""
        new = self.working.uncommitted_tokens
        # By the clock of the store: a slow message is read by many.
        return new >= COMMIT_TOKENS or (new > 0 and time.time() - self.store.updated > self._commit_s)

    def rollback(self) -> None:
        """Go back to the last commit. Raises SessionClosed if the session was closed."""
        with self.working.lock:
            self._resume(self.working.rollback(), keep_open=False)

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
        with self.working.use():
            memory, ids, chunks, kept, log, shared = self.working.branch(messages)
        read_again = 0
        if memory is None:
            memory = replay(self.model, self.config, ids, chunks, cancelled or self.cancelled)
            read_again = memory.length
        store = write_fork(
            self.store, name, memory.state(), memory.store, config=self.config, kept=kept, log=log, shared=shared
        )
        try:
            fork = Session(
                self.model,
                self.chat,
                self.config,
                store,
                memory,
                observer=self.observer,
                grammars=self.grammars,
                trace=self.trace,
                batch=self._batch,
                commit_s=self._commit_s,
                after_commit=self._after_commit,
                read_again=read_again,
            )
        except BaseException:
            store.close()
            raise
        self.observer.forked(name, self.name, read_again)
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
        """Whether the session cannot be used any more: it was closed, or broke in the middle of a chunk."""
        return self.working.closed

    @property
    def open_message(self) -> MessageStream | None:
        """The streamed message that is arriving."""
        turn = self.working.turn
        return turn if isinstance(turn, MessageStream) else None

    def abandon_stream(self) -> None:
        """Complete a streamed message that is still open with what has arrived."""
        with self.working.lock:
            if (stream := self.open_message) is not None and not self.closed:
                stream.close(read=False)

    def close(self) -> None:
        """Release the session without committing; more than once does no harm."""
        with self.working.lock:
            told = self.closed
            self.working.close()
            if not told:
                self.observer.closed(self.name)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self.working.lock:
            try:
                if kind is None and not self.closed:
                    self.commit()
            finally:
                self.close()

    def _resume(self, arriving: dict[str, Any] | None, *, keep_open: bool) -> None:
        """Open the message that was arriving at the commit that was just loaded, or end it with what had arrived."""
        if arriving is not None:
            stream = MessageStream.resume(self.working, self.chat, arriving)
            if not keep_open:
                stream.close(read=False)
