"""The result of ``bench speed``, as tables and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from infllm_agent.bench.plots import DPI, SIZE

#: Without lines and narrow gaps: ten columns fit into 80.
_PLAIN: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 1, 0, 0)}
_MARKERS = "osD^"

#: What is drawn: a title, the field of a row, and whether the axis is logarithmic.
_PANELS = (
    ("prefill, tokens/s", "prefill_tok_s", True),
    ("decode, tokens/s", "decode_tok_s", True),
    ("time to first token, s", "first_token_s", True),
    ("peak RSS, MB", "peak_rss_mb", False),
)


def show(result: dict[str, Any]) -> None:
    """Speed by history, then where the time of a token goes."""
    machine = result["ceilings"]
    table = Table(
        title=f"{result['model']}, {result['dtype']}, {result['device']}, {result['threads']} threads; at best "
        f"{machine['matmul_gflops']:,} GFLOP/s, {machine['copy_gb_s']:,} GB/s",
        caption="% of the best: of a matrix product, of a copy"
        + ("; * the history is random keys and values" if any(row["random"] for row in result["rows"]) else ""),
        **_PLAIN,
    )
    table.add_column("system")
    for column in ("history", "prefill tok/s", "%", "decode tok/s", "%", "first token, s", "RSS, MB", "device, MB"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["system"],
            _history(row),
            f"{row['prefill_tok_s']:,.0f}",
            _percent(row["prefill_share"]),
            f"{row['decode_tok_s']:,.1f}",
            _percent(row["decode_share"]),
            f"{row['first_token_s']:,.2f}",
            f"{row['peak_rss_mb']:,}",
            "-" if row["device_memory_mb"] is None else f"{row['device_memory_mb']:,.0f}",
        )
    console = Console()
    console.print(table)
    profiled = _profiled(result)
    if any(row["batch_tok_s"] for row in result["rows"]):
        console.print("", _batches(result["rows"]))
    if profiled:
        console.print("", _phases(profiled))


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """``speed.png``, and ``phases.png`` if there are any."""
    written = [_by_history(result, folder / "speed.png")]
    profiled = _profiled(result)
    if profiled:
        written.append(_stacked(profiled, folder / "phases.png"))
    return written


def _batches(rows: Sequence[dict[str, Any]]) -> Table:
    rows = [row for row in rows if row["batch_tok_s"]]
    sizes = list(rows[0]["batch_tok_s"])
    table = Table("history", title="tokens/s of sessions that decode together, by their number", **_PLAIN)
    for size in sizes:
        table.add_column(size, justify="right")
    for row in rows:
        table.add_row(_history(row), *(f"{row['batch_tok_s'][size]:,.1f}" for size in sizes))
    return table


def _phases(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("history", title="milliseconds a token, by phase", **_PLAIN)
    table.add_column("")
    phases = list(rows[0]["phases"]["prefill"])
    for phase in phases:
        table.add_column(phase, justify="right")
    for row in rows:
        for what, ms in row["phases"].items():
            table.add_row(_history(row), what, *(f"{ms[phase]:.3g}" for phase in phases))
    return table


def _by_history(result: dict[str, Any], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0] * 1.4, SIZE[1] * 1.7), dpi=DPI, layout="constrained")
    rows = result["rows"]
    lengths = sorted({row["history"] for row in rows})
    for axes, (title, name, logarithmic) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for place, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
            own = sorted((row for row in rows if row["system"] == system), key=lambda row: row["history"])
            [line] = axes.plot(
                [lengths.index(row["history"]) for row in own],
                [row[name] for row in own],
                marker=_MARKERS[place % len(_MARKERS)],
                label=system,
            )
            for row in own:
                if row["random"]:  # hollow
                    axes.plot(
                        lengths.index(row["history"]),
                        row[name],
                        marker=_MARKERS[place % len(_MARKERS)],
                        markerfacecolor="white",
                        color=line.get_color(),
                    )
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.1 * max(row[name] for row in rows))
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_xlabel("tokens of history")
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
    hollow = "; hollow: random keys and values" if any(row["random"] for row in rows) else ""
    figure.suptitle(f"{result['model']}, {result['dtype']}, {result['device']}{hollow}")
    figure.savefig(path)
    return path


def _stacked(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    names = [_history(row) for row in rows]
    for axes, what in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        bottom = [0.0] * len(rows)
        for phase in rows[0]["phases"][what]:
            heights = [row["phases"][what][phase] for row in rows]
            axes.bar(names, heights, bottom=bottom, label=phase)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_title(f"{what}, ms a token")
        axes.set_xlabel("tokens of history")
        axes.tick_params(axis="x", labelrotation=30)
        axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path)
    return path


def _profiled(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["phases"] is not None]


def _history(row: dict[str, Any]) -> str:
    return f"{row['history']:,}{'*' if row['random'] else ''}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
