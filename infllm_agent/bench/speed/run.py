"""How fast is it? Prefill and decoding by length of history, beside other systems and what the machine can do."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from infllm_agent.bench.machine import ceilings, peak_device_mb, peak_rss_mb, reset_peaks
from infllm_agent.bench.oplog import generate
from infllm_agent.bench.speed.cost import shares
from infllm_agent.bench.speed.phases import Phases
from infllm_agent.bench.speed.systems import SYSTEMS, Batched, Skipped, System
from infllm_agent.errors import ConfigError
from infllm_agent.model.local_model import LocalModel

#: Tokens of the question whose first answer token is waited for, and tokens decoded to time decoding.
QUESTION_TOKENS = 32
DECODED_TOKENS = 32
#: Of a history that was made up, so many tokens more are read to time prefill.
STRETCH_TOKENS = 1024
#: Tokens read, and decoded, to see how the time divides into phases.
PROFILED_TOKENS, PROFILED_STEPS = 512, 16
#: Tokens read before anything is measured: first calls allocate and choose kernels.
WARMUP_TOKENS = 256


@dataclass(frozen=True)
class SpeedPlan:
    """What to measure.

    Attributes:
        memory: fields of ``MemoryConfig`` that differ from the model's default.
        random_from: histories of at least so many tokens are not read but filled with random keys and values; None:
            all are read.
        disk: a folder in which the blocks of such histories lie while they are measured; None: in host memory.
        gguf: the model as llama.cpp reads it.
        batches: numbers of sessions that decode together, each with the whole history.
        apart: each row in a process of its own, so that its peak memory is its own.
    """

    model: str
    histories: tuple[int, ...]
    systems: tuple[str, ...]
    memory: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    random_from: int | None = 65_536
    disk: Path | None = None
    gguf: Path | None = None
    apart: bool = True
    batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for system in self.systems:
            if system not in SYSTEMS:
                raise ConfigError(f'system "{system}" is not known; there are {", ".join(SYSTEMS)}')
        for what, values in (("system", self.systems), ("history", self.histories), ("batch", self.batches)):
            if len(set(values)) < len(values):
                raise ConfigError(f"a {what} is named twice: {', '.join(map(str, values))}")
        for history in self.histories:
            if history < 1:
                raise ConfigError(f"a history of {history} tokens cannot be measured")
        for batch in self.batches:
            if batch < 1:
                raise ConfigError(f"a batch of {batch} sessions cannot be measured")
        if self.random_from is not None and self.random_from < 1:
            raise ConfigError(f"--random-from {self.random_from}: at least one token is needed")
        if self.gguf is not None and not self.gguf.is_file():
            raise ConfigError(f"--gguf {self.gguf}: there is no such file")
        if self.gguf is not None and "llamacpp" not in self.systems:
            raise ConfigError("--gguf is for llama.cpp: name it with --systems, as in infllm,plain,llamacpp")
        if self.disk is not None and not self.disk.is_dir():
            raise ConfigError(f"--disk {self.disk}: there is no such folder")

    def is_random(self, history: int) -> bool:
        return self.random_from is not None and history >= self.random_from


def run(plan: SpeedPlan, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The result of ``bench speed --json``. Systems alternate within one history, so that a drift of the machine meets
    all of them.

    Raises:
        ConfigError: nothing could be measured, or the model cannot be used like that.
    """
    result: dict[str, Any] = {"model": plan.model, **_apart(plan, _machine, plan)}
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for history in sorted(plan.histories):
        for system in plan.systems:
            if any(earlier["system"] == system and earlier["for_good"] for earlier in skipped):
                continue
            try:
                row = _apart(plan, measure, plan, system, history, result["ceilings"])
            except Skipped as reason:
                skipped.append(
                    {"system": system, "history": history, "reason": str(reason), "for_good": reason.for_good}
                )
                report(f"{system} {'' if reason.for_good else f'{history} '}skipped: {reason}")
                continue
            report(
                f"{system} {history}{' (random)' if row['random'] else ''}: prefill {row['prefill_tok_s']} tok/s, "
                f"decode {row['decode_tok_s']} tok/s, first token {row['first_token_s']} s, "
                f"device {row['device_memory_mb']} MB, peak RSS {row['peak_rss_mb']} MB"
            )
            rows.append(row)
    if not rows:
        raise ConfigError(f"nothing was measured: {skipped[0]['system']}: {skipped[0]['reason']}")
    return {**result, "rows": rows, "skipped": skipped}


