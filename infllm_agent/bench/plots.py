"""Pictures of a measurement: accuracy by length, a line for each method; by length and depth, a map for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infllm_agent.bench.retrieval.scores import BINS
from infllm_agent.errors import ConfigError, StorageError

#: Inches and dots per inch.
SIZE, DPI = (7.0, 4.2), 150
_MARKERS = "osD^vPX*"


def check(folder: Path) -> None:
    """Make the folder, and see that there is something to draw with.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageError: the folder cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError('--plot needs matplotlib: pip install "infllm-agent[bench]"') from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{folder}: no folder that can be written: {error.strerror}") from error


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """``TASK.png`` for each task, and ``TASK-METHOD.png`` for each of its methods, from the rows of ``--json``."""
    written = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        written.append(_by_length(of_task, folder / f"{task}.png"))
        for method in dict.fromkeys(row["method"] for row in of_task):
            of_method = [row for row in of_task if row["method"] == method]
            written.append(_by_depth(of_method, folder / f"{task}-{method}.png"))
    return written


def _by_length(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure()
    lengths = sorted({row["tokens"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for place, method in enumerate(methods):
        line = sorted((row["tokens"], row["accuracy"]) for row in rows if row["method"] == method)
        aside = (place - (len(methods) - 1) / 2) * 0.05  # lines that are equal must not hide each other
        axes.plot(
            [lengths.index(tokens) + aside for tokens, _ in line],
            [100 * accuracy for _, accuracy in line],
            marker=_MARKERS[place % len(_MARKERS)],
            label=method,
            clip_on=False,
        )
    _mark_lengths(axes, lengths)
    axes.set_ylim(0, 100)
    axes.set_ylabel("right answers, %")
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(f"{rows[0]['task']}, {rows[0]['model']}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path)
    return path


def _by_depth(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure()
    lengths = sorted({row["tokens"] for row in rows})
    grid = [[float("nan")] * len(lengths) for _ in range(BINS)]
    for row in rows:
        column = lengths.index(row["tokens"])
        for depth, correct, asked in row["by_depth"]:
            line = int(depth * BINS)
            grid[line][column] = 100 * correct / asked
            axes.text(column, line, f"{correct}/{asked}", ha="center", va="center", fontsize=8)
    image = axes.imshow(grid, cmap="RdYlBu", vmin=0, vmax=100, aspect="auto", alpha=0.7)
    _mark_lengths(axes, lengths)
    axes.set_yticks(range(BINS), [f"{100 * n // BINS}-{100 * (n + 1) // BINS}%" for n in range(BINS)])
    axes.set_ylabel("depth of the answer in the context")
    axes.set_title(f"{rows[0]['task']}, {rows[0]['method']}, {rows[0]['model']}: right answers of those asked")
    figure.colorbar(image, label="right answers, %")
    figure.savefig(path)
    return path


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def _mark_lengths(axes: Any, lengths: Sequence[int]) -> None:
    """Lengths are equally far apart, whatever they are: they usually double."""
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_xlabel("length of the context, tokens")
