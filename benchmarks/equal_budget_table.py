"""The tables of docs/equal_budget.md and docs/pareto.png, from the kept rows of benchmarks/equal_budget.py."""

import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.equal_budget_entries import AVERAGES, CONTROL, ENTRIES, PREFIX, SHORT, SHORT_CONTROL
from benchmarks.tables import pivot, placed
from ebjdat_serve.bundle import read_rows
from ebjdat_serve.errors import BundleError
from ebjdat_serve.rows import FRESH, PRIOR, SUM, Images, Row, rows_where
from ebjdat_serve.scores import BASELINE
from training.evaluation.metrics import auroc, auroc_difference_stderr

USUAL = 10_000
"""Number of test images that a cell does not state."""
NOTHING = "Not measured yet."
SAME = 1e-5
"""The most by which a figure of kept values, which are fp32, differs from its row."""
Z = 1.96
"""Half-width of a normal 95 % interval in standard errors."""


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and the metric and fields of its rows; ``any_n``: the heading says how many images."""

    heading: str
    metric: str
    fields: dict[str, Any] = field(default_factory=dict)
    any_n: bool = False


@dataclass(frozen=True)
class Kept:
    """The kept results of one run."""

    name: str
    rows: list[Row]
    images: Path  # per-image results, which may be missing
    values: Path  # per-image NLL and scores, which may be missing

    def best(self, column: Column) -> Row | None:
        """Return the row of a column of most images, or None if it was not measured."""
        return max(rows_where(self.rows, column.metric, **column.fields), key=lambda row: row.n, default=None)


TEST = {"dataset": "cifar10", "split": "test"}
PGD20 = {**TEST, "attack": "pgd", "norm": "linf", "objective": "ce", "steps": 20, "restarts": 1}
SAMPLED = {"dataset": FRESH, "steps": 80, "step_size": 0.25, "grad_clip": 2.0, "noise_std": 0.005}
SVHN, CIFAR100 = {"dataset": "svhn_train_first1080", "subset": None}, {"dataset": "cifar100_test_3000", "subset": None}
FOOLED = {**TEST, "attack": "pgd", "norm": "linf", "eps": 8 / 255, "subset": "fooled"}
ROBUST = Column("PGD-20 8/255", "accuracy_pgd20", {**PGD20, "eps": 8 / 255})
DISTANCE = Column("KID, ResNet-20", "kernel_distance_resnet20", SAMPLED)
JUDGED = Column("agreement, robust ResNet-4b", "class_agreement_resnet4b", SAMPLED)
ACCURACY = (
    Column("clean", "accuracy_clean", TEST),
    ROBUST,
    Column("PGD-20 on the margin, 5 starts", "accuracy_pgd20_restarts", {**PGD20, "objective": "margin", "restarts": 5, "eps": 8 / 255}),
    Column("APGD-CE + APGD-T 8/255", "accuracy_apgd", {**TEST, "norm": "linf", "eps": 8 / 255}),
    Column("AutoAttack 8/255", "accuracy_autoattack", {**TEST, "norm": "linf", "eps": 8 / 255}),
    Column("NLL", "nll", {**TEST, "corruption": None, "temperature": "fitted"}),
    Column("sd of E(x), nats", "energy_sd", TEST),
)
SETS = {"CIFAR-100": CIFAR100, "SVHN": SVHN}
SCORES = {"energy": "energy", "composite": SUM, "max softmax": BASELINE}
DETECTION = (
    *(
        Column(f"{name}, {words}", f"auroc_{score}", {**images, "score": score}, any_n=True)
        for name, images in SETS.items()
        for words, score in SCORES.items()
    ),
    Column("fooled by PGD-20, reach score", "reach_auroc", {**FOOLED, "score": "reach_score"}, any_n=True),
)
LITE = Column("KID, EfficientNet-Lite0", "kernel_distance_efficientnet_lite0", SAMPLED)
SAMPLES = (DISTANCE, LITE, JUDGED, Column("agreement, ResNet-20", "class_agreement_resnet20", SAMPLED))
PROTOCOLS = (
    Column("clean", "accuracy_clean", TEST),
    ROBUST,
    Column("PGD-20 4/255", "accuracy_pgd20", {**PGD20, "eps": 4 / 255}),
    Column("released PGD-20, 4/255", "accuracy_pgd20_released_code", TEST),
    Column("released AutoAttack, 4/255", "accuracy_autoattack_released_code", TEST),
)
STARTS = Column("", DISTANCE.metric, vars(Images(dataset=PRIOR)))
"""KID of the prior alone, which tells where chains started: the signs of its principal components differ between machines."""
OTHER_STARTS = "other-starts"
"""Folder, in the control's, of the control's samples from the starts of the rows that were drawn on another machine."""
REFERENCES = {"prior alone": Images(dataset=PRIOR), "test images": Images(dataset="cifar10", split="test")}
"""Sets that samples are compared with, which are measured with every row."""


def kept_rows(models: Path, prefix: str = PREFIX) -> dict[str, Kept]:
    """Return the runs that are kept in a folder, in the order of the entries."""
    found = {}
    for name in (*ENTRIES, *AVERAGES):
        folder = models / f"{prefix}{name}"
        if (folder / "metrics.json").is_file():
            found[name] = kept_run(name, folder)
    return found


def kept_run(name: str, folder: Path) -> Kept:
    """Return the results that are kept in a folder."""
    return Kept(name, read_rows(folder / "metrics.json"), folder / "images.npz", folder / "values.npz")


def other_starts(models: Path) -> Kept | None:
    """Return the control's samples from the starts of another machine, or None where they are not kept."""
    folder = models / f"{PREFIX}{CONTROL}" / OTHER_STARTS
    return kept_run(CONTROL, folder) if (folder / "metrics.json").is_file() else None


