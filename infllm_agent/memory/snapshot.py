"""The state of a memory as tensors and JSON, the form in which it is kept beside the sealed blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_agent.blocks.layout import BlockShape
from infllm_agent.blocks.segments import BlockFiles, Marks
from infllm_agent.config import MemoryConfig
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.state import Division, LayerState, MemoryState, WindowState
from infllm_agent.platform.compute import compute_thread

#: Of tails and block files: a session of another is not opened.
FORMAT = 2


def pack(
    state: MemoryState, config: MemoryConfig, marks: Marks | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pack a memory's state, and the marks of its blocks' files: as tensors (on the CPU) and a JSON-ready rest."""
    tensors = compute_thread().run(lambda: _tensors(state, marks))
    return tensors, {"length": state.length, "blocks": Division.of(state.length, config).blocks}


def _tensors(state: MemoryState, marks: Marks | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if marks is not None:
        tensors |= {f"segments.{name}": part for name, part in marks._asdict().items()}
    for number, layer in state.layers.items():
        tensors[f"layer.{number}.sinks"] = layer.sinks.cpu().contiguous()
        _pack_window(f"layer.{number}", layer.window, tensors)
        if layer.candidates is not None:
            tensors[f"layer.{number}.candidates"] = layer.candidates.to("cpu", torch.int32)
    for number, window in state.sliding.items():
        _pack_window(f"layer.{number}", window, tensors)
    return tensors


def unpack(tensors: dict[str, Tensor], record: dict[str, Any]) -> MemoryState:
    """Unpack the state that ``pack`` was given."""
    layers: dict[int, LayerState] = {}
    sliding: dict[int, WindowState] = {}
    for number in sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layer.")}):
        name = f"layer.{number}"
        window = WindowState(tensors[f"{name}.k"], tensors[f"{name}.v"], tensors.get(f"{name}.q"))
        if (sinks := tensors.get(f"{name}.sinks")) is not None:
            layers[number] = LayerState(sinks, window, tensors.get(f"{name}.candidates"))
        else:
            sliding[number] = window
    return MemoryState(record["length"], layers, sliding)


def block_files(folder: Path, tensors: dict[str, Tensor], state: MemoryState, config: MemoryConfig) -> BlockFiles:
    """Open the files of the blocks beside a state.

    Raises:
        CorruptSession: the tail does not fit them.
    """
    keys = next(iter(state.layers.values())).window.k
    dtype = str(keys.dtype).removeprefix("torch.")
    shape = BlockShape(len(state.layers), keys.shape[0], config.block_size, keys.shape[2], dtype, config.block_dtype)
    marks = Marks(*(tensors[f"segments.{name}"] for name in Marks._fields))
    return BlockFiles(folder, shape, Division.of(state.length, config).blocks, marks)


def restore(memory: ContextMemory, state: MemoryState, files: BlockFiles) -> None:
    """Bring an empty memory to a saved state, to the bit, its blocks in the given files.

    Raises:
        CorruptSession: block files are missing or damaged.
        BudgetExceeded: there is no room on the device for the index.
    """
    memory.attach(files)
    memory.restore(state)


def _pack_window(name: str, window: WindowState, tensors: dict[str, Tensor]) -> None:
    for part, held in zip("kvq", window, strict=True):
        if held is not None:
            tensors[f"{name}.{part}"] = held.cpu().contiguous()
