"""``infllm-agent bench``: retrieval and speed, as tables for people and JSON for machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infllm_agent.cli_options import Memory, takes_options
from infllm_agent.errors import ConfigError, StorageError

app = typer.Typer(help="Measure retrieval and speed.", add_completion=False)

Model = Annotated[str, typer.Option(help="A packaged alias, a local folder, or a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Out = Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write JSON there; - is stdout.")]


@app.command()
@takes_options
def retrieval(
    task: Annotated[str, typer.Option(help="passkey or number.")] = "passkey",
    tokens: Annotated[int, typer.Option(help="Length of each context.", min=1)] = 16384,
    samples: Annotated[int, typer.Option(help="Contexts, each with one question.", min=1)] = 5,
    method: Annotated[
        str, typer.Option(help="infllm, infllm-paper, full, streaming, truncate; with commas.")
    ] = "infllm",
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    out: Out = None,
    *,
    memory: Memory,
) -> None:
    """Find a planted fact far past the window; greedy decoding, exact match."""
    from infllm_agent.bench.retrieval import Plan, run
    from infllm_agent.model import LocalModel

    plan = Plan(task, tokens, samples, tuple(method.split(",")), seed)
    _writable(out)
    loaded = LocalModel.load(model, device=device, dtype=dtype)
    config = loaded.default_memory().changed(**memory)
    rows = run(loaded, config, plan, report=_progress)
    _show(rows, out, rows)


@app.command()
@takes_options
def speed(
    histories: Annotated[str, typer.Option(help="Tokens of history, with commas.")] = "2048,8192,16384",
    systems: Annotated[str, typer.Option(help="infllm, plain; with commas.")] = "infllm,plain",
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    *,
    memory: Memory,
) -> None:
    """Prefill and decoding by length of history, beside plain transformers (SDPA)."""
    from infllm_agent.bench.speed import run

    try:
        lengths = [int(length) for length in histories.split(",")]
    except ValueError:
        raise ConfigError(f'--histories "{histories}": expected numbers with commas, such as 2048,16384') from None
    _writable(out)
    table = run(model, memory, lengths, systems.split(","), device=device, dtype=dtype, report=_progress)
    _show(table["rows"], out, table)


def _writable(out: Path | None) -> None:
    """Fail before measuring for an hour, not after."""
    if out is None or str(out) == "-":
        return
    try:
        out.touch()
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}") from error


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(rows: list[dict[str, Any]], out: Path | None, value: Any) -> None:
    if out is not None:
        text = json.dumps(value, indent=1)
        if str(out) == "-":
            print(text)
            return
        out.write_text(text + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    Console().print(table)
