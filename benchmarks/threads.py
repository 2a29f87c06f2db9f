"""What decoding costs from other threads than the first that computed.

    OMP_NUM_THREADS=2 python benchmarks/threads.py docs/*.md

The same memory decodes on the main thread, on a second thread, on the main thread again beside a living second one,
and on four threads in turn. Printed: tokens per second.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infllm_agent import MemoryConfig
from infllm_agent.model.local_model import LocalModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=3000, help="of history")
    parser.add_argument("--steps", type=int, default=40, help="tokens decoded in each place")
    options = parser.parse_args()

    model, config = LocalModel.load(options.model), MemoryConfig()
    ids = model.tokenizer("\n".join(file.read_text() for file in options.files))["input_ids"][: options.tokens]
    memory = model.new_memory(config)
    for start in range(0, len(ids), config.chunk_size):
        model.forward(ids[start : start + config.chunk_size], memory)

    def decode(steps: int) -> float:
        began = time.perf_counter()
        for token in ids[:steps]:
            model.forward([token], memory)
        return steps / (time.perf_counter() - began)

    decode(5)
    measured = {"main": decode(options.steps)}
    with ThreadPoolExecutor(1) as second:
        second.submit(decode, 5).result()
        measured["second"] = second.submit(decode, options.steps).result()
        measured["main, beside it"] = decode(options.steps)
    with ThreadPoolExecutor(4) as four:
        list(four.map(decode, [2] * 4))
        began = time.perf_counter()
        for _ in range(options.steps):
            four.submit(decode, 1).result()
        measured["four in turn"] = options.steps / (time.perf_counter() - began)
    print(json.dumps({where: round(speed, 2) for where, speed in measured.items()}))


if __name__ == "__main__":
    main()
