"""What was appended to sessions goes through the model in the background, before anybody asks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from infllm_agent.errors import Cancelled, UnknownSession
from infllm_agent.routing.session_pool import Desk
from infllm_agent.runtime import AgentRuntime

log = logging.getLogger(__name__)

#: Sessions that are read at once: the model is one, and they take turns.
THREADS = 4
#: A session that is read for long is committed so often, in seconds.
COMMIT_S = 30.0


class Reader:
    """Reads sessions as far as full chunks wait in them, and leaves a session as soon as a call wants it."""

    def __init__(self, runtime: AgentRuntime, desk: Desk, stopping: Callable[[], bool]) -> None:
        self._runtime = runtime
        self._desk = desk
        self._stopping = stopping
        self._mutex = threading.Lock()
        self._wanted: set[str] = set()  # queued, or under way
        self._again: set[str] = set()  # of these, where something came meanwhile
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="infllm-reader")

    def read(self, name: str) -> None:
        """Sooner or later. What is not read when a call comes, the call reads."""
        with self._mutex:
            if self._stopping():
                return
            if name in self._wanted:
                self._again.add(name)
            else:
                self._wanted.add(name)
                self._pool.submit(self._work, name)

    def close(self) -> None:
        """Wait for what is under way, which ends where ``stopping`` says so."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _work(self, name: str) -> None:
        while True:
            try:
                finished = self._read(name)
            except Cancelled:
                return  # the server stops; what waits is on disk
            except UnknownSession:
                finished = True  # it is deleted
            except Exception as error:
                log.warning('session "%s" is not read ahead: %s', name, error)
                finished = True
            with self._mutex:
                if finished and name not in self._again:
                    self._wanted.discard(name)
                    return
                self._again.discard(name)

    def _read(self, name: str) -> bool:
        """Until it is read, or a call wants it; whether it is read."""
        while self._desk.waiting(name) and not self._stopping():
            time.sleep(0.02)
        with self._desk.by_name(self._runtime, name, self._stopping, make=False) as session:
            committed = time.monotonic()
            while session.pending_tokens >= session.config.chunk_size:
                if self._stopping() or self._desk.waiting(name):
                    break
                session.ingest(chunks=1)
                if time.monotonic() - committed > COMMIT_S:
                    session.commit()
                    committed = time.monotonic()
            session.commit()
            return session.pending_tokens < session.config.chunk_size
