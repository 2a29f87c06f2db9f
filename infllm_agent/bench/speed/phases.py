"""Where the time of a step goes. Methods are wrapped while this is measured; otherwise they know nothing of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any

from infllm_agent.blocks.store import BlockStore
from infllm_agent.generation.sampler import Sampler
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.layer import MemoryLayer
from infllm_agent.memory.sliding import SlidingLayer
from infllm_agent.model.local_model import LocalModel

#: What each method does. Inside one phase another may begin; the first one's clock stands still meanwhile.
PHASES: dict[str, list[tuple[type, str]]] = {
    "projection": [(LocalModel, "_step")],  # all of a forward that is nothing else
    "lookup": [(MemoryLayer, "look_up"), (MemoryLayer, "choose")],
    "load": [(MemoryLayer, "bring"), (MemoryLayer, "locate"), (BlockStore, "keys"), (BlockStore, "values")],
    "attention": [(MemoryLayer, "attend"), (SlidingLayer, "attend")],
    "sealing": [(ContextMemory, "reserve"), (ContextMemory, "advance")],
    "sampling": [(Sampler, "pick")],
}


class Phases:
    """The seconds that each phase takes, while the ``with`` lasts, in this process.

    Args:
        wait: until the device has done what it was given.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._wait = wait
        self._running: list[str] = []
        self._since = 0.0
        self._originals: list[tuple[type, str, Any]] = []

    def ms(self, tokens: int) -> dict[str, float]:
        """Milliseconds for each of so many tokens."""
        return {phase: round(1000 * seconds / tokens, 4) for phase, seconds in self.seconds.items()}

    def __enter__(self) -> Phases:
        for phase, methods in PHASES.items():
            for owner, name in methods:
                original = owner.__dict__[name]
                self._originals.append((owner, name, original))
                setattr(owner, name, self._timed(phase, original))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._originals:
            setattr(*self._originals.pop())

    def _timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*arguments: Any, **options: Any) -> Any:
            self._switch()
            self._running.append(phase)
            try:
                return method(*arguments, **options)
            finally:
                self._switch()
                self._running.pop()

        return timed

    def _switch(self) -> None:
        """The time since the last call was the innermost phase's."""
        self._wait()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
