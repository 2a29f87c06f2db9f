"""The systems whose speed is compared: this project's memory, plain transformers, and llama.cpp."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import DynamicCache

from infllm_agent.bench.machine import available_bytes
from infllm_agent.bench.retrieval.readers import FullContext, MemoryContext
from infllm_agent.bench.speed.cost import Cost
from infllm_agent.bench.speed.fill import fill
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.config import MemoryConfig, SamplingConfig
from infllm_agent.errors import InfLLMError
from infllm_agent.generation.sampler import Sampler
from infllm_agent.memory.context import ContextMemory
from infllm_agent.model.local_model import LocalModel
from infllm_agent.model.turns import Urgency

#: Queries for each of which transformers' mask has a few bytes for every key.
MASK_BYTES = 4 * 1024


class Skipped(InfLLMError):
    """A system cannot do what is to be measured.

    Args:
        for_good: nor will it with a shorter history.
    """

    def __init__(self, reason: str, for_good: bool = False) -> None:
        super().__init__(reason, for_good)
        self.reason, self.for_good = reason, for_good

    def __str__(self) -> str:
        return self.reason


class SystemSettings(Protocol):
    """What a system has to know of what is measured (``SpeedPlan``)."""

    @property
    def model(self) -> str: ...
    @property
    def memory(self) -> dict[str, Any]: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def disk(self) -> Path | None: ...
    @property
    def gguf(self) -> Path | None: ...


class System(Protocol):
    """A text that grows token by token.

    Attributes:
        length: tokens so far.
        has_phases: whether ``Phases`` can tell where its time goes.
    """

    length: int
    has_phases: bool

    def encode(self, text: str) -> list[int]: ...

    def begin(self, history: int, ids: Sequence[int]) -> None:
        """Forget all. With a ``history``, be as if so many tokens had been read: some of ``ids``, and random keys and
        values.

        Raises:
            Skipped: it cannot.
        """

    def feed(self, ids: Sequence[int]) -> int:
        """Take tokens in, at least one; the likeliest next one."""

    def wait(self) -> None:
        """Until the device has done what it was given."""

    def device_mb(self) -> float | None:
        """What it takes of the computing device for this text, without weights; None if it does not tell."""

    def cost(self) -> Cost | None:
        """What it has to do at the least; None if that is not known."""


@runtime_checkable
class Batched(Protocol):
    """A system that decodes for several sessions at once."""

    def decode_together(self, batch: int, token: int, steps: int) -> float:
        """Seconds for ``steps`` tokens of each of so many sessions with this one's history."""


class _Local:
    """A transformers model under some attention."""

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.length = 0
        self._sampler = Sampler(SamplingConfig())
        self._context: MemoryContext | FullContext

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def feed(self, ids: Sequence[int]) -> int:
        self.length += len(ids)
        return self._sampler.pick(self._context.feed(ids), [])

    def wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


