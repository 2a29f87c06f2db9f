"""How much of a GPU's bandwidth the kernels of ``infllm_agent/kernels`` use, beside plain torch on the same GPU.

    python benchmarks/gpu_kernels.py [--json OUT]

The shape is one layer of an 8B Llama: 8 key heads of 128 channels, 32 query heads, bfloat16. ``share`` is the bytes
that have to be read, once, in the time it takes, as a part of what a copy reads and writes.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from infllm_agent.kernels import block_keys
from infllm_agent.kernels.backend import using
from infllm_agent.kernels.decode_attention import decode_attention
from infllm_agent.kernels.decode_attention.keys import Angles, DecodeKeys, bounds
from infllm_agent.kernels.rotary import Rotary
from infllm_agent.kernels.votes import best, votes

KV_HEADS, GROUP, DIM, BLOCK, SINKS = 8, 4, 128, 16, 128
SCALE = DIM**-0.5
HALF = torch.bfloat16


def microseconds(work: Callable[[], object], repeats: int = 50) -> float:
    """Median. Between two runs the cache of the GPU is written over."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)


def copy_gb_s() -> float:
    """Bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source)) / 1e3


def row(name: str, read: int, ceiling: float, work: Callable[[], object], **more: object) -> dict[str, object]:
    result: dict[str, object] = {"kernel": name, **more}
    for chosen in ("triton", "plain"):
        with using(chosen):
            took = microseconds(work)
        result |= {f"{chosen}_us": round(took, 1), f"{chosen}_share": round(read / took / 1e3 / ceiling, 3)}
    print(json.dumps(result), flush=True)
    return result


def decode(ceiling: float, blocks: int, window: int) -> dict[str, object]:
    def kv(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (torch.randn(*shape, DIM, device="cuda", dtype=HALF) for _ in range(2))
        return k, v

    rotary = Rotary(1e4 ** -(torch.arange(DIM // 2).double() / (DIM // 2)), False)
    angles = rotary.angles(torch.arange(SINKS + blocks * BLOCK + window, device="cuda"))
    slots = torch.randperm(2 * blocks, device="cuda")[:blocks]
    keys = DecodeKeys(
        *kv(KV_HEADS, SINKS),
        *kv(KV_HEADS, 2 * blocks, BLOCK),
        slots,
        *kv(KV_HEADS, window),
        bounds(SINKS, blocks, 0, window, torch.device("cuda")),
        Angles(*angles, False, None),
    )
    q = torch.randn(KV_HEADS * GROUP, DIM, device="cuda", dtype=HALF)
    attended = SINKS + blocks * BLOCK + window
    read = attended * 2 * KV_HEADS * DIM * HALF.itemsize
    return row("decode", read, ceiling, lambda: decode_attention(q, keys, scale=SCALE), keys=attended)


def look_up(ceiling: float, blocks: int, queries: int) -> dict[str, object]:
    q = torch.randn(KV_HEADS * GROUP, queries, DIM, device="cuda")
    keys = torch.randn(blocks, KV_HEADS, DIM, device="cuda", dtype=HALF)
    return row(
        "votes",
        keys.nbytes,
        ceiling,
        lambda: best(votes(q, keys, SCALE), 64),
        blocks=blocks,
        queries=queries,
    )


def seal(ceiling: float, blocks: int, size: int) -> list[dict[str, object]]:
    k = torch.randn(KV_HEADS, blocks, size, DIM, device="cuda", dtype=HALF)
    queries = torch.randn(KV_HEADS, blocks * size + 4096, DIM, device="cuda", dtype=HALF)
    more = {"blocks": blocks, "block_size": size}
    return [
        row("mean keys", k.nbytes, ceiling, lambda: block_keys.mean_keys(k), **more),
        row(
            "representatives",
            k.nbytes + queries.nbytes,
            ceiling,
            lambda: block_keys.representative_keys(k, queries, 4096, 4),
            **more,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and there is none")
    ceiling = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}: copies {ceiling:,.0f} GB/s", flush=True)
    rows = [
        decode(ceiling, 64, 520),
        decode(ceiling, 256, 4096),
        decode(ceiling, 1024, 16_384),
        look_up(ceiling, 4096, 1),
        look_up(ceiling, 62_500, 1),
        look_up(ceiling, 62_500, 32),
        *seal(ceiling, 32, 16),
        *seal(ceiling, 4, 128),
    ]
    if options.json:
        result = {"gpu": torch.cuda.get_device_name(), "copy_gb_s": round(ceiling, 1), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
