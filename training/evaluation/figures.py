"""Plots of an evaluation, by matplotlib, in a colour-blind-safe palette (Okabe and Ito 2008)."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebjdat_serve.pixels import Pixels, grid
from ebjdat_serve.rows import COMPARED, SUM, Images, Row, rows_where
from ebjdat_serve.sentences import attack_name, eps_name, images_name
from training.evaluation.landscape import clean_of, energies, kinds_shown, scored, sets_shown
from training.evaluation.result_cache import Arrays

COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999", "#000000")
MARKERS = "osD^vPX*"
LOOKS = {  # a fixed colour and line style per set
    "clean": (COLOURS[0], "-"),
    "PGD-20": (COLOURS[1], "-"),
    "transferred": (COLOURS[2], "--"),
    "AutoAttack": (COLOURS[7], ":"),
    "drawn by the model": (COLOURS[3], "-"),
    "SVHN": (COLOURS[4], ":"),
    "CIFAR-100": (COLOURS[5], "-."),
    "noise": (COLOURS[6], "-"),
}
FILLED = ("clean", "PGD-20")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $x$
}


def png(figure: Figure, dpi: int = 150) -> bytes:
    """Return a figure as PNG, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def landscape(arrays: dict[Images, Arrays], eps: float, title: str = "") -> Figure:
    """Return histograms of E(x), E(x, y) and the OOD score, overlaid: clean, adversarial, generated, OOD."""
    kinds = kinds_shown([arrays], eps)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(kinds), figsize=(2.0 + 3.6 * len(kinds), 3.4), layout="constrained")
        for axis, (kind, name) in zip(axes, kinds.items(), strict=True):
            overlay(axis, [(short, scored(found)[kind]) for _, short, found in sets_shown(arrays, eps)])
            axis.set_xlabel(f"{name}, nats ({'higher = less like the data' if kind == SUM else 'lower = likelier'})")
        axes[0].set_ylabel("density")
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
        if title:
            figure.suptitle(title, fontsize=11)
    return figure


def landscapes(models: Sequence[tuple[str, dict[Images, Arrays]]], eps: float) -> Figure:
    """Return the landscapes of several models, stacked, on one axis in standard deviations of each model's clean scores."""
    kinds = kinds_shown([arrays for _, arrays in models], eps)
    size = (2.0 + 3.6 * len(kinds), 1.9 * len(models) + 0.6)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(models), len(kinds), figsize=size, layout="constrained", sharex="col", squeeze=False)
        for row, (name, arrays) in zip(axes, models, strict=True):
            images = clean_of(arrays)
            assert images is not None, f"{name} has no clean images"
            for axis, kind in zip(row, kinds, strict=True):
                clean = scored(arrays[images])[kind]
                sets = [(short, (scored(found)[kind] - clean.mean()) / clean.std()) for _, short, found in sets_shown(arrays, eps)]
                overlay(axis, sets, (-6.0, 5.0))
            row[0].set_ylabel(name)
        for axis, name in zip(axes[0], kinds.values(), strict=True):
            axis.set_title(name)
        figure.supxlabel("deviations of the clean scores from their mean; the bins at the edges hold all beyond", fontsize=10)
        handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        axes[0, -1].legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return figure


def overlay(
    axis: Axes, sets: Sequence[tuple[str, np.ndarray]], limits: tuple[float, float] | None = None, filled: Sequence[str] = FILLED
) -> None:
    """Draw density histograms of several samples, those named in ``filled`` filled; the bins at ``limits`` hold all values beyond."""
    joined = np.concatenate([values for _, values in sets])
    low, high = limits or (float(np.quantile(joined, 0.002)), float(np.quantile(joined, 0.998)))
    top = 0.0
    for i, (name, values) in enumerate(sets):
        colour, line = LOOKS.get(name, (COLOURS[i], "-"))
        edges = np.linspace(low, high, int(np.clip(3 * len(values) ** (1 / 3), 10, 50)))  # few images, wide bins
        density, _ = np.histogram(values.clip(low, high) if limits else values, edges)
        heights = density / max(len(values), 1) / np.diff(edges)
        inner = float(heights[1:-1].max())
        top = inner if i == 0 else max(top, min(inner, 2.2 * top))  # so that a narrow peak does not flatten the rest
        axis.stairs(heights, edges, color=colour, alpha=0.22 if name in filled else 0.0, fill=True)
        axis.stairs(heights, edges, color=colour, lw=1.7, ls=line, label=name)
    axis.set_ylim(0, 1.1 * top)
    axis.set_yticks([])


