"""The first pass of a lookup among many blocks: what it finds and what it costs, beside comparing the keys of all.

    python benchmarks/lookup.py [--model smollm2] [--tokens 32768] [--keys FILE] [--rounds 5] [--json OUT]

Recall: an operations log is read and asked about. Keys and some of the queries of six layers are kept; with FILE, for
later runs too. With `flat_blocks` lowered, so that cells are in force, each of these lookups is made again: how many of
the `topk` blocks are those that comparing all keys chooses, and how much of all attention to blocks they get.

Speed: the same layers, their keys drawn again and again with some noise until there are 62,500 blocks, a million
tokens. The plain pass has its keys in float32. Milliseconds for one layer, the best of some rounds, on as many cores as
OMP_NUM_THREADS says.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_agent import MemoryConfig
from infllm_agent.bench.oplog import generate
from infllm_agent.chat.format import ChatFormat
from infllm_agent.kernels.votes import best
from infllm_agent.kernels.votes.plain import attention_mass, voters, votes
from infllm_agent.memory.index import BlockIndex
from infllm_agent.memory.layer import MemoryLayer
from infllm_agent.model.local_model import LocalModel

CONFIG = MemoryConfig()
MANY = 62_500
CHUNKS = 8  # whose queries are kept, of the later half of the log
QUESTIONS = 4
ANSWER = 4  # tokens
CPU = torch.device("cpu")


@contextmanager
def listening(kept: list[dict[str, Any]], layers: list[int], kind: str) -> Iterator[None]:
    """Keep the queries of lookups made meanwhile."""
    look_up = MemoryLayer.look_up

    def and_keep(self: MemoryLayer, q: Tensor, scale: float, token: int) -> list[int]:
        if self.index in layers:
            kept.append({"kind": kind, "layer": self.index, "q": voters(q, CONFIG.max_votes).clone(), "scale": scale})
        return look_up(self, q, scale, token)

    MemoryLayer.look_up = and_keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        MemoryLayer.look_up = look_up  # type: ignore[method-assign]


def read(model: LocalModel, tokens: int) -> dict[str, Any]:
    """Keys (kv_heads, blocks, block_size, head_dim) of some layers, and queries that asked for them."""
    chat = ChatFormat(model.tokenizer)
    memory = model.new_memory(CONFIG.changed(flat_blocks=None))
    stored = sorted({round(part * (len(memory.layers) - 1) / 5) for part in range(6)})
    log = generate(7, tokens, lambda event: len(chat.render(event.role, event.text, name=event.name)))
    ids = [token for event in log.events for token in chat.render(event.role, event.text, name=event.name)][:tokens]
    asked: list[dict[str, Any]] = []
    sizes = CONFIG.chunks(len(ids))
    for number, size in enumerate(sizes):
        late = number >= len(sizes) // 2 and number % max(1, len(sizes) // 2 // CHUNKS) == 0
        with listening(asked, stored if late else [], "chunk"):
            model.forward(ids[:size], memory)
        ids = ids[size:]
        print(f"\rread {memory.length:,} tokens", end="", flush=True)
    print()
    for fact in log.facts[:QUESTIONS]:
        fork = memory.fork()
        question = [*chat.render("user", fact.question), *chat.generation_prompt()]
        for size in CONFIG.chunks(len(question), before_answer=True):
            with listening(asked, stored, "question"):
                logits = model.forward(question[:size], fork)
            question = question[size:]
        for _ in range(ANSWER):
            with listening(asked, stored, "answer"):
                logits = model.forward([int(logits.argmax())], fork)
    blocks = list(range(memory.store.count))
    return {"keys": {layer: memory.store.keys(blocks, layer).contiguous() for layer in stored}, "asked": asked}


def means_of(keys: Tensor) -> Tensor:
    """The index's keys (blocks, kv_heads, head_dim) for all keys of the blocks."""
    return keys.float().mean(dim=2).to(keys.dtype).transpose(0, 1).contiguous()


def index_of(means: Tensor, flat: int | None) -> BlockIndex:
    index = BlockIndex(means.shape[1], means.shape[2], means.dtype, CPU, flat)
    index.append(means)
    return index


