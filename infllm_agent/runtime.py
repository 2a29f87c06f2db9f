"""One model, many sessions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from infllm_agent.agent.events import AgentEvent, AgentRun
from infllm_agent.agent.loop import arun_agent, astream_agent, run_agent, stream_agent
from infllm_agent.blocks.budgets import Tiers
from infllm_agent.chat.format import ChatFormat
from infllm_agent.config import MemoryConfig, RuntimeConfig
from infllm_agent.errors import BudgetExceeded, ConfigError, SessionExists
from infllm_agent.generation.grammar import Grammars
from infllm_agent.live.dispatcher import Dispatcher
from infllm_agent.live.live_session import LiveSession
from infllm_agent.maintenance.archive import import_session
from infllm_agent.maintenance.bucket import Bucket
from infllm_agent.maintenance.rebuild import rebuild
from infllm_agent.model.local_model import LocalModel
from infllm_agent.session.fingerprint import check_fingerprint, fingerprint
from infllm_agent.session.observer import Load, Observer
from infllm_agent.session.session import Session
from infllm_agent.storage.catalog import Catalog, SessionInfo, check_name
from infllm_agent.storage.session_store import SessionStore

if TYPE_CHECKING:
    from infllm_agent.session.metrics import Metrics


class AgentRuntime:
    """A local model with its sessions in one folder.

        runtime = AgentRuntime.open("sessions", model="smollm2")
        session = runtime.session("ops")

    Sessions stay open until ``close``, which commits them. Several threads may use one runtime; each session is
    worked on by one thread at a time.

    Attributes:
        metrics: what all its sessions do, counted; None unless ``RuntimeConfig(metrics=True)``.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        model: LocalModel,
        memory: MemoryConfig | None = None,
        config: RuntimeConfig | None = None,
        bucket: Bucket | str | None = None,
    ) -> None:
        """Use ``open`` unless the model is loaded already.

        Args:
            memory: for new sessions, and required of old ones; None takes the default for new sessions and what each
                old one was made with.
            config: what live sessions are allowed; what is recorded of answers; whether there are metrics.
            bucket: where every commit is published, and sessions are fetched from that are not here or were continued
                elsewhere; a ``Bucket`` or its URL.

        Raises:
            ConfigError.
        """
        self.bucket = Bucket(bucket) if isinstance(bucket, str) else bucket
        self.root = root
        self.model = model
        self.memory = memory
        self.config = config or RuntimeConfig()
        self.chat = ChatFormat(model.tokenizer, eos_ids=model.eos_ids)
        self.grammars = Grammars(self.chat)
        if memory is not None:
            model.check_memory(memory)
        self._sessions: dict[str, Session] = {}
        self._published: WeakKeyDictionary[SessionStore, int] = WeakKeyDictionary()  # the last generation of each
        self._held: set[str] = set()  # handed out by ``session`` and ``fork``: they stay open until released
        self._lock = threading.RLock()
        self.tiers = Tiers(
            self.config.device_budget,
            self.config.host_budget,
            self.config.disk_budget,
            root=Path(root),
            pin=model.device.type == "cuda",
        )
        self._working_size: int | None = None
        self.metrics = _metrics(self.load) if self.config.metrics else None
        self.observer: Observer = self.metrics or Observer()
        self.dispatcher = Dispatcher(self, self.config)
        self._check_budgets()

    @classmethod
    def open(
        cls,
        root: str | PathLike[str],
        model: str = "smollm2",
        memory: MemoryConfig | None = None,
        config: RuntimeConfig | None = None,
        *,
        bucket: Bucket | str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        progress: Callable[[str], None] | None = None,
    ) -> AgentRuntime:
        """Load a model and use the sessions under ``root`` (made when the first session is).

        Args:
            model: a packaged alias (``smollm2``), a local folder, or a hub id.
            progress: told what takes long (fetching, converting).

        Raises:
            ModelNotFound, UnsupportedModel, ConfigError.
        """
        loaded = LocalModel.load(str(model), device=device, dtype=dtype, progress=progress)
        return cls(root, loaded, memory, config, bucket)

    def session(self, name: str) -> Session:
        """The session by that name, created or resumed.

        Raises:
            InvalidName, SessionLocked (open in another process), SessionMismatch (made with another model or other
            memory settings), CorruptSession, StorageError.
            BudgetExceeded: there is no room for it on the device, with no live session idle.
        """
        with self.dispatcher.pinned(name):  # until it is held
            session = self.open_for_call(name)
            self._held.add(name)
        return session

    def live(self, name: str) -> LiveSession:
        """The session by that name as something that lives beside its users: what comes in is queued and read in the
        background, and it is open only while there is something to do. It is made when the first message comes.

        Raises:
            InvalidName.
        """
        check_name(name)
        return LiveSession(self, name, self.dispatcher.inbox(name))

    def fork(
        self,
        source: str,
        name: str,
        messages: int | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        hold: bool = True,
    ) -> Session:
        """A new session that begins as ``source``, after all its messages or the first so many (``Session.fork``).

        Args:
            hold: whether it stays open until it is released.

        Raises:
            UnknownSession, SessionLocked, SessionMismatch: of ``source``.
            SessionExists, InvalidName: of ``name``.
            UnknownMessage: ``source`` has not so many messages.
            CorruptSession, StorageError.
        """
        if self.is_taken(check_name(name)):
            raise SessionExists(f'session "{name}" already exists: the bucket has it')
        with self._lock:
            if source not in self._sessions:
                Catalog(self.root).require(source)
        with self.dispatcher.pinned(source):
            original = self.open_for_call(source)
            fork = original.fork(name, messages, cancelled=cancelled)  # without the lock: other sessions go on
        with self._lock:
            self._sessions[name] = fork
            if hold:
                self._held.add(name)
        return fork

    def import_session(self, path: str | PathLike[str], name: str | None = None) -> SessionInfo:
        """A session from a file that ``Session.export`` or ``sessions export`` made: ``archive.import_session``, which
        names the errors. It need not be one that this runtime's model can open."""
        return import_session(self.root, path, name)

    def rebuild(
        self,
        name: str,
        *,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Compute a session's memory again from its log, where its blocks or its tail are damaged: ``rebuild.rebuild``.

        Args:
            cancelled: asked between chunks.
            progress: told how many tokens have been read, of how many.

        Returns:
            The number of the new generation.

        Raises:
            UnknownSession, SessionLocked (open in this runtime, too: release it first), SessionMismatch.
            CorruptSession: the log itself is damaged.
            Cancelled, StorageError, BudgetExceeded: nothing has changed.
        """
        with SessionStore.open(self.root, name) as store:
            config = self.check(name, store.fingerprint)
            return rebuild(store, self.model, config, tiers=self.tiers, cancelled=cancelled, progress=progress)

    def run_agent(self, session: Session | str, task: str | None = None, **options: Any) -> AgentRun:
        """Have the model work on a task with tools: ``agent.run_agent``, which names the options and errors.

            runtime.run_agent("ops", "What is wrong with db-3?", tools=[read_log]).text

        Args:
            session: a session, or the name of one that is created or resumed.
        """
        return run_agent(self._opened(session), task, **options)

    def stream_agent(
        self, session: Session | str, task: str | None = None, **options: Any
    ) -> Generator[AgentEvent, None, None]:
        """As ``run_agent``, giving what happens as it happens: ``agent.stream_agent``."""
        return stream_agent(self._opened(session), task, **options)

    async def arun_agent(self, session: Session | str, task: str | None = None, **options: Any) -> AgentRun:
        """As ``run_agent``, in a thread; async tools run on the caller's loop."""
        return await arun_agent(await asyncio.to_thread(self._opened, session), task, **options)

    async def astream_agent(
        self, session: Session | str, task: str | None = None, **options: Any
    ) -> AsyncGenerator[AgentEvent, None]:
        """As ``stream_agent``, in a thread; async tools run on the caller's loop."""
        opened = await asyncio.to_thread(self._opened, session)
        async with aclosing(astream_agent(opened, task, **options)) as events:
            async for event in events:
                yield event

    def _opened(self, session: Session | str) -> Session:
        return self.session(session) if isinstance(session, str) else session

    def check(self, name: str, stored: dict[str, Any]) -> MemoryConfig:
        """The memory settings under which a session with the fingerprint ``stored`` opens here.

        Raises:
            SessionMismatch: it does not.
        """
        config = self.memory or MemoryConfig.from_record(stored["memory"])
        check_fingerprint(name, stored, fingerprint(self.model, self.chat, config))
        return config

    def refresh(self, name: str) -> None:
        """With a bucket: have a session as it was last published, if another machine has gone on with it. Not while
        anybody works with it here.

        Raises:
            Diverged: it has commits that were never published.
            StorageError, CorruptSession.
        """
        if self.bucket is None:
            return
        with self._lock:
            if self.bucket.is_current(self.root, name):
                return
            self.drop(name)
            self.bucket.pull(self.root, name)

    def is_taken(self, name: str) -> bool:
        """Whether a new session cannot have a name because one in the bucket has it."""
        return self.bucket is not None and self.bucket.last(name) is not None

    def is_open(self, name: str) -> bool:
        """Whether this runtime has the session open."""
        with self._lock:
            session = self._sessions.get(name)
            return session is not None and not session.closed

    def release(self, name: str) -> None:
        """Commit and close a session, if it is open here; ``session`` opens it again. What is queued for it as a live
        session goes in first, and a message that is arriving ends with what has come."""
        with self.dispatcher.quiet(name):
            self._release(name)

    def sessions(self) -> Sequence[SessionInfo]:
        """All sessions under the root, by name, as of their last commits."""
        return Catalog(self.root).list()

    def load(self) -> Load:
        """What is open, and to be done, right now. Waits for nothing: it may be asked at any time."""
        memories = [session.memory for session in list(self._sessions.values()) if not session.closed]
        running, items, chars = self.dispatcher.backlog()
        tiers = {
            "device": sum(memory.device_bytes() + memory.index_bytes() for memory in memories),
            "host": self.tiers.host_bytes(),
            "disk": sum(memory.store.stored * memory.store.shape.stride for memory in memories),
        }
        return Load(len(memories), running, items, chars, self.model.turns.waiting, tiers)

    def delete(self, name: str) -> None:
        """Delete a session with everything that belongs to it.

        Raises:
            UnknownSession, SessionLocked (open in another process).
        """
        with self.dispatcher.quiet(name):
            self._delete(name)

    def stop(self) -> None:
        """Live sessions take nothing more in; what they work on ends at the next chunk or token. ``close`` waits for
        that. May be called from a signal handler or any thread."""
        self.dispatcher.stop()

    def close(self) -> None:
        """Take in what is queued for live sessions, then commit and close every open session. One that fails does not
        keep the others open."""
        self.dispatcher.close()
        failure: BaseException | None = None
        with self._lock:
            for name in list(self._sessions):
                try:
                    self._release(name)
                except Exception as error:
                    failure = failure or error
        if self.metrics is not None:
            self.metrics.close()
        if failure is not None:
            raise failure

    async def aclose(self) -> None:
        """As ``close``, without holding up the loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> AgentRuntime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> AgentRuntime:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def open_for_call(self, name: str) -> Session:
        """The session by that name, open for as long as a call uses it; idle ones are closed where there is no room.
        Errors are those of ``session``."""
        while True:
            try:
                with self._lock:
                    return self._open(name)
            except BudgetExceeded:
                if not self.dispatcher.close_idle():
                    raise

    # -- for the dispatcher ------------------------------------------------------------------------------------------

    def open_idle(self, name: str) -> Session:
        with self._lock:
            return self._open(name, resume_message=True)

    def commit_idle(self, name: str) -> None:
        with self._lock:
            if (session := self._sessions.get(name)) is not None and not session.closed:
                session.commit()

    def close_idle(self, name: str) -> None:
        with self._lock:
            if (session := self._sessions.pop(name, None)) is not None and not session.closed:
                with session:
                    pass

    def drop(self, name: str) -> None:
        with self._lock:
            self._held.discard(name)
            if (session := self._sessions.pop(name, None)) is not None:
                session.close()

    def open_names(self) -> set[str]:
        return set(self._sessions)

    def is_unread(self, name: str) -> bool:
        session = self._sessions.get(name)
        if session is None or session.closed or name in self._held:
            return False
        return session.pending_tokens >= session.config.chunk_size

    def open_sizes(self) -> dict[str, int]:
        with self._lock:
            return {name: session.memory.bytes() for name, session in self._sessions.items()}

    def may_close(self, name: str) -> bool:
        with self._lock:
            return name not in self._held

    def working_size(self) -> int:
        if self._working_size is None:
            self._working_size = self.model.new_memory(self.memory).bytes()
        return self._working_size

    # -- how -----------------------------------------------------------------------------------------------------------

    def _open(self, name: str, *, resume_message: bool = False) -> Session:
        if (session := self._sessions.get(name)) is not None:
            if not session.closed:
                return session
            self.drop(name)  # with it its memory
        config = self.memory or self.model.default_memory()
        with self.observer.watching(name):
            if self.bucket is not None:
                self.bucket.pull(self.root, name)
            store = SessionStore.open_or_create(self.root, name, fingerprint(self.model, self.chat, config))
            try:
                config = self.check(name, store.fingerprint)
                session = Session(
                    self.model,
                    self.chat,
                    config,
                    store,
                    tiers=self.tiers,
                    resume_message=resume_message,
                    observer=self.observer,
                    grammars=self.grammars,
                    trace=self.config.trace,
                    batch=self.config.batch,
                    commit_s=self.config.commit_s,
                    after_commit=self._publish,
                )
            except BaseException:
                store.close()
                raise
        self._sessions[name] = session
        return session

    def _publish(self, store: SessionStore) -> None:
        """Publish what a session committed last, unless the bucket has it from here already."""
        if self.bucket is not None and self._published.get(store) != (generation := store.generation):
            self.bucket.publish(self.root, store.name)
            self._published[store] = generation

    def _check_budgets(self) -> None:
        device, host = self.tiers.device_budget, self.tiers.host_budget
        if device is not None and device < self.working_size():
            raise ConfigError(
                f"device_budget {device:,} is less than the {self.working_size():,} bytes of one session: raise it, or "
                "lower max_cached_block, n_local or chunk_size"
            )
        if host is not None and host < (least := self.model.new_memory(self.memory).store.least_host_bytes()):
            raise ConfigError(f"host_budget {host:,} is less than the {least:,} bytes that one session needs: raise it")

    def _release(self, name: str) -> None:
        with self._lock:
            self._held.discard(name)
            if (session := self._sessions.pop(name, None)) is not None and not session.closed:
                with session:
                    session.abandon_stream()

    def _delete(self, name: str) -> None:
        with self._lock:
            self.drop(name)
            published = self.bucket if self.bucket is not None and self.bucket.has(self.root, name) else None
            Catalog(self.root).delete(name)  # not if another process has it open
            if published is not None:
                published.delete(name)


def _metrics(load: Callable[[], Load]) -> Metrics:
    from infllm_agent.session.metrics import Metrics  # which needs what may not be installed

    return Metrics(load)