class Infllm(_Local):
    """This project's memory.

    Args:
        folder: for the blocks of a history that is made up; None: they lie in host memory.
    """

    has_phases = True

    def __init__(self, model: LocalModel, config: MemoryConfig, folder: Path | None) -> None:
        super().__init__(model)
        self.config, self.folder = config, folder
        self._context: MemoryContext = MemoryContext.empty(model, config)

    def begin(self, history: int, ids: Sequence[int]) -> None:
        self._context = MemoryContext.empty(self.model, self.config)
        self.length = history
        if not history:
            return
        memory = self._context.memory
        shape = memory.store.shape
        self._check_room(history // self.config.block_size * shape.stride)
        files = BlockFiles(self.folder, shape) if self.folder is not None else None
        fill(self.model, memory, ids, history, files)

    def _check_room(self, needed: int) -> None:
        if self.folder is None:
            free, where, instead = available_bytes(torch.device("cpu")), "of host memory", "; or use --disk"
        else:
            free, where, instead = shutil.disk_usage(self.folder).free, f"in {self.folder.parent}", ""
        if needed > 0.9 * free:
            raise Skipped(f"its blocks take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB {where} are free{instead}")

    def decode_together(self, batch: int, token: int, steps: int) -> float:
        memories = [self._context.memory.fork() for _ in range(batch)]

        def decode(memory: ContextMemory, steps: int) -> None:
            following = token
            for _ in range(steps):
                logits = self.model.forward([following], memory, urgency=Urgency.NEXT_TOKEN, batch=batch)
                following = self._sampler.pick(logits, [])

        with ThreadPoolExecutor(batch) as pool:
            list(pool.map(decode, memories, repeat(1)))  # brings each session's blocks to the device
            began = time.perf_counter()
            list(pool.map(decode, memories, repeat(steps)))
            self.wait()
            seconds = time.perf_counter() - began
        for memory in memories:
            memory.dismiss()
        return seconds

    def device_mb(self) -> float:
        return round(self._context.memory.bytes() / 1e6, 1)

    def cost(self) -> Cost:
        return Cost.of(self.model, self.config)


class FilledContext(FullContext):
    """transformers' own attention, all at once, at its fastest. Its cache may be filled from outside."""

    def __init__(self, model: LocalModel) -> None:
        super().__init__(model, piece=2**30)

    @property
    def cache(self) -> DynamicCache:
        return self._cache


class Plain(_Local):
    """transformers' own attention (SDPA) and cache."""

    has_phases = False

    def __init__(self, model: LocalModel, longest: int) -> None:
        super().__init__(model)
        needed = round(1.1 * longest * model.kv_bytes_per_token) + MASK_BYTES * longest
        free = available_bytes(model.device)
        if needed > free:
            raise Skipped(f"full attention needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        self._context: FullContext = FilledContext(model)

    def begin(self, history: int, ids: Sequence[int]) -> None:
        self._context = filled = FilledContext(self.model)
        self.length = history
        if history:
            for number, spec in sorted(self.model.specs.items()):
                shape = (1, spec.kv_heads, history, spec.head_dim)
                k, v = (torch.randn(shape, dtype=self.model.dtype, device=self.model.device) for _ in range(2))
                filled.cache.update(k, v, number)

    def device_mb(self) -> float:
        return round(self.length * self.model.kv_bytes_per_token / 1e6, 1)

    def cost(self) -> Cost:
        return Cost.of(self.model, None)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with as many threads as torch uses."""

    has_phases = False

    def __init__(self, library: Any, gguf: Path, longest: int) -> None:
        self.length = 0
        self._llama = library.Llama(
            str(gguf),
            n_ctx=longest,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            n_gpu_layers=-1 if torch.cuda.is_available() else 0,
            verbose=False,
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False)
        return ids

    def begin(self, history: int, ids: Sequence[int]) -> None:
        if history:
            raise Skipped("its cache cannot be filled with random keys and values; raise --random-from")
        self._llama.reset()
        self.length = 0

    def feed(self, ids: Sequence[int]) -> int:
        self.length += len(ids)
        self._llama.eval(list(ids))
        return int(self._llama.sample(temp=0.0))

    def wait(self) -> None:
        """Taking a sample has waited."""

    def device_mb(self) -> None:
        return None

    def cost(self) -> None:
        return None


@contextmanager
def _infllm(plan: SystemSettings, longest: int) -> Iterator[System]:
    model = _loaded(plan)
    config = model.default_memory().changed(**plan.memory)
    if plan.disk is None:
        yield Infllm(model, config, None)
        return
    with tempfile.TemporaryDirectory(prefix="infllm-bench-", dir=plan.disk) as folder:
        yield Infllm(model, config, Path(folder))


@contextmanager
def _plain(plan: SystemSettings, longest: int) -> Iterator[System]:
    yield Plain(_loaded(plan), longest)


@contextmanager
def _llamacpp(plan: SystemSettings, longest: int) -> Iterator[System]:
    try:
        import llama_cpp
    except ImportError:
        raise Skipped("llama-cpp-python is not installed", for_good=True) from None
    if plan.gguf is None:
        raise Skipped("it needs the model as a file: --gguf FILE", for_good=True)
    yield LlamaCpp(llama_cpp, plan.gguf, longest)


def _loaded(plan: SystemSettings) -> LocalModel:
    return LocalModel.load(plan.model, device=plan.device, dtype=plan.dtype)


#: By name: what opens it for texts of at most so many tokens.
SYSTEMS: dict[str, Callable[[SystemSettings, int], AbstractContextManager[System]]] = {
    "infllm": _infllm,
    "plain": _plain,
    "llamacpp": _llamacpp,
}
