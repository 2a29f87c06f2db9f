"""The state of a memory as tensors and JSON, the form in which it is kept beside the sealed blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from infllm_agent.blockfile import BlockShape
from infllm_agent.config import MemoryConfig
from infllm_agent.memory import ContextMemory
from infllm_agent.state import Division, LayerState, MemoryState, WindowState


def pack(state: MemoryState, config: MemoryConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the JSON-ready rest of a memory's state."""
    tensors: dict[str, Tensor] = {}
    for number, layer in state.layers.items():
        tensors[f"layer.{number}.sinks"] = layer.sinks.cpu().contiguous()
        _pack_window(f"layer.{number}", layer.window, tensors)
    for number, window in state.sliding.items():
        _pack_window(f"layer.{number}", window, tensors)
    return tensors, {"length": state.length, "blocks": Division.of(state.length, config).blocks}


def unpack(tensors: dict[str, Tensor], record: dict[str, Any]) -> MemoryState:
    """The state that ``pack`` was given."""
    layers: dict[int, LayerState] = {}
    sliding: dict[int, WindowState] = {}
    for number in sorted({int(name.split(".")[1]) for name in tensors}):
        name = f"layer.{number}"
        window = WindowState(tensors[f"{name}.k"], tensors[f"{name}.v"], tensors.get(f"{name}.q"))
        if (sinks := tensors.get(f"{name}.sinks")) is not None:
            layers[number] = LayerState(sinks, window)
        else:
            sliding[number] = window
    return MemoryState(record["length"], layers, sliding)


def block_shape(state: MemoryState, config: MemoryConfig) -> BlockShape:
    """The shape of the blocks beside a state."""
    keys = next(iter(state.layers.values())).window.k
    dtype = str(keys.dtype).removeprefix("torch.")
    return BlockShape(len(state.layers), keys.shape[0], config.block_size, keys.shape[2], dtype)


def restore(memory: ContextMemory, state: MemoryState, folder: Path) -> None:
    """Bring an empty memory to a saved state, to the bit; its blocks are mapped from ``folder``.

    Raises:
        CorruptSession: block files are missing or damaged.
    """
    count = Division.of(state.length, memory.config).blocks
    memory.store.map(folder, count)
    rows = memory.store.representatives(0, count)
    for layer in memory.layers.values():
        layer.blocks.append(rows[:, layer.index])
    memory.restore(state)


def _pack_window(name: str, window: WindowState, tensors: dict[str, Tensor]) -> None:
    for part, held in zip("kvq", window, strict=True):
        if held is not None:
            tensors[f"{name}.{part}"] = held.cpu().contiguous()
