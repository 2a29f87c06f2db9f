"""Compiles every Triton kernel, in the configurations with the largest tiles, for a GPU that need not be there; prints
as JSON the shared memory that each takes."""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infllm_agent.kernels import triton_decode, triton_seal, triton_votes
from infllm_agent.kernels.triton_common import SHARED_BYTES

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


def compiled(kernel: Any, constants: dict[str, Any], *, warps: int, stages: int, **types: str) -> int:
    """Bytes of shared memory."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (TYPES | types).get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})
    return int(made.metadata.shared)


def main() -> None:
    taken: dict[str, int] = {}
    tuned = [
        (triton_decode._attend_shares, DECODE, {}),
        (triton_votes._sizes, {**VOTES, "PART": triton_votes.PART}, {"q": "*fp32"}),
        (triton_votes._divide, {**VOTES, "KV_HEADS": 8}, {"q": "*fp32"}),
    ]
    for kernel, constants, types in tuned:
        for config in sorted(kernel.configs, key=lambda each: -each.kwargs["BLOCK_N"] * each.num_stages)[:2]:
            name = f"{kernel.fn.__name__} {config.kwargs} {config.num_warps} warps {config.num_stages} stages"
            taken[name] = compiled(
                kernel.fn, {**constants, **config.kwargs}, warps=config.num_warps, stages=config.num_stages, **types
            )
    merge = {**HEAD, "SPLITS": 64, "SPLITS_PADDED": 64}
    taken["_merge_shares"] = compiled(triton_decode._merge_shares, merge, warps=4, stages=3)
    for size in (16, 128):
        block, warps = {**HEAD, "SIZE": size, "SIZE_PADDED": size}, triton_seal._warps(size, 128)
        taken[f"_mean of {size}"] = compiled(triton_seal._mean, block, warps=warps, stages=3, out="*fp32")
        taken[f"_representatives of {size}"] = compiled(
            triton_seal._representatives, {**block, "TOPK": 4}, warps=warps, stages=3, out="*fp32"
        )
    print(json.dumps({"limit": SHARED_BYTES, "taken": taken}))


if __name__ == "__main__":
    main()
