"""Compiles every Triton kernel, in the configurations with the largest tiles, for a GPU that need not be there; prints
as JSON the shared memory that each takes."""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infllm_agent.kernels.block_keys import triton as triton_keys
from infllm_agent.kernels.decode_attention import triton as triton_decode
from infllm_agent.kernels.triton_common import SHARED_BYTES
from infllm_agent.kernels.votes import triton as triton_votes

#: Compute capability 8.6: a consumer GPU.
TARGET = GPUTarget("cuda", 86, 32)
#: What each argument is that is no compile-time constant: keys of an 8B model in bfloat16.
TYPES = {
    **dict.fromkeys(["q", "sink_k", "sink_v", "cache_k", "cache_v", "near_k", "near_v", "out", "k"], "*bf16"),
    **dict.fromkeys(["cos", "sin", "shares", "share_lse", "lse", "sums", "total", "scores"], "*fp32"),
    **{"slots": "*i64", "bounds": "*i32", "which": "*i64", "keys": "*bf16", "scale": "fp32", "softcap": "fp32"},
}
HEAD = {"DIM": 128, "DIM_PADDED": 128}
VOTES = {**HEAD, "QUERIES": 128, "ROWS": triton_votes.ROWS, "CHOSEN": True, "PRECISION": "tf32"}
DECODE = {
    **HEAD,
    **{"GROUP": 4, "GROUP_PADDED": 16, "HALF_PADDED": 64, "BLOCK_SIZE": 16, "ROTARY": 64, "INTERLEAVED": False},
    **{"POSITIONS": triton_decode.CONTIGUOUS, "FAR_DISTANCE": 0, "SOFTCAP": True, "SPLITS": 32},
    **{"PRECISION": "tf32", "WIDEN": False},
}

#: Other forms of the decode kernel, which need not be large to be compiled.
HALF = dict.fromkeys(["q", "sink_k", "sink_v", "cache_k", "cache_v", "near_k", "near_v"], "*fp16")
FLOAT = dict.fromkeys(HALF, "*fp32")
OTHERS: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("no rotation", {"BLOCK_N": 32, "POSITIONS": triton_decode.NONE, "ROTARY": 0, "SOFTCAP": False}, HALF),
    (
        "one angle, interleaved, float32, head of 64",
        {
            **{"BLOCK_N": 32, "POSITIONS": triton_decode.ONE_ANGLE, "FAR_DISTANCE": 512, "ROTARY": 16},
            **{"INTERLEAVED": True, "DIM": 64, "DIM_PADDED": 64, "HALF_PADDED": 32, "PRECISION": "ieee"},
        },
        FLOAT,
    ),
]


def compiled(kernel: Any, constants: dict[str, Any], *, warps: int, stages: int, **types: str) -> int:
    """Bytes of shared memory. As at run time, arrays begin at multiples of 16 bytes and strides are multiples of 16:
    loads are then wide, and go to shared memory beside the computing."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (TYPES | types).get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    even = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=even)
    made = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})
    return int(made.metadata.shared)


def main() -> None:
    taken: dict[str, int] = {}
    bound: dict[str, int] = {}
    tuned = [
        (triton_decode._attend_shares, DECODE, {}),
        (triton_votes._sizes, {**VOTES, "PART": triton_votes.PART}, {"q": "*fp32"}),
        (triton_votes._divide, {**VOTES, "KV_HEADS": 8}, {"q": "*fp32"}),
    ]
    for kernel, constants, types in tuned:
        largest = sorted(kernel.configs, key=lambda each: -each.kwargs["BLOCK_N"] * each.num_stages)
        for config in largest[:2]:
            name = f"{kernel.fn.__name__} {config.kwargs} {config.num_warps} warps {config.num_stages} stages"
            taken[name] = compiled(
                kernel.fn, {**constants, **config.kwargs}, warps=config.num_warps, stages=config.num_stages, **types
            )
            if kernel is triton_decode._attend_shares:
                bound[name] = triton_decode.shared_bytes(config.kwargs["BLOCK_N"], 128, 2, config.num_stages)
    for name, constants, types in OTHERS:
        taken[name] = compiled(triton_decode._attend_shares.fn, {**DECODE, **constants}, warps=4, stages=2, **types)
    merge = {**HEAD, "SPLITS": 64, "SPLITS_PADDED": 64}
    taken["_merge_shares"] = compiled(triton_decode._merge_shares, merge, warps=4, stages=3)
    for size in (16, 128):
        block, warps = {**HEAD, "SIZE": size, "SIZE_PADDED": size}, triton_keys._warps(size, 128)
        taken[f"_mean of {size}"] = compiled(triton_keys._mean, block, warps=warps, stages=3, out="*fp32")
        taken[f"_representatives of {size}"] = compiled(
            triton_keys._representatives, {**block, "TOPK": 4}, warps=warps, stages=3, out="*fp32"
        )
    print(json.dumps({"limit": SHARED_BYTES, "taken": taken, "bound": bound}))


if __name__ == "__main__":
    main()
