"""One model, many sessions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from os import PathLike
from typing import Any

from infllm_agent.agent import arun_agent, astream_agent, run_agent, stream_agent
from infllm_agent.agent_events import AgentEvent, AgentRun
from infllm_agent.catalog import Catalog, SessionInfo
from infllm_agent.chat import ChatFormat
from infllm_agent.config import MemoryConfig
from infllm_agent.fingerprint import check_fingerprint, fingerprint
from infllm_agent.model import LocalModel
from infllm_agent.session import Session
from infllm_agent.store import SessionStore


class AgentRuntime:
    """A local model with its sessions in one folder.

        runtime = AgentRuntime.open("sessions", model="smollm2")
        session = runtime.session("ops")

    Sessions stay open until ``close``, which commits them. Several threads may use one runtime; each session is
    worked on by one thread at a time.
    """

    def __init__(self, root: str | PathLike[str], model: LocalModel, memory: MemoryConfig | None = None) -> None:
        """Use ``open`` unless the model is loaded already. ``memory``: for new sessions, and required of old ones;
        None takes the default for new sessions and what each old one was made with."""
        self.root = root
        self.model = model
        self.memory = memory
        self.chat = ChatFormat(model.tokenizer, eos_ids=model.eos_ids)
        if memory is not None:
            model.check_memory(memory)
        self._sessions: dict[str, Session] = {}
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        root: str | PathLike[str],
        model: str = "smollm2",
        memory: MemoryConfig | None = None,
        *,
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
        return cls(root, LocalModel.load(str(model), device=device, dtype=dtype, progress=progress), memory)

    def session(self, name: str) -> Session:
        """The session by that name, created or resumed.

        Raises:
            InvalidName, SessionLocked (open in another process), SessionMismatch (made with another model or other
            memory settings), CorruptSession, StorageError.
        """
        with self._lock:
            if (session := self._sessions.get(name)) is not None:
                if not session.closed:
                    return session
                del self._sessions[name]  # with it its memory
                session.close()
            config = self.memory or self.model.default_memory()
            store = SessionStore.open_or_create(self.root, name, fingerprint(self.model, self.chat, config))
            try:
                config = self.check(name, store.fingerprint)
                session = Session(self.model, self.chat, config, store)
            except BaseException:
                store.close()
                raise
            self._sessions[name] = session
            return session

    def fork(
        self,
        source: str,
        name: str,
        messages: int | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Session:
        """A new session that begins as ``source``, after all its messages or the first so many (``Session.fork``).

        Raises:
            UnknownSession, SessionLocked, SessionMismatch: of ``source``.
            SessionExists, InvalidName: of ``name``.
            UnknownMessage: ``source`` has not so many messages.
            CorruptSession, StorageError.
        """
        with self._lock:
            if source not in self._sessions:
                Catalog(self.root).require(source)
            original = self.session(source)
        fork = original.fork(name, messages, cancelled=cancelled)  # without the lock: other sessions go on
        with self._lock:
            self._sessions[name] = fork
        return fork

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

    def is_open(self, name: str) -> bool:
        """Whether this runtime has the session open."""
        with self._lock:
            session = self._sessions.get(name)
            return session is not None and not session.closed

    def release(self, name: str) -> None:
        """Commit and close a session, if it is open here; ``session`` opens it again."""
        with self._lock:
            if (session := self._sessions.pop(name, None)) is not None and not session.closed:
                with session:
                    session.abandon_stream()

    def sessions(self) -> Sequence[SessionInfo]:
        """All sessions under the root, by name, as of their last commits."""
        return Catalog(self.root).list()

    def delete(self, name: str) -> None:
        """Delete a session with everything that belongs to it.

        Raises:
            UnknownSession, SessionLocked (open in another process).
        """
        with self._lock:
            if (session := self._sessions.pop(name, None)) is not None:
                session.close()
            Catalog(self.root).delete(name)

    def close(self) -> None:
        """Commit and close every open session. One that fails does not keep the others open."""
        failure: BaseException | None = None
        with self._lock:
            for name in list(self._sessions):
                try:
                    self.release(name)
                except Exception as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def __enter__(self) -> AgentRuntime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
