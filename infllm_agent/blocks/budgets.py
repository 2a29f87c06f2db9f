"""What the memories of all sessions of a runtime may take: ceilings for the device, for host memory and for the disk.

In host memory there are sealed blocks that are not written yet, which may take a quarter of its budget, and what was
read from files. The ceilings hold for all sessions together.
"""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from typing import Protocol

from infllm_agent.blocks.host_cache import HostCache
from infllm_agent.blocks.layout import BlockShape
from infllm_agent.errors import BudgetExceeded
from infllm_agent.platform.files import folder_bytes

#: Where there is no budget, most bytes of host memory for what was read from files.
CACHE_BYTES = 1 << 30
#: Seconds after which what is on disk is measured again: other processes write there too.
MEASURE_S = 60.0


class OnDevice(Protocol):
    """What takes memory of the device."""

    def bytes(self) -> int: ...


class Unwritten(Protocol):
    """What holds sealed blocks that are in no file yet."""

    def unwritten(self) -> dict[int, int]:
        """Count bytes of host memory by the address of what holds them, which several may share."""


class Tiers:
    """Device, host memory and disk of some sessions.

    Args:
        device_budget, host_budget, disk_budget: most bytes; None: no ceiling, except that what was read from files
            takes no more than ``CACHE_BYTES`` of host memory.
        root: the folder that ``disk_budget`` is for.
        pin: whether host memory is page-locked, from which a GPU loads faster.
    """

    def __init__(
        self,
        device_budget: int | None = None,
        host_budget: int | None = None,
        disk_budget: int | None = None,
        *,
        root: Path | None = None,
        pin: bool = False,
    ) -> None:
        self.device_budget = device_budget
        self.host_budget = host_budget
        self.disk_budget = disk_budget
        self.root = root
        self.pin = pin
        self._disk_bytes: int | None = None  # as measured last, and what was written since
        self._measured = 0.0
        self._caches: dict[int, HostCache] = {}
        self._on_device: weakref.WeakSet[OnDevice] = weakref.WeakSet()
        self._unwritten: weakref.WeakSet[Unwritten] = weakref.WeakSet()
        self._lock = threading.Lock()

    # -- the device --------------------------------------------------------------------------------------------------

    def admit(self, memory: OnDevice, more: int) -> None:
        """Count, from now on, what a memory takes of the device.

        Raises:
            BudgetExceeded: ``more`` bytes do not fit.
        """
        self.reserve_device(more)
        with self._lock:
            self._on_device.add(memory)

    def dismiss(self, memory: OnDevice, store: Unwritten) -> None:
        """Stop counting a memory that is used no more, even if it is not collected yet."""
        with self._lock:
            self._on_device.discard(memory)
            self._unwritten.discard(store)

    def reserve_device(self, more: int) -> None:
        """Make sure that ``more`` bytes fit on the device.

        Raises:
            BudgetExceeded: they do not fit.
        """
        if self.device_budget is not None and (taken := self.device_bytes()) + more > self.device_budget:
            raise BudgetExceeded(
                f"{more:,} bytes more on the device do not fit: open sessions take {taken:,} there, and device_budget "
                f"is {self.device_budget:,}; release some, or raise it"
            )

    def device_bytes(self) -> int:
        """Count the bytes of the device that all memories take."""
        with self._lock:
            memories = list(self._on_device)
        return sum(memory.bytes() for memory in memories)

    # -- host memory -------------------------------------------------------------------------------------------------

    def cache(self, shape: BlockShape) -> HostCache:
        """Find or make the cache for planes of that size. Sizes share the budget evenly: when a new one comes, what is
        cached of the others is given up."""
        size = max(shape.plane_bytes(0), shape.plane_bytes(1))
        with self._lock:
            if size not in self._caches:
                budget = self.host_budget
                share = (CACHE_BYTES if budget is None else budget - budget // 4) // (len(self._caches) + 1)
                for cache in self._caches.values():
                    cache.resize(share // cache.slot_bytes)
                self._caches[size] = HostCache(share // size, size, pin=self.pin)
            return self._caches[size]

    def hold(self, store: Unwritten) -> None:
        """Count, from now on, what a store holds in host memory."""
        with self._lock:
            self._unwritten.add(store)

    def reserve_host(self, more: int) -> None:
        """Make sure that ``more`` bytes may wait in host memory to be written.

        Raises:
            BudgetExceeded: they may not wait.
        """
        if self.host_budget is not None and (taken := self.unwritten_bytes()) + more > self.host_budget // 4:
            raise BudgetExceeded(
                f"{more:,} bytes of blocks more do not fit in host memory beside {taken:,} that are not written yet: "
                f"they may take a quarter of host_budget {self.host_budget:,}; commit, or raise it"
            )

    def unwritten_bytes(self) -> int:
        """Count the bytes of sealed blocks that are in no file."""
        with self._lock:
            stores = list(self._unwritten)
        held: dict[int, int] = {}
        for store in stores:
            held |= store.unwritten()
        return sum(held.values())

    def host_bytes(self) -> int:
        """Count the bytes of host memory in use."""
        with self._lock:
            caches = list(self._caches.values())
        return self.unwritten_bytes() + sum(cache.bytes() for cache in caches)

    # -- the disk ----------------------------------------------------------------------------------------------------

    def reserve_disk(self, more: int) -> None:
        """Make sure that ``more`` bytes, which are about to be written, fit in the folder.

        Raises:
            BudgetExceeded: the folder would have more than ``disk_budget``.
        """
        if self.disk_budget is None or self.root is None:
            return
        with self._lock:
            now = time.monotonic()
            fits = self._disk_bytes is not None and self._disk_bytes + more <= self.disk_budget
            if not fits or now - self._measured > MEASURE_S:
                self._disk_bytes, self._measured = folder_bytes(self.root), now
            assert self._disk_bytes is not None
            if self._disk_bytes + more > self.disk_budget:
                raise BudgetExceeded(
                    f"{more:,} bytes more do not fit in {self.root}: {self._disk_bytes:,} are there, and disk_budget "
                    f"is {self.disk_budget:,}; delete or prune sessions, or raise it"
                )
            self._disk_bytes += more
