"""The part of a memory that is not sealed blocks: sinks, windows, and which blocks lay where.

Together with the blocks it restores a memory to the bit: windows go back to the place in their buffers that they
had, and looked-up blocks to theirs, so that every sum is added up in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_agent.memory import ContextMemory
from infllm_agent.window import Window


def take(memory: ContextMemory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the JSON-ready state of a memory between two chunks."""
    tensors: dict[str, Tensor] = {}
    selected: dict[str, list[int]] = {}
    starts: dict[str, int] = {}
    for number, layer in memory.layers.items():
        _take_window(f"layer.{number}", layer.window, tensors, starts)
        tensors[f"layer.{number}.sinks"] = torch.stack(
            [layer.far_k[:, : layer.n_sinks], layer.far_v[:, : layer.n_sinks]]
        ).cpu()
        selected[str(number)] = list(layer.selected)
    for number, sliding in memory.sliding.items():
        _take_window(f"layer.{number}", sliding.window, tensors, starts)
    state = {
        "length": memory.length,
        "n_sinks": memory.n_sinks,
        "blocks": memory.store.count,
        "selected": selected,
        "starts": starts,
    }
    return tensors, state


def restore(memory: ContextMemory, tensors: dict[str, Tensor], state: dict[str, Any], folder: Path) -> None:
    """Bring an empty memory to a saved state; its blocks are mapped from ``folder``.

    Raises:
        CorruptSession: block files are missing or damaged.
    """
    memory.store.map(folder, state["blocks"])
    memory.length = state["length"]
    memory.n_sinks = state["n_sinks"]
    rows = memory.store.representatives(0, memory.store.count)
    for number, layer in memory.layers.items():
        _restore_window(f"layer.{number}", layer.window, tensors, state["starts"])
        sinks = tensors[f"layer.{number}.sinks"]
        layer.blocks.append(rows[:, layer.index])
        layer.restore_far(sinks[0], sinks[1], state["selected"][str(number)])
    for number, sliding in memory.sliding.items():
        _restore_window(f"layer.{number}", sliding.window, tensors, state["starts"])


def _take_window(name: str, window: Window, tensors: dict[str, Tensor], starts: dict[str, int]) -> None:
    for part, held in zip("kvq", window.held(), strict=True):
        if held is not None:
            tensors[f"{name}.{part}"] = held.cpu().contiguous()
    starts[name] = window.start


def _restore_window(name: str, window: Window, tensors: dict[str, Tensor], starts: dict[str, int]) -> None:
    queries = tensors.get(f"{name}.q")
    window.restore(starts[name], tensors[f"{name}.k"], tensors[f"{name}.v"], queries)
