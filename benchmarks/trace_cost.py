"""What recording an answer's attention costs: python benchmarks/trace_cost.py [TOKENS] [--json FILE]

One session of random tokens, one process. Tokens are decoded one by one, and chunks of a question read, in turn with
each setting, so that whatever else the machine does meets all of them alike. Figures are medians of CPU seconds. The
cost of an answer is computed from them: that of "sampled" falls with the answer's length, because it traces the first
16 tokens and then every 16th.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median

import torch

from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.trace_recorder import TraceRecorder
from infllm_agent.model.local_model import LocalModel

ROUNDS = 40
MODES = ("off", "sampled", "on")


def alternating(model: LocalModel, memory: ContextMemory, chunk: list[int]) -> dict[str, float]:
    """Median CPU seconds of a chunk by setting."""
    size = memory.config.block_size
    recorders = {
        "off": None,
        "sampled": TraceRecorder(list(memory.layers), block_size=size, mode="sampled"),
        "on": TraceRecorder(list(memory.layers), block_size=size, mode="on"),
    }
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(len(MODES) * ROUNDS):
        mode = MODES[(turn + turn // len(MODES)) % len(MODES)]  # so that none always follows the same other
        memory.recorder = recorders[mode]
        began = time.process_time()
        model.forward(chunk, memory)
        seconds[mode].append(time.process_time() - began)
    memory.recorder = None
    return {mode: median(each) for mode, each in seconds.items()}


def measure(model: LocalModel, tokens: int) -> dict[str, float]:
    config = model.default_memory()
    memory = model.new_memory(config)
    choice = random.Random(7)
    ids = [choice.randrange(1000, 20_000) for _ in range(tokens)]
    for start in range(0, tokens, config.chunk_size):
        model.forward(ids[start : start + config.chunk_size], memory)
    chunk = alternating(model, memory, ids[: config.question_chunk])
    token = alternating(model, memory, ids[:1])

    recorder = TraceRecorder(list(memory.layers), block_size=config.block_size, mode="on")
    memory.recorder = recorder
    for each in ids[:16]:
        model.forward([each], memory)
    memory.recorder = None
    began = time.process_time()
    head, arrays = recorder.trace(0, None, memory.length - 16, n_sinks=memory.n_sinks).pack()
    kept = time.process_time() - began

    def cost(mode: str, answer: int, traced: int, chunks: int = 3) -> float:
        """Of an answer of so many tokens, as a share of its seconds; the question is a few chunks."""
        more = chunks * (chunk[mode] - chunk["off"]) + traced * (token[mode] - token["off"]) + kept
        return more / (chunks * chunk["off"] + answer * token["off"])

    return {
        "tokens": memory.length,
        **{f"chunk_{mode}_s": seconds for mode, seconds in chunk.items()},
        **{f"token_{mode}_s": seconds for mode, seconds in token.items()},
        "kept_s": kept,
        "bytes": len(head) + len(arrays),
        "sampled_16_tokens": cost("sampled", 16, 16),
        "sampled_100_tokens": cost("sampled", 100, 16 + 6),
        "on_100_tokens": cost("on", 100, 100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tokens", nargs="?", type=int, default=8192)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with torch.no_grad():
        figures = measure(LocalModel.load(options.model), options.tokens)
    for name, value in figures.items():
        print(f"{name:<20}{value:,.5f}".rstrip("0").rstrip("."))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
