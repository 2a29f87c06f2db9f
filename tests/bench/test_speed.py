"""The speed benchmark measures what it says and refuses what makes no sense. How fast anything is, is no test."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from torch.utils.flop_counter import FlopCounterMode

from infllm_agent.bench.machine import ceilings
from infllm_agent.bench.retrieval.readers import FullContext, MemoryContext
from infllm_agent.bench.speed.cost import Cost, Weights, shares
from infllm_agent.bench.speed.fill import fill
from infllm_agent.bench.speed.phases import PHASES, Phases
from infllm_agent.bench.speed.run import SpeedPlan, run
from infllm_agent.bench.speed.systems import FilledContext
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.config import MemoryConfig, SamplingConfig
from infllm_agent.errors import ConfigError
from infllm_agent.generation.sampler import Sampler
from infllm_agent.model.local_model import LocalModel

SMALL: dict[str, Any] = {"n_init": 8, "n_local": 64, "block_size": 16, "topk": 4, "candidates": 8, "chunk_size": 32}
OPTIONS = ["--n-init", "8", "--n-local", "64", "--topk", "4", "--candidates", "8", "--chunk-size", "32"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens, and ceilings that are not measured."""
    for name, value in {"DECODED_TOKENS": 3, "STRETCH_TOKENS": 64, "PROFILED_TOKENS": 48, "PROFILED_STEPS": 2}.items():
        monkeypatch.setattr(f"infllm_agent.bench.speed.run.{name}", value)
    monkeypatch.setattr(
        "infllm_agent.bench.speed.run.ceilings", lambda device, dtype: {"matmul_gflops": 100.0, "copy_gb_s": 10.0}
    )


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast(monkeypatch)
    out, plots = tmp_path / "out.json", tmp_path / "plots"
    command = ["bench", "speed", "--model", str(cli.model), "--histories", "700,200", "--random-from", "500"]
    done = cli(*command, *OPTIONS, "--no-apart", "--json", str(out), "--plot", str(plots))
    assert done.code == 0, done.err
    assert "* the history is random" in done.out
    assert "milliseconds a token, by phase" in done.out
    assert {path.name for path in plots.iterdir()} == {"speed.png", "phases.png"}
    for path in plots.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    assert result["ceilings"] == {"matmul_gflops": 100.0, "copy_gb_s": 10.0}
    rows = result["rows"]
    assert [(row["system"], row["history"], row["random"], row["prefill_tokens"]) for row in rows] == [
        ("infllm", 200, False, 200),
        ("plain", 200, False, 200),
        ("infllm", 700, True, 64),
        ("plain", 700, True, 64),
    ]
    for row in rows:
        for name in ("prefill_tok_s", "decode_tok_s", "first_token_s", "peak_rss_mb"):
            assert row[name] > 0
        assert row["prefill_share"] >= 0
        assert row["decode_share"] >= 0
        assert (row["phases"] is not None) == (row["system"] == "infllm")
    disk = tmp_path / "disk"
    disk.mkdir()
    again = cli(*command, *OPTIONS, "--no-apart", "--json", "-", "--disk", str(disk), "--batch", "1,3")
    assert again.json["rows"][2]["random"]
    batches = [row["batch_tok_s"] for row in again.json["rows"]]
    assert batches[1] is None
    assert batches[3] is None
    for batch in (batches[0], batches[2]):
        assert list(batch) == ["1", "3"]
        assert all(speed > 0 for speed in batch.values())
    assert not list(disk.iterdir())


def test_rows_in_processes_of_their_own(cli: Any) -> None:
    done = cli("bench", "speed", "--model", str(cli.model), "--histories", "300", "--systems", "infllm", "--json", "-")
    [row] = done.json["rows"]
    assert row["history"] == 300
    assert done.json["ceilings"]["matmul_gflops"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "magic"], 'system "magic" is not known; there are infllm, plain, llamacpp'),
        (["--systems", "plain,plain"], "a system is named twice"),
        (["--histories", "0"], "a history of 0 tokens"),
        (["--histories", "many"], '--histories "many": expected numbers'),
        (["--histories", "300,300"], "a history is named twice: 300, 300"),
        (["--random-from", "-1"], "-1"),
        (["--batch", "0"], "a batch of 0 sessions"),
        (["--batch", "8,8"], "a batch is named twice: 8, 8"),
        (["--batch", "all"], '--batch "all": expected numbers'),
        (["--gguf", "/no/such.gguf"], "--gguf /no/such.gguf: there is no such file"),
        (["--gguf", __file__], "name it with --systems"),
        (["--disk", "/no/such"], "--disk /no/such: there is no such folder"),
        (["--json", "/proc/no/such.json"], "cannot be written"),
        (["--plot", "/proc/no/such"], "/proc/no/such"),
        (["--n-local", "5000"], "window"),
        (["--device", "nowhere"], 'device "nowhere" cannot be used'),
    ],
)
def test_what_makes_no_sense_is_refused_before_measuring(cli: Any, options: list[str], message: str) -> None:
    base = ["bench", "speed", "--model", str(cli.model), "--histories", "300", "--no-apart"]
    assert message in cli(*base, *options).error