def ground(found: Arrays, eps: float, names: Sequence[str]) -> Figure:
    """Return the slice of the energy around one image, with its decision boundary."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.9, 3.9), layout="constrained")
        step = found["step"]
        filled = axis.contourf(step, step, found["energy"], levels=24, cmap="cividis")
        if len(np.unique(found["class"])) > 1:
            axis.contour(
                step, step, found["class"] == int(found["image"][1]), levels=[0.5], colors="white", linewidths=1.4, linestyles="--"
            )
        axis.plot([0, 1], [0, 0], "o-", color="#D55E00", ms=5)
        for text, at in (("image", -0.1), ("PGD-20", 0.8)):
            outline = [patheffects.withStroke(linewidth=2.5, foreground="black")]
            axis.annotate(text, (at, 0.14), color="white", path_effects=outline)
        axis.set_xlabel("the way PGD went (1: where it ended)")
        axis.set_ylabel("a random way, as long")
        name = names[int(found["image"][1])] if int(found["image"][1]) < len(names) else str(found["image"][1])
        axis.set_title(f"E(x) around test image {int(found['image'][0])}, {name}; dashed: border of its class")
        figure.colorbar(filled, ax=axis, label="E(x), nats")
    return figure


def differences(arrays: dict[Images, Arrays]) -> Figure | None:
    """Return per-image E(x_adv) - E(x) under PGD of several strengths."""
    sets = [(attacked_name(images), found) for images, found in arrays.items() if images.attack == "pgd"]
    if not sets or (images := clean_of(arrays)) is None:
        return None
    clean = energies(arrays[images])["energy"]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
        both = [(name, energies(found)["energy"], min(len(clean), len(found["logits"]))) for name, found in sets]
        overlay(axis, [(name, values[:n] - clean[:n]) for name, values, n in both], filled=[name for name, _, _ in both])
        axis.axvline(0, color="#999999", lw=1)
        axis.set_xlabel("E(x_adv) - E(x) of each image, nats")
        axis.legend(fontsize=9)
    return figure


def reliability(found: Arrays) -> Figure:
    """Return the reliability diagram before and after the temperature."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(3.9, 3.4), layout="constrained")
        axis.plot([0, 1], [0, 1], color="#999999", lw=1)
        for i, (name, rows) in enumerate(found.items()):
            size = 12 + 200 * rows[:, 2] / rows[:, 2].sum()
            axis.scatter(rows[:, 0], rows[:, 1], size, color=COLOURS[i], alpha=0.8, label=f"{name} the temperature (area: images)")
        axis.set_xlabel("confidence")
        axis.set_ylabel("accuracy")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 1.16))
    return figure


def attacked_name(images: Images) -> str:
    """Return the label of a set: its attack where it is under one, else its name."""
    if images.attack is None or images.eps is None:
        return images_name(images)
    return ", ".join(part for part in (f"{attack_name(images)} {eps_name(images.eps)}", images.subset) if part)


def curves(rows: Sequence[Row]) -> Figure | None:
    """Return accuracy against eps, which must fall, and loss against steps, which must rise."""
    eps = [row for row in rows_where(rows, "accuracy_at_eps") if row.eps is not None and row.interval is not None]
    loss = [(row.steps, row.value) for row in rows_where(rows, "loss_at_steps") if row.steps is not None]
    if not eps or not loss:
        return None
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.0), layout="constrained")
        values = np.asarray([row.value for row in eps])
        bars = np.asarray([row.interval for row in eps])
        spread = np.abs(bars.T - values).clip(0)
        left.errorbar(range(len(eps)), values, yerr=spread, fmt="o-", color=COLOURS[0], capsize=3)
        left.set_xticks(range(len(eps)), [eps_name(row.eps or 0.0) for row in eps])
        left.set_ylim(-0.02, 1)
        left.set_xlabel("l-inf eps")
        left.set_ylabel("accuracy under PGD-20")
        right.plot([s for s, _ in loss], [value for _, value in loss], "o-", color=COLOURS[1])
        right.set_xscale("log")
        right.set_xlabel("steps of PGD")
        right.set_ylabel("mean cross-entropy")
    return figure


def separations(rows: Sequence[Row]) -> Figure | None:
    """Return the AUROC of each score on each set."""
    table: dict[Images, dict[str, float]] = {}
    for row in rows:
        if row.score and row.metric == f"auroc_{row.score}":
            table.setdefault(row.images, {})[row.score] = row.value
    # fooled images are shown separately, not pooled
    table = {images: values for images, values in table.items() if replace(images, subset="fooled") not in table or images.subset}
    if not table:
        return None
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.2, 0.34 * len(table) + 1.2), layout="constrained")
        for i, kind in enumerate(kind for kind in COMPARED if any(kind in values for values in table.values())):
            at = [(y, values[kind]) for y, values in enumerate(table.values()) if kind in values]
            axis.plot([v for _, v in at], [y for y, _ in at], MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], ms=6, label=kind)
        axis.axvline(0.5, color="#999999", lw=1)
        axis.set_yticks(range(len(table)), [attacked_name(images) for images in table])
        axis.set_xlabel("AUROC against clean test images (0.5: blind; below: likelier than clean)")
        axis.set_xlim(0, 1.02)
        axis.invert_yaxis()
        axis.grid(axis="y", color="#eeeeee")
        axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def sheet(image: Pixels, columns: int, scale: int = 2) -> bytes:
    """Return a grid of uint8 images (N, H, W, 3) as PNG."""
    from ebjdat_serve.pixels import encode_png

    return encode_png(grid(image, scale, columns=columns))
