"""An answer's attention as a picture: layer by place in the session."""

from __future__ import annotations

from os import PathLike

import numpy as np

from infllm_agent.errors import ConfigError
from infllm_agent.inspector.report import Answer, Report

#: Inches, dots per inch, and into how many columns the session is divided at most.
SIZE, DPI, COLUMNS = (9.0, 4.5), 150, 400


def check() -> None:
    """Raise ConfigError if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError('--png needs matplotlib: pip install "infllm-agent[bench]"') from None


def draw(report: Report, answer: Answer, path: str | PathLike[str]) -> None:
    """Write a PNG: how much of its attention each layer gave to the blocks that it looked up, by where they stand.

    Raises ConfigError without matplotlib, OSError if the file cannot be written.
    """
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trace = answer.trace
    end = max(1, report.messages[trace.answer].end)
    heat = _heat(answer, end)
    figure = Figure(SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # A square root, else one block that is read out would leave all others black.
    extent = (0, end, -0.5, len(trace.layers) - 0.5)
    image = axes.imshow(
        np.sqrt(100 * heat), aspect="auto", origin="lower", interpolation="nearest", cmap="magma", extent=extent
    )
    step = max(1, len(trace.layers) // 10)
    axes.set_yticks(range(0, len(trace.layers), step), [str(layer.layer) for layer in trace.layers[::step]])
    axes.set(xlabel="token of the session", ylabel="layer")
    axes.set_title(f"Answer {trace.answer}: what each layer looked up", loc="left")
    if trace.question is not None:
        axes.axvline(report.messages[trace.question].start, color="white", linewidth=0.8, linestyle=":")
    bar = figure.colorbar(image, ax=axes, label="% of the layer's attention")
    bar.ax.yaxis.set_major_formatter(lambda root, place: f"{root * root:.2g}")
    # No software name, which has an address in it; the session's name is not drawn, for want of glyphs.
    figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})


def _heat(answer: Answer, end: int) -> np.typing.NDArray[np.float64]:
    """(layers, columns): the attention of the looked-up blocks that begin in each column."""
    trace = answer.trace
    columns = int(min(COLUMNS, max(1, end // trace.block_size)))
    heat = np.zeros((len(trace.layers), columns))
    for row, layer in zip(heat, trace.layers, strict=True):
        starts = trace.n_sinks + layer.blocks * trace.block_size
        np.add.at(row, np.minimum(starts * columns // end, columns - 1), layer.attention)
    return heat