def _apart(plan: SpeedPlan, work: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own, or in this one."""
    if not plan.apart:
        return work(*arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _machine(plan: SpeedPlan) -> dict[str, Any]:
    model = LocalModel.load(plan.model, device=plan.device, dtype=plan.dtype)
    model.check_memory(model.default_memory().changed(**plan.memory))
    return {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ceilings": ceilings(model.device, model.dtype),
    }


def measure(plan: SpeedPlan, system: str, history: int, ceiling: dict[str, float]) -> dict[str, Any]:
    """One row.

    Raises:
        Skipped: the system cannot do this here.
    """
    random = plan.is_random(history)
    stretch = STRETCH_TOKENS if random else history
    open_system = SYSTEMS[system]
    with open_system(plan, history + stretch + QUESTION_TOKENS + DECODED_TOKENS + PROFILED_TOKENS) as subject:
        ids = _text_ids(subject, stretch + QUESTION_TOKENS + PROFILED_TOKENS)
        subject.feed(ids[:WARMUP_TOKENS])
        subject.begin(history if random else 0, ids)
        before = subject.length
        reset_peaks()
        began = _now(subject)
        subject.feed(ids[:stretch])
        prefilled = _now(subject)
        token = subject.feed(ids[stretch : stretch + QUESTION_TOKENS])
        first = _now(subject)
        for _ in range(DECODED_TOKENS):
            token = subject.feed([token])
        decoded = _now(subject)
        prefill_s, decode_s = prefilled - began, (decoded - first) / DECODED_TOKENS
        row = {
            "system": system,
            "history": history,
            "random": random,
            "prefill_tokens": stretch,
            "prefill_tok_s": round(stretch / prefill_s, 1),
            "decode_tok_s": round(1 / decode_s, 2),
            "first_token_s": round(first - prefilled, 4),
            "peak_rss_mb": peak_rss_mb(),
            "device_memory_mb": subject.device_mb(),
            "peak_device_mb": peak_device_mb(),
            "prefill_share": None,
            "decode_share": None,
            "phases": None,
            "batch_tok_s": None,
        }
        cost = subject.cost()
        if cost is not None:
            of_prefill = cost.prefill_flops(before, stretch) / prefill_s
            of_decode = cost.step_bytes(subject.length) / decode_s
            row |= shares(of_prefill, of_decode, ceiling)
        if plan.batches and isinstance(subject, Batched):
            row["batch_tok_s"] = {
                str(batch): round(batch * DECODED_TOKENS / subject.decode_together(batch, token, DECODED_TOKENS), 2)
                for batch in plan.batches
            }
        if subject.has_phases:
            row["phases"] = _phases(subject, ids[-PROFILED_TOKENS:])
    return row


def _phases(subject: System, ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """Milliseconds a token that each phase takes, reading and decoding. Measured apart from the rest, because looking
    at the clock takes time too."""
    with Phases(subject.wait) as reading:
        token = subject.feed(ids)
    with Phases(subject.wait) as decoding:
        for _ in range(PROFILED_STEPS):
            token = subject.feed([token])
    return {"prefill": reading.ms(len(ids)), "decode": decoding.ms(PROFILED_STEPS)}


def _now(subject: System) -> float:
    subject.wait()
    return time.perf_counter()


def _text_ids(subject: System, count: int) -> list[int]:
    """Realistic text: random tokens would look up blocks as no text does."""
    ids: list[int] = []
    seed = 0
    while len(ids) < count:
        log = generate(seed, min(count, 20_000), lambda event: len(event.text) // 3)
        ids += subject.encode("\n".join(event.text for event in log.events))
        seed += 1
    return ids[:count]