def recall(kept: dict[str, Any], flat: int) -> dict[str, Any]:
    """Over all kept lookups, and by their kind: blocks found, attention covered with cells and by comparing all."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for layer, keys in kept["keys"].items():
        means = means_of(keys)
        indexes = index_of(means, None), index_of(means, flat)
        for lookup in kept["asked"]:
            if lookup["layer"] != layer:
                continue
            q, scale = lookup["q"], lookup["scale"]
            to_blocks = attention_mass(q, keys, scale) / (q.shape[0] * q.shape[1])
            every, found = (
                near[best(attention_mass(q, keys[:, near], scale), CONFIG.topk)]
                for near in (index.most_voted(q, scale, CONFIG.candidates) for index in indexes)
            )
            part = len(set(every.tolist()) & set(found.tolist())) / CONFIG.topk
            row = part, float(to_blocks[found].sum()), float(to_blocks[every].sum())
            for name in ("all", lookup["kind"], f"layer {layer}"):
                rows.setdefault(name, []).append(row)
    blocks = means.shape[0]
    compared = max(CONFIG.candidates, math.isqrt(flat * blocks // 2))
    print(f"\n{blocks:,} blocks, flat_blocks {flat:,}: {compared:,} compared")
    print(f"{'':10}{'lookups':>8}{'recall':>8}{'worst':>8}{'attention':>11}{'of':>8}")
    result = {}
    for name, of in rows.items():
        found, mass, most = (sum(column) / len(of) for column in zip(*of, strict=True))
        worst = min(row[0] for row in of)
        print(f"{name:10}{len(of):8}{found:8.4f}{worst:8.2f}{mass:11.4f}{most:8.4f}")
        result[name] = {"lookups": len(of), "recall": found, "worst": worst, "attention": mass, "most": most}
    return {"blocks": blocks, "flat_blocks": flat, "compared": compared, "recall": result}


def milliseconds(work: Callable[[int], object], rounds: int, layers: int) -> float:
    """The best of some rounds; layers take turns, so that none finds its keys in the cache."""
    taken = []
    for i in range(rounds + 1):
        began = time.perf_counter()
        work(i % layers)
        taken.append(1000 * (time.perf_counter() - began))
    return min(taken[1:])


def speed(kept: dict[str, Any], rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    many = []
    for keys in kept["keys"].values():
        means = means_of(keys)
        drawn = means[torch.randint(0, len(means), (MANY,), generator=generator)].float()
        noise = 0.1 * means.float().std(dim=0) * torch.randn(drawn.shape, generator=generator)
        many.append((drawn + noise).to(means.dtype))
    number = len(many)
    flat = CONFIG.flat_blocks
    result: dict[str, Any] = {"blocks": MANY, "ms": {}}
    result["ms"]["resume, keys alone"] = milliseconds(lambda i: index_of(many[i], None), number, number)
    result["ms"]["resume"] = milliseconds(lambda i: index_of(many[i], flat), number, number)
    indexes = [index_of(means, flat) for means in many]
    result["ms"]["append 32 blocks"] = milliseconds(lambda i: indexes[i].append(many[i][:32]), rounds, number)
    plain_keys = [means.float() for means in many]
    print(f"\n{MANY:,} blocks, one layer; ms")
    for name, ms in result["ms"].items():
        print(f"{name:24}{ms:8.2f}")
    for kind, n in (("answer", 1), ("chunk", CONFIG.max_votes)):
        q, scale = next((one["q"], one["scale"]) for one in kept["asked"] if one["kind"] == kind)

        def plain(i: int, q: Tensor = q, scale: float = scale) -> Tensor:
            return best(votes(q, plain_keys[i], scale), CONFIG.candidates)

        def by_cells(i: int, q: Tensor = q, scale: float = scale) -> Tensor:
            return indexes[i].most_voted(q, scale, CONFIG.candidates)

        before, now = milliseconds(plain, rounds, number), milliseconds(by_cells, rounds, number)
        print(f"{f'{kind}, {n} voting':24}{now:8.2f}  plain {before:8.2f}  {before / now:5.1f} times as fast")
        result["ms"][kind] = {"plain": before, "cells": now}
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.keys is not None and options.keys.exists():
        kept = torch.load(options.keys)
    else:
        kept = read(LocalModel.load(options.model), options.tokens)
        if options.keys is not None:
            torch.save(kept, options.keys)
    blocks = next(iter(kept["keys"].values())).shape[1]
    results = {"recall": [recall(kept, blocks // part) for part in (8, 4)], "speed": speed(kept, options.rounds)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
