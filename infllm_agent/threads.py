"""Work done in a thread, for asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


async def from_thread(produce: Callable[[Callable[[], bool]], Iterator[T]]) -> AsyncGenerator[T, None]:
    """What ``produce`` yields in a thread of its own.

    The thread is one item ahead at most. Closed early, or cancelled, it tells ``produce`` to stop and waits until it
    has.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[tuple[T, ...] | None] = asyncio.Queue()  # None: the end
    room = threading.Semaphore(1)
    left = threading.Event()
    failure: BaseException | None = None

    def hand_over(item: tuple[T, ...] | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits any more
            left.set()

    def work() -> None:
        nonlocal failure
        try:
            for item in produce(left.is_set):
                while not room.acquire(timeout=0.1) and not left.is_set():
                    pass
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
        left.set()
        while items is not None:
            items = await arrived.get()
    if failure is not None:
        raise failure
