"""Work done in threads: for asyncio, and several reads at once."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from infllm_agent.platform.cancellation import Cancellation

T = TypeVar("T")

#: How many reads are under way at once: disks answer many as fast as one.
READERS = 8
#: How many pieces of computing are under way beside who waits for them.
HELPERS = 2


def in_parallel(work: Callable[[T], None], parts: Sequence[T]) -> None:
    """Do some work for every part, in several threads if there are several parts. Raises what one of them raised."""
    if len(parts) == 1:
        work(parts[0])
        return
    for _ in _readers().map(work, parts):
        pass


def in_background(work: Callable[[], None]) -> None:
    """Do it in another thread, sooner or later; nobody is told how it went."""
    _readers().submit(work)


def begun(work: Callable[[], None]) -> Callable[[], None]:
    """Have it done in another thread. What is returned waits until it is done, or does it if nobody has begun yet, and
    raises what it raised. To be called once."""
    global _begun
    with _mutex:
        _begun += 1
        future = _helpers().submit(work)
    future.add_done_callback(lambda _: _ended())

    def finish() -> None:
        if future.cancel():
            work()
        else:
            future.result()

    return finish


_mutex = threading.Lock()
_begun = 0


def _ended() -> None:
    """When nothing is under way the helpers go: threads that compute keep others waiting (``compute``)."""
    global _begun
    with _mutex:
        _begun -= 1
        if not _begun:
            _helpers().shutdown(wait=False)
            _helpers.cache_clear()


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="infllm-read")


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(HELPERS, thread_name_prefix="infllm-begun")


def _forget() -> None:
    """A forked child has none of the threads."""
    global _begun, _mutex
    _begun, _mutex = 0, threading.Lock()
    _readers.cache_clear()
    _helpers.cache_clear()


os.register_at_fork(after_in_child=_forget)


async def from_thread(produce: Callable[[Cancellation], Iterator[T]]) -> AsyncGenerator[T, None]:
    """What ``produce`` yields in a thread of its own.

    The thread is one item ahead at most. Closed early, or cancelled, it tells ``produce`` to stop and waits until it
    has.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[tuple[T, ...] | None] = asyncio.Queue()  # None: the end
    room = threading.Semaphore(1)
    left = Cancellation()
    failure: BaseException | None = None

    def hand_over(item: tuple[T, ...] | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits any more
            left.cancel()

    def work() -> None:
        nonlocal failure
        try:
            with left.watched(room.release):
                for item in produce(left):
                    if not left():
                        room.acquire()
                    hand_over((item,))
        except BaseException as error:
            failure = error
        hand_over(None)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), name="infllm-agent-reply").start()
    items: tuple[T, ...] | None = ()
    try:
        while (items := await arrived.get()) is not None:
            for item in items:
                room.release()
                yield item
    finally:
        left.cancel()
        while items is not None:
            items = await arrived.get()
    if failure is not None:
        raise failure
