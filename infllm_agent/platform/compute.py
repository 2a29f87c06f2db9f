"""The one thread of a process that computes.

An operation that several cores share is done by OpenMP workers, and every thread that computes has workers of its own.
Once there are more of them than cores they no longer wait for each other awake: with two of them to an operation a
decoded token then takes 1.7 times as long (``benchmarks/threads.py``). So whoever has a model compute, a server's
workers or an application's threads, hands the work to this one and waits.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _GivenUp(BaseException):
    """Nobody waits for the work that is being done any more."""


class _Job(Generic[T]):
    """A piece of work, and the thread that waits for it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._threads = torch.get_num_threads()  # of an operation, as the waiting thread has set it
        self._inference = torch.is_inference_mode_enabled()
        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream() if on_gpu else None  # and so the GPU
        self._done = False
        self._waited = threading.Lock()  # held until it is done; the fastest thing to wait for
        self._waited.acquire()
        self._result: T | None = None
        self._error: BaseException | None = None
        self.given_up = False

    def do(self) -> None:
        if self._done:
            return
        if self._threads != torch.get_num_threads():
            torch.set_num_threads(self._threads)
        try:
            if not self.given_up:
                with torch.inference_mode(self._inference), torch.cuda.stream(self._stream):
                    self._result = self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._done = True
            self._waited.release()

    def result(self, jobs: SimpleQueue[_Job[Any] | None], *, leave: bool) -> Any:
        """Hand it over and wait for what comes of it. Interrupted, the work is given up, and unless it may be left has
        ended when this raises."""
        interrupt: BaseException | None = None
        handed_over = False
        while not self._done:
            try:
                if not handed_over:  # interrupted between these two it is handed over twice, and done once
                    jobs.put(self)
                    handed_over = True
                self._waited.acquire()
            except BaseException as error:  # KeyboardInterrupt, or a signal's SystemExit
                interrupt, self.given_up = error, True
                if leave:
                    break
        if interrupt is not None:
            raise interrupt
        if isinstance(self._error, _GivenUp):
            threading.Event().wait()  # the process ends
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self._error  # its traceback holds this frame
        return self._result


class ComputeThread:
    """Does what other threads ask it to, in their order.

    In the middle of its work it may be asked to let other work in (``between``, ``wait``). It is then done on top of
    that work, which goes on afterwards.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a forked child has none of the threads

    def _reset(self) -> None:
        self._mutex = threading.Lock()
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()  # None: an event may have been set
        self._doing: list[_Job[Any]] = []  # the innermost last
        self._thread: threading.Thread | None = None
        self._ended = False

    def run(self, work: Callable[[], T], *, leave: bool = False) -> T:
        """Have it done there, and wait. Raises what it raises.

        An interrupt (Ctrl-C) of the waiting thread is raised when the work has reached its next ``between``.

        Args:
            leave: interrupted, do not wait for the work: nothing comes of it.
        """
        here = threading.current_thread()
        if here is self._thread:
            return work()
        if self._ended:
            if here.daemon:
                threading.Event().wait()  # the process ends; a thread in the middle of computing would abort it
            return work()
        job = _Job(work)
        with self._mutex:
            if self._thread is None:
                self._thread = threading.Thread(target=self._live, name="infllm-compute", daemon=True)
                self._thread.start()
                atexit.register(self._end)
        result: T = job.result(self._jobs, leave=leave)
        return result

    def between(self) -> None:
        """Between two steps of some work: what else has been asked for is done; what nobody waits for ends here."""
        if threading.current_thread() is not self._thread:
            return
        while not self._jobs.empty():
            self._do(self._jobs.get())
        if self._doing and self._doing[-1].given_up:
            raise _GivenUp

    def wait(self, called: threading.Event) -> None:
        """Wait for an event; on this thread, while doing what is asked for. Who sets the event calls ``wake``."""
        if threading.current_thread() is not self._thread:
            called.wait()
            return
        while not called.is_set():
            if self._ended:
                raise _GivenUp
            self._do(self._jobs.get())

    def wake(self) -> None:
        """An event that ``wait`` may be waiting for has been set."""
        self._jobs.put(None)

    def _live(self) -> None:
        while not self._ended:
            self._do(self._jobs.get())

    def _end(self) -> None:
        """The process ends: what is being done is ended at its next ``between``, and waited for."""
        self._ended = True
        for job in list(self._doing):
            job.given_up = True
        self.wake()
        if self._thread is None:
            return
        try:
            self._thread.join()
        except KeyboardInterrupt:  # once more: at once, without a word
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def _do(self, job: _Job[Any] | None) -> None:
        if job is None:
            return
        self._doing.append(job)
        try:
            job.do()
        finally:
            self._doing.pop()


@cache
def compute_thread() -> ComputeThread:
    """The one of this process."""
    return ComputeThread()
