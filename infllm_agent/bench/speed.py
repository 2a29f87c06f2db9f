"""How fast is it? Prefill and decoding by length of history, beside plain transformers, and the machine's ceilings."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from infllm_agent.bench.machine import ceilings, peak_rss_mb
from infllm_agent.bench.oplog import generate
from infllm_agent.bench.readers import Context, FullContext, MemoryContext
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.model import LocalModel

#: Tokens of the question whose first answer token is waited for, and tokens decoded to time decoding.
QUESTION_TOKENS = 32
DECODED_TOKENS = 32


def _infllm(model: LocalModel, config: MemoryConfig) -> Context:
    return MemoryContext.empty(model, config)


def _plain(model: LocalModel, config: MemoryConfig) -> Context:
    return FullContext(model, piece=2**30)  # all at once, at its fastest


SYSTEMS: dict[str, Callable[[LocalModel, MemoryConfig], Context]] = {"infllm": _infllm, "plain": _plain}


def run(
    model: str,
    memory: dict[str, Any],
    histories: Sequence[int],
    systems: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The table of ``bench speed --json``. Each row is measured in a process of its own, so that its peak memory is
    its own; systems alternate within one history, so that a drift of the machine meets both.

    Args:
        memory: fields of ``MemoryConfig`` that differ from the model's default.

    Raises:
        ConfigError: an unknown system, or a history that is no length.
    """
    for system in systems:
        if system not in SYSTEMS:
            raise ConfigError(f'system "{system}" is not known; there are {", ".join(SYSTEMS)}')
    for history in histories:
        if history < 1:
            raise ConfigError(f"a history of {history} tokens cannot be measured")
    rows = []
    for history in sorted(histories):
        for system in systems:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(_measure, model, memory, device, dtype, system, history).result()
            report(
                f"{system} {history}: prefill {row['prefill_tok_s']} tok/s, decode {row['decode_tok_s']} tok/s, "
                f"first token {row['first_token_s']} s, device {row['device_memory_mb']} MB, "
                f"peak RSS {row['peak_rss_mb']} MB"
            )
            rows.append(row)
    return {"ceilings": ceilings(), "rows": rows}


def _measure(
    model_name: str, memory: dict[str, Any], device: str, dtype: str, system: str, history: int
) -> dict[str, Any]:
    model = LocalModel.load(model_name, device=device, dtype=dtype)
    config = model.default_memory().changed(**memory)
    ids = _text_ids(model, history + QUESTION_TOKENS)
    SYSTEMS[system](model, config).feed(ids[:256])  # first calls allocate and choose kernels
    context = SYSTEMS[system](model, config)
    began = time.perf_counter()
    context.feed(ids[:history])
    prefilled = time.perf_counter()
    logits = context.feed(ids[history:])
    first = time.perf_counter()
    for _ in range(DECODED_TOKENS):
        logits = context.feed([int(logits.argmax())])
    decoded = time.perf_counter()
    return {
        "system": system,
        "history": history,
        "prefill_tok_s": round(history / (prefilled - began), 1),
        "decode_tok_s": round(DECODED_TOKENS / (decoded - first), 1),
        "first_token_s": round(first - prefilled, 3),
        "peak_rss_mb": peak_rss_mb(),
        "device_memory_mb": round(_device_bytes(context, model) / 1e6, 1),
    }


def _text_ids(model: LocalModel, count: int) -> list[int]:
    """Realistic text: random tokens would look up blocks as no text does."""
    ids: list[int] = []
    seed = 0
    while len(ids) < count:
        log = generate(seed, min(count, 20_000), lambda event: len(event.text) // 3)
        ids += model.tokenizer("\n".join(event.text for event in log.events), add_special_tokens=False).input_ids
        seed += 1
    return ids[:count]


def _device_bytes(context: Context, model: LocalModel) -> int:
    """Bytes on the computing device: windows, looked-up and cached blocks, and the index; or the whole cache."""
    if isinstance(context, MemoryContext):
        return context.memory.device_bytes() + context.memory.index_bytes()
    return context.attended_keys * model.kv_bytes_per_token