def table(kept: dict[str, Kept], columns: Sequence[Column], control: str = CONTROL, other: Kept | None = None) -> str:
    """Return a Markdown table of the kept runs; under each figure is its difference from the control, with its 95 % interval.

    ``other`` is the control for the runs whose chains started where its did.
    """
    lines = []
    for name, one in kept.items():
        title, reference = f"`{name}`", kept.get(control)
        if name == control:
            title, reference = f"**`{name}`**, the control", None
        elif other is not None and same_start(one, other):
            title, reference = f"`{name}` *", other
        lines.append([title, *(cell(one, column, reference) for column in columns)])
    return pivot(["", *(column.heading for column in columns)], lines)


def same_start(one: Kept, other: Kept) -> bool:
    """Return whether the chains of two runs started at the same points."""
    rows = one.best(STARTS), other.best(STARTS)
    return all(rows) and math.isclose(*(row.value for row in rows if row is not None), rel_tol=SAME)


def samples_table(kept: dict[str, Kept], other: Kept | None = None) -> str:
    """Return the table of samples, with the prior alone and test images, as the control's evaluation measured them.

    ``other``: the control from other starts, which the runs from these are compared with.
    """
    lines = []
    source = kept.get(CONTROL, next(iter(kept.values())))
    if other is not None:
        lines.append(f"| `{CONTROL}` from the starts of * | {' | '.join(cell(other, column, None) for column in SAMPLES)} |")
    for name, images in REFERENCES.items():
        cells = [cell(source, Column(column.heading, column.metric, vars(images)), None) for column in SAMPLES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([table(kept, SAMPLES, other=other), *lines])


def cost_table(models: Path, kept: dict[str, Kept]) -> str:
    """Return what each run's training cost, from its configuration and log; of an average, what the runs of it cost together."""
    cost: dict[str, tuple[float, float, float]] = {}
    for name in kept:
        if name in ENTRIES:
            cost[name] = training_cost(models / f"{PREFIX}{name}", ENTRIES[name].passes)
    for name, parts in AVERAGES.items():
        if name in kept and all(part in cost for part in parts):
            epochs, passes, evaluations = (sum(column) for column in zip(*(cost[part] for part in parts), strict=True))
            cost[name] = (epochs, passes, evaluations)
    lines = [[f"`{name}`", f"{epochs:.2f}", f"{passes:.1f}", f"{n / 1e6:.2f}"] for name, (epochs, passes, n) in cost.items()]
    return pivot(["", "epochs", "passes", "gradient evaluations, millions"], lines)


def training_cost(folder: Path, passes: float) -> tuple[float, float, float]:
    """Return a run's epochs, its passes, ``passes`` a labelled image and step, and its gradient evaluations: steps x batch x ``passes``.

    Raises BundleError for a damaged config.json or log.jsonl.
    """
    try:
        stage = json.loads((folder / "config.json").read_text(encoding="utf-8"))["stages"][-1]
        steps = [row["of"] for row in map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()) if "of" in row]
        return float(stage["epochs"]), stage["epochs"] * passes, steps[-1] * stage["batch_size"] * passes
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BundleError(
            f"{folder}: config.json or log.jsonl is damaged ({type(error).__name__}): git checkout brings them back"
        ) from error


