"""How often the blocks that a decoded token chooses lie in the device cache already.

    python benchmarks/misses.py --tokens 14000 docs/*.md

Reads a text, then decodes greedily. Printed: of the tokens that choose among kept candidates, how many find all blocks
of all layers in a cache of ``max_cached_block`` slots, and how many blocks they lack; and what would have to be loaded
if all candidates lay in the cache instead, whenever they are new, by its number of slots.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from infllm_agent import MemoryConfig
from infllm_agent.blocks.device_cache import BlockCache
from infllm_agent.memory.candidates import Candidates
from infllm_agent.model.local_model import LocalModel

CONFIG = MemoryConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=14_000, help="of the text (default 14,000)")
    parser.add_argument("--decoded", type=int, default=56, help="tokens (default 56)")
    parser.add_argument("--model", default="smollm2")
    given = parser.parse_args()

    model = LocalModel.load(given.model)
    memory = model.new_memory(CONFIG)
    ids = model.tokenizer("\n".join(path.read_text() for path in given.text))["input_ids"][: given.tokens]
    at = 0
    for size in CONFIG.chunks(len(ids), before_answer=True):
        logits = model.forward(ids[at : at + size], memory)
        at += size

    candidates: list[list[int]] = []  # of one layer after the other, whenever they are new
    missing: list[int] = []
    begin, fetch = Candidates.__init__, BlockCache.fetch

    def noted_begin(self: Candidates, token: int, of: int, blocks: Any, read: Any) -> None:
        begin(self, token, of, blocks, read)
        candidates.append(blocks.tolist())

    def noted_fetch(self: BlockCache, blocks: Any, load: Any) -> list[int]:
        missing.append(sum(block not in self for block in blocks))
        return fetch(self, blocks, load)

    Candidates.__init__, BlockCache.fetch = noted_begin, noted_fetch  # type: ignore[method-assign]
    layers, kept = len(memory.layers), []
    for _ in range(given.decoded):
        before = len(candidates)
        missing.clear()
        logits = model.forward([int(logits.argmax())], memory)
        if len(candidates) == before:
            kept.append(sum(missing))
    rounds = [candidates[i : i + layers] for i in range(0, len(candidates), layers)]
    print(json.dumps({
        "tokens": len(ids), "blocks": memory.store.count, "slots": CONFIG.max_cached_block,
        "choosing_among_kept": len(kept), "lacking_none": kept.count(0),
        "lacking_a_layer": round(sum(kept) / max(1, len(kept)) / layers, 2),
        "new_candidates_a_layer": {slots: loads(rounds, slots) for slots in (CONFIG.candidates, 512, 768)},
    }))  # fmt: skip


def loads(rounds: list[list[list[int]]], slots: int) -> list[float]:
    """Blocks that a layer loads, each time, to have all its candidates in the cache; the least recently used go."""
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in rounds[0]]
    found = []
    for layers in rounds:
        lacking = 0
        for cache, blocks in zip(caches, layers, strict=True):
            lacking += sum(block not in cache for block in blocks)
            for block in blocks:
                cache[block] = None
                cache.move_to_end(block)
            while len(cache) > slots:
                cache.popitem(last=False)
        found.append(round(lacking / len(layers), 1))
    return found


if __name__ == "__main__":
    main()
