"""A call of a tool under way: its thread, its time, its output as it comes."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from infllm_agent.agent.functions import NO_OUTPUT, InvalidArguments, StopAgent, Tool, result_text
from infllm_agent.errors import Cancelled
from infllm_agent.tools import ToolCall

#: Characters that a tool may be ahead of the model; one that would be further ahead waits.
MOST_AHEAD = 1 << 16
#: Seconds between two looks at whether the work is to stop.
POLL = 0.05


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        text: the result, or what stands behind the output that was streamed.
        error: whether the text is about what went wrong.
        stop: what ends the run, if the tool asked for that.
    """

    text: str
    error: bool = False
    stop: BaseException | None = None


class ToolRun:
    """One call of a tool, begun when this is made, in a thread of its own.

    A thread cannot be killed. A call that runs over its time is left behind: an async tool is cancelled, a generator is
    closed when it yields next, a plain function runs on with nobody to take its result. Time in which the tool waits
    because the model has not read what it wrote does not count.

    Args:
        timeout: seconds, or infinity.
        loop: on which what is async runs.
    """

    def __init__(
        self, tool: Tool, call: ToolCall, timeout: float, loop: Callable[[], asyncio.AbstractEventLoop]
    ) -> None:
        self._tool, self._call = tool, call
        self._loop = loop
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._changed = threading.Condition()
        self._pieces: deque[str] = deque()  # written, and not taken yet
        self._ahead = 0  # their characters
        self._waits_since: float | None = None  # when the tool began to wait for room
        self._wrote = False
        self._outcome: Outcome | None = None
        work = contextvars.copy_context()
        threading.Thread(target=work.run, args=(self._work,), name=f"tool-{tool.name}", daemon=True).start()

    @property
    def outcome(self) -> Outcome:
        """Known when ``pieces`` has come to its end."""
        assert self._outcome is not None
        return self._outcome

    def pieces(self, cancelled: Callable[[], bool]) -> Iterator[str]:
        """What the tool writes while it runs, as it comes, until it has ended or its time is up.

        Raises:
            Cancelled: ``cancelled`` said so.
        """
        while True:
            with self._changed:
                if not self._pieces and self._outcome is None:
                    self._changed.wait(min(POLL, self._time_left()))
                ended = self._outcome is not None or self._is_late()
                text = "".join(self._pieces)
                self._pieces.clear()
                self._ahead = 0
                self._changed.notify_all()
            if text:
                yield text
            elif ended:
                return
            if cancelled():
                raise Cancelled(f'stopped while tool "{self._tool.name}" was running')

    def abandon(self) -> None:
        """Take nothing more from the tool, and stop it as far as that can be done."""
        with self._changed:
            self._end(Outcome("", error=True))

    # -- in the tool's thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            outcome = Outcome(self._result())
        except _Abandoned:
            return
        except InvalidArguments as error:
            outcome = Outcome(f"error: {error}", error=True)
        except StopAgent as stop:
            outcome = Outcome(str(stop) or "the run was stopped", stop=stop)
        except Exception as error:
            outcome = Outcome(f"error: {type(error).__name__}: {error}", error=True)
        except BaseException as error:  # KeyboardInterrupt, SystemExit: not the tool's failure
            outcome = Outcome("error: the call was interrupted", error=True, stop=error)
        with self._changed:
            if not self._is_late():
                self._end(outcome)

    def _result(self) -> str:
        """Run the tool. Returns its result as text; "" for one that has written its output."""
        arguments = self._tool.validated(self._call.arguments)
        result = self._tool.function(**arguments)
        if inspect.isawaitable(result):
            result = self._on_loop(result)
        if isinstance(result, AsyncIterator):
            self._on_loop(self._drain(result))
        elif isinstance(result, Iterator):
            self._take_all(result)
        else:
            return result_text(result)
        return "" if self._wrote else NO_OUTPUT

    def _take_all(self, pieces: Iterator[Any]) -> None:
        try:
            for piece in pieces:
                with self._changed:
                    while not self._has_taken(piece):
                        self._changed.wait()
        finally:
            if inspect.isgenerator(pieces):
                pieces.close()

    async def _drain(self, pieces: AsyncIterator[Any]) -> None:
        try:
            async for piece in pieces:
                while not self._has_taken(piece):
                    await asyncio.sleep(POLL)
        finally:
            if inspect.isasyncgen(pieces):
                await pieces.aclose()

    def _has_taken(self, piece: Any) -> bool:
        """Take a piece of output, unless there is no room for it yet."""
        if not isinstance(piece, str):
            raise TypeError(f"the tool yielded {type(piece).__name__}, not text")
        with self._changed:
            if self._outcome is not None or self._is_late():
                raise _Abandoned
            if self._ahead >= MOST_AHEAD:
                self._waits_since = self._waits_since or time.monotonic()
                return False
            if self._waits_since is not None:
                self._deadline += time.monotonic() - self._waits_since
                self._waits_since = None
            self._pieces.append(piece)
            self._ahead += len(piece)
            self._wrote = self._wrote or bool(piece)
            self._changed.notify_all()
            return True

    def _on_loop(self, work: Awaitable[Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(_awaited(work), self._loop())
        with self._changed:
            future.add_done_callback(lambda _: self._wake())
            while not future.done():
                if self._outcome is not None or self._is_late():
                    future.cancel()
                    raise _Abandoned
                left = self._time_left()
                self._changed.wait(None if math.isinf(left) else left)
        result, stop = future.result()
        if stop is not None:
            raise stop
        return result

    # -- in both, under the lock ---------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _time_left(self) -> float:
        return math.inf if self._waits_since is not None else max(0.0, self._deadline - time.monotonic())

    def _is_late(self) -> bool:
        """Whether the time is up; then the call has ended."""
        if self._time_left() > 0:
            return False
        self._end(
            Outcome(f"error: the tool took more than {self._timeout:g} s and was left; it may still do its work", True)
        )
        return True

    def _end(self, outcome: Outcome) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._changed.notify_all()


class _Abandoned(BaseException):
    """Nobody waits for this call any more."""


async def _awaited(work: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    try:
        return await work, None
    except (KeyboardInterrupt, SystemExit) as error:  # they would end the loop
        return None, error


_loop: asyncio.AbstractEventLoop | None = None
_loop_lock = threading.Lock()


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop on which async tools run where their caller has none: one for the process, so that what they keep open
    between calls stays usable."""
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="async-tools", daemon=True).start()
        return _loop