def cell(one: Kept, column: Column, control: Kept | None) -> str:
    """Return one figure of a run, with its interval where it is no proportion, and its difference from ``control``; empty: not measured."""
    row = one.best(column)
    if row is None:
        return ""
    half = half_width(row)
    text = f"{row.value:.4g}" + (f" ± {half:.2g}" if half is not None else "")
    text += "" if row.n == USUAL or column.any_n else f" (n = {row.n:,})"
    change = "" if control is None else minus(one, control, column)
    return f"{text}<br>{change}" if change else text


def half_width(row: Row) -> float | None:
    """Return the half-width of a figure's normal 95 % interval; None of a proportion, or without an interval."""
    if row.interval_kind == "normal" and row.interval is not None:
        return (row.interval[1] - row.interval[0]) / 2
    return Z * row.stderr if row.stderr is not None else None


def minus(one: Kept, control: Kept, column: Column) -> str:
    """Return the difference from the control with its interval: paired on the same images where their results are kept."""
    row, other = one.best(column), control.best(column)
    if row is None or other is None:
        return ""
    if row.interval_kind == "wilson":
        n, text = paired(one.images, control.images, row.key)
        return text if n in (0, USUAL) else f"{text} (n = {n:,})"
    if text := paired_values(one, control, column):
        return text
    widths = (half_width(row), half_width(other))
    if None in widths:
        return ""
    return spelled(row.value - other.value, math.hypot(*(width or 0.0 for width in widths)))


def difference(images: Path, control: Path, key: str) -> str:
    """Return the mean difference of two proportions on the same images, with its normal 95 % interval; empty if it is not available.

    ``images`` and ``control`` are the per-image results of two evaluations, images.npz.
    """
    return paired(images, control, key)[1]


def paired(images: Path, control: Path, key: str) -> tuple[int, str]:
    """Return the number of images and the text of ``difference``; (0, "") if it is not available."""
    if not (images.is_file() and control.is_file()):
        return 0, ""
    one, other = per_image(images), per_image(control)
    if key not in one or key not in other:
        return 0, ""
    n = min(len(one[key]), len(other[key]))
    if len(one[key]) != len(other[key]) and json.loads(key).get("subset"):
        return 0, ""  # only of whole sets are fewer images the first of more
    change = one[key][:n].astype(np.float64) - other[key][:n]
    return len(change), spelled(change.mean(), Z * change.std() / len(change) ** 0.5)


def paired_values(one: Kept, control: Kept, column: Column) -> str:
    """Return the difference of two NLL or two AUROC of the same images (DeLong's error) with its interval; empty if it is not available.

    Raises BundleError for values that are not those of the rows.
    """
    if not (one.values.is_file() and control.values.is_file()):
        return ""
    keys = ["nll"] if column.metric == "nll" else [f"{column.fields.get('score')}|{of}" for of in ("clean", column.fields.get("dataset"))]
    each = []
    for run in (one, control):
        kept, row = per_image(run.values), run.best(column)
        if row is None or not all(key in kept for key in keys):
            return ""
        found = [kept[key] for key in keys]
        value = found[0].mean(dtype=np.float64) if len(found) == 1 else auroc(*found)
        if sum(map(len, found)) != row.n or not abs(value - row.value) < SAME:
            raise BundleError(f"{run.values} is not of {run.name}'s {row.metric}: git checkout brings both back, --evaluate measures both")
        each.append(found)
    own, known = each
    if column.metric == "nll":
        change = own[0].astype(np.float64) - known[0]
        return spelled(change.mean(), Z * change.std() / len(change) ** 0.5)
    return spelled(auroc(*own) - auroc(*known), Z * auroc_difference_stderr(*own, *known))


