"""Computing a memory again: the tokens of a log go through the model in the chunks they went through before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import Cancelled
from infllm_agent.memory.context import ContextMemory
from infllm_agent.model.local_model import LocalModel


def replay(
    model: LocalModel,
    config: MemoryConfig,
    token_ids: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    cancelled: Callable[[], bool],
    memory: ContextMemory | None = None,
) -> ContextMemory:
    """Compute the memory of a log again.

    Args:
        chunks: the log's execution chunks, as (start, length).
        cancelled: asked before each chunk.
        memory: goes on from here; None begins with an empty one.

    Raises:
        Cancelled: ``cancelled`` said so.
    """
    memory = memory or model.new_memory(config)
    for start, length in chunks:
        if cancelled():
            raise Cancelled(f"stopped with {sum(chunks[-1]) - start} tokens still to read again")
        model.forward(token_ids[start : start + length], memory)
    return memory