def test_a_system_that_is_not_installed_is_skipped_in_one_line(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fast(monkeypatch)
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "llama_cpp":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    command = ["bench", "speed", "--model", str(cli.model), "--histories", "100,150", "--no-apart", *OPTIONS]
    done = cli(*command, "--systems", "llamacpp,infllm", "--json", str(tmp_path / "out.json"))
    assert done.code == 0, done.err
    assert done.err.count("llamacpp skipped: llama-cpp-python is not installed") == 1
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["system"] for row in result["rows"]] == ["infllm", "infllm"]
    [skipped] = result["skipped"]
    assert skipped["system"] == "llamacpp"
    nothing = cli(*command, "--systems", "llamacpp")
    assert nothing.code == 2
    assert nothing.err.endswith("nothing was measured: llamacpp: llama-cpp-python is not installed\n")


def test_what_does_not_fit_is_skipped(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fast(monkeypatch)
    lines: list[str] = []
    plan = SpeedPlan(str(cli.model), (300, 1000), ("infllm", "plain"), SMALL, "cpu", "float32", 200, apart=False)
    room = {"bytes": 10**9}
    monkeypatch.setattr("infllm_agent.bench.speed.systems.available_bytes", lambda device: room["bytes"])
    assert len(run(plan)["rows"]) == 4
    room["bytes"] = 350_000  # a token takes 384 bytes
    monkeypatch.setattr("infllm_agent.bench.speed.systems.MASK_BYTES", 1)
    result = run(plan, lines.append)
    assert [(one["system"], one["history"]) for one in result["skipped"]] == [("infllm", 1000), ("plain", 1000)]
    assert any("or use --disk" in line for line in lines)


# -- a history that is made up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("history", [50, 72, 88, 1003])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_filled_memory_is_like_one_that_read(name: str, history: int, in_files: bool, tmp_path: Path) -> None:
    model, config = tiny(name), MemoryConfig(**SMALL, flat_blocks=16)
    ids = torch.randint(3, 97, (history,), generator=torch.Generator().manual_seed(1)).tolist()
    read, filled = MemoryContext.empty(model, config), MemoryContext.empty(model, config)
    read.feed(ids)
    fill(
        model,
        filled.memory,
        ids[:40],
        history,
        BlockFiles(tmp_path, filled.memory.store.shape) if in_files else None,
    )
    blocks = max(0, (history - 72) // 16)
    assert filled.memory.store.count == blocks
    assert filled.memory.store.stored == (blocks if in_files else 0)
    for context in (read, filled):
        context.feed([5, 6, 7])
    got, expected = filled.memory, read.memory
    assert got.length == expected.length == history + 3
    assert got.store.count == expected.store.count
    assert (got.n_sinks, got.first_window_token) == (expected.n_sinks, expected.first_window_token)
    assert got.index_bytes() <= expected.index_bytes()
    for mine, theirs in zip(got.layers.values(), expected.layers.values(), strict=True):
        assert (mine.window.start, mine.window.stop) == (theirs.window.start, theirs.window.stop)
        assert len(mine.selected) == len(theirs.selected)
    if blocks > 20:
        chosen = list(range(blocks))
        keys = filled.memory.store.keys(chosen, 0)
        assert len(torch.unique(keys.flatten(1), dim=0)) == len(chosen)
        index = next(iter(filled.memory.layers.values())).blocks.keys[:blocks]
        torch.testing.assert_close(index, keys.mean(dim=2), atol=1e-5, rtol=1e-5)


# -- what is counted -------------------------------------------------------------------------------------------------


def test_weights_are_those_that_a_token_goes_through() -> None:
    for name in ("llama", "mixtral"):
        model = tiny(name).model
        counted = Weights.of(model)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model.set_attn_implementation("eager")
            model(input_ids=torch.tensor([[5]]), use_cache=False)
        products = [0, *(flops for op, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(op))]
        head = 2 * model.get_output_embeddings().weight.numel()
        vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # norms
        attention = 3 * 2 * 2 * 32  # one query, one key: three layers, two products of four heads of eight channels
        if name == "llama":
            assert sum(products) == 2 * (counted.body - vectors) + head + attention
        assert counted.bytes == 4 * (counted.body + head / 2)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    embedding = model.get_input_embeddings().weight.numel()
    assert counted.body == total - experts / 2 - 2 * embedding


class LastQuery:
    """How many keys the last query of a chunk meets, over all layers with blocks."""

    keys = 0

    def wants(self, layer: int) -> bool:
        return True

    def record(self, layer: int, n_sinks: int, blocks: Any, first_token: int, logits: Any) -> None:
        self.keys += sum(part.shape[1] for part in logits)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_pairs_that_meet_are_counted_as_they_happen(name: str) -> None:
    model, config = tiny(name), MemoryConfig(**SMALL)
    cost, context, past = Cost.of(model, config), MemoryContext.empty(model, config), 0
    for n in [32, 32, 32, 7, 32, 1, 32, 32, 1]:
        context.memory.recorder = last = LastQuery()
        context.feed([5] * n)
        seen = len(context.memory.layers) * -(n * (n - 1) // 2) + n * last.keys
        for layer in context.memory.sliding.values():
            seen += sum(min(layer.reach, past + i + 1) for i in range(n))
        spec = model.specs[0]
        assert cost.prefill_flops(past, n) - 2 * cost.weights.body * n == 4 * spec.q_heads * spec.head_dim * seen
        if n == 1:
            assert cost.step_bytes(past) - cost.weights.bytes == 2 * spec.kv_heads * spec.head_dim * 4 * seen
        past += n
    assert context.memory.store.count > config.topk


def test_full_attention_sees_everything() -> None:
    cost = Cost.of(tiny("llama"), None)
    body = 2 * cost.weights.body * 10
    assert cost.prefill_flops(100, 10) - body == 3 * 4 * 4 * 8 * sum(range(101, 111))
    assert cost.step_bytes(999) - cost.weights.bytes == 3 * 2 * 2 * 8 * 1000 * 4
    assert shares(5e10, 5e9, {"matmul_gflops": 100.0, "copy_gb_s": 10.0}) == {
        "prefill_share": 0.5,
        "decode_share": 0.5,
    }


def test_ceilings_are_measured() -> None:
    found = ceilings(CPU, torch.float32)
    assert 1 < found["matmul_gflops"] < 1e6
    assert 0.1 < found["copy_gb_s"] < 1e5


# -- phases ----------------------------------------------------------------------------------------------------------


def test_phases_cover_a_step_and_leave_nothing_behind() -> None:
    model = tiny("llama")
    before = [owner.__dict__[name] for methods in PHASES.values() for owner, name in methods]
    context = MemoryContext.empty(model, MemoryConfig(**SMALL))
    context.feed([5] * 400)
    waited = 0

    def wait() -> None:
        nonlocal waited
        waited += 1

    with Phases(wait) as phases:
        logits = context.feed([5] * 32)
        Sampler(SamplingConfig()).pick(logits, [])
    assert all(seconds > 0 for seconds in phases.seconds.values()), phases.seconds
    assert waited > 0
    taken = dict(phases.seconds)
    context.feed([5] * 32)
    assert phases.seconds == taken
    assert [owner.__dict__[name] for methods in PHASES.values() for owner, name in methods] == before


def test_a_phase_inside_another_stops_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("infllm_agent.bench.speed.phases.time.perf_counter", lambda: next(now))
    phases = Phases()

    def inner() -> None: ...

    timed_inner = phases._timed("lookup", inner)
    phases._timed("attention", lambda: [timed_inner(), timed_inner()])()
    # one tick for each begin and end: attention runs before, between and behind the two lookups
    assert phases.seconds["attention"] == 3
    assert phases.seconds["lookup"] == 2


def test_an_error_inside_leaves_nothing_behind() -> None:
    before = LocalModel.__dict__["_step"]
    with pytest.raises(ConfigError), Phases():
        raise ConfigError("in the middle")
    assert LocalModel.__dict__["_step"] is before


def test_a_filled_cache_is_attended_to() -> None:
    """Keys and values of a text, put into the cache from outside, are that text."""
    model = tiny("llama")
    read, filled = FilledContext(model), FilledContext(model)
    read.feed([5, 6, 7])
    for number in model.specs:
        layer: Any = read.cache.layers[number]
        filled.cache.update(layer.keys, layer.values, number)
    torch.testing.assert_close(filled.feed([8]), FullContext(model).feed([5, 6, 7, 8]), atol=1e-4, rtol=1e-4)
