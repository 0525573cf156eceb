"""Write an evaluation's self-contained report.html: every figure with its interval, the plots, and the warnings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ebjdat_serve.rows import Row, rows_where
from ebjdat_serve.scores import BASELINE
from ebjdat_serve.sentences import data_words, protocol_words
from training.evaluation.context import Context
from training.pages import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.evaluation.result_cache import Arrays


HEADINGS = {
    "clean": "Clean images",
    "robustness": "Robustness",
    "masking": "Can the attacks be believed?",
    "suspicion": "What the flag sees",
    "hostile": "A hostile user against the flag",
    "shifts": "Benign shifts",
    "calibration": "Probabilities",
    "generation": "Generation",
    "explanation": "Counterfactuals",
    "landscape": "The energy landscape",
    "released-code": "What the published code computes",
}
SAID = {
    "masking": "1 is passed. A failed check does not show that the model is weak, but that its robust accuracies are unreliable.",
    "robustness": "Accuracies carry Wilson 95 % intervals; a target is met by the lower bound. The worst case counts an image only if every attack left it.",
    "suspicion": "Every rate of the served score is followed by that of max softmax, which needs no energy. Images that an attack fooled are counted apart from the rest.",
    "hostile": "The attacker knows model, views, ranks and threshold. No flag here defends against such a user; these figures show how far it goes.",
    "generation": "No figure is FID unless Inception-v3 with its standard weights was available. Distances at small n are biased upwards: compare them with the floor.",
    "explanation": "The oracle is an adversarially trained network: an undefended one is fooled by what transfers, and would agree with anything.",
    "released-code": "Half of the stated eps, and a weakened list of attacks: for comparison with published tables only.",
}
OPEN = 14
SHORT = (
    "accuracy_clean", "accuracy_autoattack", "accuracy_worst_case", "masking_suspected", "nll", "flag_rate_clean", "auroc_robust_ood",
    "accuracy_with_rejection", "energy_w1_over_sd", "class_agreement_resnet20", "class_agreement_resnet4b", "kernel_distance_efficientnet_lite0",
)  # fmt: skip
"""Rows of a section that are shown before the rest is folded."""


@dataclass(frozen=True)
class Image:
    """A PNG with its texts; ``pixelated``: it is scaled without smoothing."""

    content: bytes
    alt: str
    caption: str
    pixelated: bool


@dataclass(frozen=True)
class Line:
    """A row's cells of a table."""

    metric: str
    value: str
    interval: str
    n: int
    data: str
    protocol: str


@dataclass(frozen=True)
class Section:
    """The section of one part."""

    heading: str
    text: str
    images: list[Image]
    lines: list[Line]


def write_evaluation_report(c: Context, rows: Sequence[Row]) -> Path:
    """Write report.html into the evaluation's folder and return it."""
    drawn = images(c, rows)
    sections = []
    for name, heading in HEADINGS.items():
        if found := [row for row in rows if row.part == name]:
            sections.append(Section(heading, SAID.get(name, ""), drawn.get(name, []), [line(row) for row in ordered(name, found)]))
    text = render(
        "evaluation.html",
        model=c.subject.name,
        data=c.data.name,
        weights=c.subject.weights[:16],
        graph=c.subject.graph[:16],
        failed=failed(rows),
        short=[line(row) for row in in_short(rows)],
        sections=sections,
        warnings=c.warnings,
        open=OPEN,
    )
    target = c.folder / "report.html"
    target.write_text(text, encoding="utf-8")
    return target


def failed(rows: Sequence[Row]) -> str | None:
    """Return the failed checks for masked gradients, if masking is suspected, for the top of the page."""
    if not any(row.value for row in rows_where(rows, "masking_suspected")):
        return None
    return ", ".join(row.check for row in rows if row.check and not row.value)


def in_short(rows: Sequence[Row]) -> list[Row]:
    """Return the summary: the first row of each main metric, with max softmax's after a score's."""
    found: list[Row] = []
    for metric in SHORT:
        rows_of = rows_where(rows, metric)
        baseline = [row for row in rows_of[1:] if row.score == BASELINE]
        found += rows_of[:1] + baseline[:1]
    return found


def accepted_words(found: "Arrays", names: Sequence[str]) -> str:
    """Return the caption of the wrong acceptances."""
    pairs = zip(found["label"], found["answer"], found["probability"], strict=True)
    said = ", ".join(f"{names[int(label)]} taken for {names[int(answer)]} ({p:.2f})" for label, answer, p in pairs)
    return f"The most confident wrong answers on clean test images that the flag accepts at alpha 0.05, with their probability: {said}."


def ordered(part: str, rows: Sequence[Row]) -> list[Row]:
    """Return a part's rows in order; of masking, the verdict and its checks first, since the rest is plotted."""
    return sorted(rows, key=lambda row: not (row.check or row.metric == "masking_suspected")) if part == "masking" else list(rows)


def line(row: Row) -> Line:
    """Return a row's cells."""
    interval = "[{:.3f}, {:.3f}]".format(*row.interval) if row.interval else f"± {1.96 * row.stderr:.3f}" if row.stderr is not None else ""
    return Line(row.metric, f"{row.value:.4g}", interval, row.n, data_words(row), protocol_words(row))


def images(c: Context, rows: Sequence[Row]) -> dict[str, list[Image]]:
    """Return the images of each part."""
    import numpy as np

    from training.evaluation import figures as draw
    from training.evaluation.landscape import clean_of

    found: dict[str, list[Image]] = {}

    def add(part: str, image: "Figure | bytes", alt: str, caption: str) -> None:
        sheet = isinstance(image, bytes)
        found.setdefault(part, []).append(Image(image if isinstance(image, bytes) else draw.png(image, 110), alt, caption, sheet))

    arrays, shown, eps = c.arrays, c.drawings, c.ball.linf
    if clean_of(arrays) is not None:
        add(
            "landscape",
            draw.landscape(arrays, eps),
            "energy histograms",
            "Energies and OOD scores of clean, adversarial, generated and OOD images.",
        )
        if (moved := draw.differences(arrays)) is not None:
            add("landscape", moved, "energy differences", "What PGD does to the energy of each image.")
    if "slice" in shown:
        add("landscape", draw.ground(shown["slice"], eps, c.data.names), "slice", "The ground around one image.")
    if "reliability" in shown:
        diagram = draw.reliability(shown["reliability"])
        add("calibration", diagram, "reliability diagram", "Reliability on clean test images, 15 bins.")
    if (curves := draw.curves(rows)) is not None:
        caption = "An honest defence falls to zero as eps grows, and its loss rises with the attack's steps."
        add("masking", curves, "accuracy against eps", caption)
    if (separated := draw.separations(rows)) is not None:
        add("suspicion", separated, "AUROC", "How well each score tells strange and attacked images from clean ones.")
    if "accepted" in shown and len(wrong := shown["accepted"]["image"]):
        add("suspicion", draw.sheet(wrong, len(wrong), 3), "wrong acceptances", accepted_words(shown["accepted"], c.data.names))
    if "samples" in shown:
        sheet = draw.sheet(shown["samples"]["image"], len(c.data.names))
        add("generation", sheet, "samples", "Fresh samples, one column per class, seeds in order, not selected.")
    if "neighbours" in shown:
        pair = np.concatenate([shown["neighbours"]["image"], shown["neighbours"]["nearest"]])
        sheet = draw.sheet(pair, len(shown["neighbours"]["image"]), 3)
        add("generation", sheet, "neighbours", "Above, samples; below, the nearest training image of each in pixels.")
    return found
