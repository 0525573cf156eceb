"""Curves and energy histograms of a run, by matplotlib, as SVG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

T = TypeVar("T")
Points = list[tuple[float, float]]
COLUMNS = 3


def curves(charts: Mapping[str, Mapping[str, Points]]) -> bytes:
    """Return a chart a title, with a line a series against the step."""
    figure, axes = grid(len(charts), 2.6)
    for ax, (title, lines) in zip(axes, charts.items(), strict=True):
        for name, points in lines.items():
            ax.plot(*zip(*spread(points, 400), strict=True), linewidth=1, label=f"{name} {points[-1][1]:.4g}")
        ax.set_title(title, fontsize=9)
        ax.legend(fontsize=7)
    return svg(figure)


def histograms(looks: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the energy histograms of each validation on held-out images, overlaid, in order of steps."""
    figure, axes = grid(len(looks), 1.8)
    for ax, look in zip(axes, looks, strict=True):
        shown = look["histograms"]
        for name in ("clean", "adversarial", "drawn"):
            if name in shown:
                low, high = shown["range"]
                edges = np.linspace(low, high, len(shown[name]) + 1)
                ax.stairs(shown[name], edges, fill=True, alpha=0.35, label=name)
        ax.set_title(f"step {look['step']}", fontsize=9)
        ax.set_yticks([])
    axes[0].legend(fontsize=7)
    return svg(figure)


def spread(things: list[T], most: int) -> list[T]:
    """Return at most so many of ``things``, evenly, and the last."""
    chosen = things[:: max(1, -(-len(things) // most))]
    return chosen if not things or chosen[-1] is things[-1] else [*chosen, things[-1]]


def grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many charts, three a row, each ``height`` inches high."""
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, COLUMNS, i + 1) for i in range(count)]
    for ax in axes:
        ax.tick_params(labelsize=7)
    return figure, axes


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG, its texts as text."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "run"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()
