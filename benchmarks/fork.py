"""Time and bytes of a fork, beside the length of the session: python benchmarks/fork.py [TOKENS ...]

The sessions have the packaged model's shape and random content: blocks, tokens, and messages of about 500 tokens.
Needs 24 KB of disk for each token.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from infllm_agent import AgentRuntime
from infllm_agent.memory import snapshot
from infllm_agent.memory.state import Division, LayerState, MemoryState, WindowState
from infllm_agent.messages import Message
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.fork import fork_stored
from infllm_agent.storage.tail import write_tail

PER_MESSAGE = 500


def fill(runtime: AgentRuntime, name: str, tokens: int) -> None:
    """A session of random content."""
    session = runtime.session(name)
    config, memory, store = session.config, session.memory, session.store
    division = Division.of(tokens, config)
    shape, blocks = memory.store.shape, memory.store
    k = torch.randn(64, shape.kv_heads, shape.block_size, shape.head_dim)
    while blocks.count < division.blocks:
        first = blocks.add(count := min(64, division.blocks - blocks.count))
        for layer in range(shape.layers):
            blocks.put(first, layer, k[:count], -k[:count], k[:count].mean(2))
        blocks.write()

    def window(n: int) -> torch.Tensor:
        return torch.randn(memory.store.shape.kv_heads, n, memory.store.shape.head_dim).to(memory.dtype)

    n = tokens - division.first_window_token(config)
    layers = {
        number: LayerState(torch.stack([window(division.sinks)] * 2), WindowState(window(n), window(n), None))
        for number in memory.layers
    }
    tensors, state = snapshot.pack(MemoryState(tokens, layers, {}), config, blocks.files.marks)
    tail, crc = write_tail(store.folder, tensors)
    choice = random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    store.commit(
        messages=[
            Message(i, "user", None, None, " ".join(choices(choice, words)), 1.6e9, start, start + PER_MESSAGE)
            for i, start in enumerate(range(0, tokens, PER_MESSAGE))
        ],
        token_ids=[choice.randrange(1000) for _ in range(tokens)],
        chunks=[(start, PER_MESSAGE) for start in range(0, tokens, PER_MESSAGE)],
        state={"memory": state, "tail": tail, "tail_crc": crc},
        bytes_on_disk=0,
        blocks=division.blocks,
    )
    session.close()


def choices(choice: random.Random, words: list[str]) -> list[str]:
    return choice.choices(words, k=PER_MESSAGE * 3 // 4)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def own_bytes(root: Path, name: str) -> dict[str, int]:
    """Bytes of the files that the session shares with no other, by kind."""
    id = Catalog(root).require(name)
    sizes: dict[str, int] = {}
    for path in (root / "sessions" / id).iterdir():
        if path.stat().st_nlink == 1:
            kind = path.name.split("-")[0].split(".")[0]
            sizes[kind] = sizes.get(kind, 0) + path.stat().st_size
    return sizes


def measure(model: LocalModel, root: Path, tokens: int) -> None:
    messages = tokens // PER_MESSAGE
    with AgentRuntime(root, model) as runtime:
        fill(runtime, "source", tokens)
        resume = timed(lambda: runtime.session("source"))
        whole = timed(lambda: runtime.fork("source", "whole"))
        late = timed(lambda: runtime.fork("source", "late", messages - 1))
        middle = timed(lambda: runtime.fork("source", "middle", messages // 2))
        disk = runtime.session("source").usage["bytes"]["disk"]
    stored = timed(lambda: fork_stored(root, "source", "stored"))
    print(
        f"{tokens:,} tokens, {disk:,} bytes: resume {resume:.2f} s; fork of all {whole:.2f} s, "
        f"but one message {late:.2f} s, half {middle:.2f} s, without a model {stored:.2f} s"
    )
    for name in ("whole", "middle"):
        print(f"  own bytes of the fork, {name}: {own_bytes(root, name)}")


def main() -> None:
    model = LocalModel.load("smollm2", dtype="bfloat16", device="cpu")
    for tokens in map(int, sys.argv[1:] or ["50000", "200000"]):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            measure(model, Path(folder), tokens)


if __name__ == "__main__":
    main()