def per_image(file: Path) -> dict[str, Any]:
    """Return per-image results, of images.npz or values.npz: arrays (N,) by name; raise BundleError naming damaged ones."""
    try:
        with np.load(file, allow_pickle=False) as opened:
            found = {name: opened[name] for name in opened.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile):
        found = {"": None}
    if not all(isinstance(each, np.ndarray) and each.ndim == 1 and each.dtype.kind in "bf" for each in found.values()):
        raise BundleError(f"{file} is damaged: git checkout brings a kept one back; without it, the row has no paired differences")
    return found


def spelled(change: float, half: float) -> str:
    """Return a difference with its interval."""
    return f"{change:+.4f} [{change - half:+.4f}, {change + half:+.4f}]"


def document(text: str, models: Path) -> str:
    """Return docs/equal_budget.md with its generated tables."""
    kept = kept_rows(models)
    text = placed(text, "accuracy", table(kept, ACCURACY))
    seen = {name: one for name, one in kept.items() if any(one.best(column) for column in DETECTION)}
    text = placed(text, "detection", table(seen, DETECTION) if seen else NOTHING)
    text = placed(text, "samples", samples_table(kept, other_starts(models)))
    text = placed(text, "cost", cost_table(models, kept))
    short = kept_rows(models, SHORT)
    return placed(text, "released", table(short, PROTOCOLS, SHORT_CONTROL) if short else NOTHING)


# the picture -----------------------------------------------------------------------------------------------------------


def points(kept: dict[str, Kept], other: Kept | None = None) -> dict[str, list[float]]:
    """Return of each run that has both: robust accuracy and half-width, KID and half-width; * marks the starts of ``other``."""
    found = {}
    for name, one in kept.items():
        for source, title in ((one, name), *([(other, name)] if other is not None and name == CONTROL else [])):
            robust, distance = one.best(ROBUST), source.best(DISTANCE)
            if robust is not None and distance is not None:
                half = Z * (robust.value * (1 - robust.value) / robust.n) ** 0.5
                mark = " *" if other is not None and same_start(source, other) else ""
                found[title + mark] = [robust.value, half, distance.value, half_width(distance) or 0.0]
    return found


def pareto(kept: dict[str, Kept], other: Kept | None = None) -> bytes:
    """Return a PNG of robust accuracy against KID of all runs, the control marked; its text chunk ``points`` holds what it shows."""
    import matplotlib.pyplot as plt

    from training.evaluation.figures import COLOURS, MARKERS, STYLE, png

    shown = points(kept, other)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        others = [name for name in shown if name.split()[0] != CONTROL]
        for name, (x, dx, y, dy) in shown.items():
            place = others.index(name) if name in others else -1
            look = (
                {"fmt": MARKERS[(place + place // 7) % 7], "color": COLOURS[place % 7]}
                if name in others
                else {"fmt": "*", "color": "black", "ms": 13, "mfc": "black" if name == CONTROL else "white"}
            )
            title = name if name in others else f"{name}, the control"
            axis.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, lw=1, label=title, zorder=2 if name in others else 3, **look)
        axis.set_yscale("log")
        ticks = [0.1, 0.2, 0.5, 1, 2, 5]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks([], minor=True)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
        axis.set_xlabel("accuracy under PGD-20, l-inf 8/255 (better to the right)")
        axis.set_ylabel("KID of fresh samples, ResNet-20 (better below)")
        picture = png(figure, 110)
    info, out = PngInfo(), io.BytesIO()
    info.add_text("points", json.dumps(shown))
    Image.open(io.BytesIO(picture)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(out, "PNG", pnginfo=info, optimize=True)
    return out.getvalue()
