"""``infllm-agent bench``: retrieval and speed, as tables for people and JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from infllm_agent.cli.options import Memory, takes_options
from infllm_agent.cli.output import Interrupted
from infllm_agent.errors import ConfigError, StorageError
from infllm_agent.platform.text import printable

app = typer.Typer(help="Measure retrieval and speed.", add_completion=False)

Model = Annotated[str, typer.Option(help="A packaged alias, a local folder, or a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; int8: weights in 8 bits.")]
Out = Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write JSON there; - is stdout.")]

#: How answers are scored, for people.
SCORING = "exact match: the answer as a word of its own in the first line that the model writes, greedily"
#: Tables without lines: six methods fit into 80 columns.
PLAIN: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
#: Of a line beside a bar, so much is shown.
SHOWN_CHARS = 70


@app.command()
@takes_options
def retrieval(
    task: Annotated[
        str,
        typer.Option(help="passkey, number, kv, lines, multikey, vartrack, agentlog, multiturn; with commas."),
    ] = "passkey",
    tokens: Annotated[str, typer.Option(help="Lengths of the contexts, with commas.")] = "16384",
    samples: Annotated[
        int, typer.Option(help="Contexts of each task (of passkey and number: of each length).", min=1)
    ] = 5,
    questions: Annotated[
        int, typer.Option(help="For each context and length, in tasks that have more than one.", min=1)
    ] = 10,
    method: Annotated[
        str, typer.Option(help="infllm, infllm-paper, full, streaming, truncate, rag; with commas.")
    ] = "infllm",
    truncate_to: Annotated[
        int | None,
        typer.Option(
            help="Latest tokens that method truncate sees, at most the model's window.",
            show_default="as many as a step of infllm attends to",
            min=1,
        ),
    ] = None,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="OUT",
            help="Write JSON there; - is stdout. Answers are kept beside it as they come, in OUT with the suffix "
            ".answers.jsonl: the same command goes on from them.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw accuracy by length and depth there, as PNG.")
    ] = None,
    *,
    memory: Memory,
) -> None:
    """Find planted facts far past the window.

    Greedy decoding; an answer is right if it stands, as a word of its own, in the first line that the model writes.
    All methods but full see at most as many tokens at once as a step of infllm attends to.
    """
    from infllm_agent.bench import plots
    from infllm_agent.bench.retrieval.run import RetrievalPlan, run
    from infllm_agent.model.local_model import LocalModel

    plan = RetrievalPlan(
        _listed(task), _numbers("--tokens", tokens), _listed(method), samples, questions, seed, truncate_to
    )
    answers = None
    _writable(out)
    if out is not None and str(out) != "-":
        answers = out.with_suffix(".answers.jsonl")
    if plot is not None:
        plots.check(plot)
    loaded = LocalModel.load(model, device=device, dtype=dtype)
    config = loaded.default_memory().changed(**memory)
    try:
        with _reporting() as report:
            rows = run(loaded, config, plan, answers, report)
    except KeyboardInterrupt:
        kept = f"the same command goes on from {answers}" if answers else "without --json OUT nothing is kept"
        raise Interrupted(f"interrupted: {kept}") from None
    if plot is not None:
        for path in plots.draw(rows, plot):
            _say(f"wrote {path}")
    if not _printed(rows, out):
        show_accuracy(rows)


@app.command()
@takes_options
def speed(
    histories: Annotated[str, typer.Option(help="Tokens of history, with commas.")] = "2048,8192,16384",
    systems: Annotated[str, typer.Option(help="infllm, plain, llamacpp; with commas.")] = "infllm,plain",
    random_from: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="Histories of at least so many tokens are not read, which would take hours, but filled with random "
            "keys and values; 0: all are read.",
            min=0,
        ),
    ] = 65_536,
    disk: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the blocks of such histories lie.", show_default="in host memory"),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(metavar="FILE", help="The model for llama.cpp.")] = None,
    apart: Annotated[
        bool, typer.Option(help="A process for each row, so that its peak memory is its own; or one for all.")
    ] = True,
    batch: Annotated[
        str | None,
        typer.Option(help="Numbers of sessions that decode together, with commas.", show_default="not measured"),
    ] = None,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw speed, memory and phases there, as PNG.")
    ] = None,
    *,
    memory: Memory,
) -> None:
    """Prefill and decoding by length of history, beside plain transformers (SDPA) and llama.cpp.

    Speeds are also given as shares of what the machine can do at best, which is measured first: prefill, of the
    arithmetic of a matrix product; decoding, of the bytes of a copy. Phases say where the time of a token goes.
    """
    from infllm_agent.bench import plots
    from infllm_agent.bench.speed import report as speed_report
    from infllm_agent.bench.speed.run import SpeedPlan, run

    plan = SpeedPlan(
        model,
        _numbers("--histories", histories),
        _listed(systems),
        memory,
        device,
        dtype,
        random_from or None,
        disk,
        gguf,
        apart,
        () if batch is None else _numbers("--batch", batch),
    )
    _writable(out)
    if plot is not None:
        plots.check(plot)
    result = run(plan, _say)
    if plot is not None:
        for path in speed_report.draw(result, plot):
            _say(f"wrote {path}")
    if not _printed(result, out):
        speed_report.show(result)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f'{option} "{text}": expected numbers with commas, such as 2048,16384') from None


def _writable(out: Path | None) -> None:
    """Fail before measuring for an hour, not after."""
    if out is None or str(out) == "-":
        return
    there = out.exists()
    try:
        out.open("a").close()
        if not there:
            out.unlink()
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _reporting() -> Iterator[Callable[[int, int, str], None]]:
    """A bar if stderr is a terminal, else a line for each round of questions."""
    if not sys.stderr.isatty():
        reached = 0

        def line_by_line(done: int, total: int, line: str) -> None:
            nonlocal reached
            if done > reached:
                _say(f"[{done}/{total}] {line}")
            reached = done

        yield line_by_line
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None, line="")
        yield lambda done, total, line: bars.update(
            bar, total=total, completed=done, line=printable(line)[:SHOWN_CHARS]
        )


def _printed(value: Any, out: Path | None) -> bool:
    """Write JSON to where it is wanted; returns whether that is stdout, which then holds nothing else."""
    if out is None:
        return False
    text = json.dumps(value, indent=1)
    if str(out) == "-":
        print(text)
        return True
    out.write_text(text + "\n")
    return False


def show_accuracy(rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy with a column for each method, then what each method took at the longest length."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["task"], row["tokens"], row["method"]): row for row in rows}
    found = Table("task", title=f"{rows[0]['model']}: right answers", caption=SCORING, **PLAIN)
    found.add_column("tokens", justify="right")
    found.add_column("asked", justify="right")
    for method in methods:
        found.add_column(method, justify="right")
    for task, tokens in dict.fromkeys((row["task"], row["tokens"]) for row in rows):
        of = [cells[task, tokens, method] for method in methods]
        found.add_row(task, f"{tokens:,}", f"{of[0]['samples']:,}", *(f"{row['accuracy']:.0%}" for row in of))
    longest = max(row["tokens"] for row in rows)
    took = Table("method", title=f"at {longest:,} tokens", **PLAIN)
    for column in ("attended keys", "prefill tok/s", "decode tok/s", "peak RSS, MB"):
        took.add_column(column, justify="right")
    for method in methods:
        last = [row for row in rows if row["method"] == method and row["tokens"] == longest]
        beyond = " (beyond the window)" if any(row["beyond_window"] for row in last) else ""
        took.add_row(
            method + beyond,
            f"{max(row['attended_keys'] for row in last):,}",
            f"{fmean(row['prefill_tok_s'] for row in last):,.0f}",
            f"{fmean(row['decode_tok_s'] for row in last):,.1f}",
            f"{max(row['peak_rss_mb'] for row in last):,}",
        )
    console = Console()
    console.print(found, "", took)
