"""report.html of an evaluation: every figure with its interval, the images, and what was warned of. Self-contained."""

import html
from collections.abc import Sequence
from pathlib import Path

from ebjdat_serve.rows import Row, rows_where
from ebjdat_serve.scores import BASELINE
from ebjdat_serve.sentences import data_words, protocol_words
from training.evaluation.context import Context

STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c1c1c}
table{border-collapse:collapse;width:100%;margin:.6rem 0 1.4rem}td,th{padding:.2rem .7rem .2rem 0;border-bottom:1px solid #e4e4e4;text-align:left;vertical-align:top}
th{font-weight:600}td.v,th.v{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td.p{color:#555;font-size:.88em}
img{max-width:100%;image-rendering:auto}img.px{image-rendering:pixelated}figure{margin:1rem 0}figcaption{color:#555;font-size:.9em}
.bad{background:#fdecea;border-left:4px solid #D55E00;padding:.5rem .8rem;margin:.6rem 0}.note{border-left:4px solid #E69F00;padding:.2rem .8rem;margin:.3rem 0;color:#444}
summary{cursor:pointer;font-weight:600}@media print{details{display:block}}"""
HEADINGS = {
    "clean": "Clean images",
    "robustness": "Robustness",
    "masking": "Can the attacks be believed?",
    "suspicion": "What the flag sees",
    "hostile": "A hostile user against the flag",
    "shifts": "Benign shifts",
    "calibration": "Probabilities",
    "generation": "Generation",
    "landscape": "The energy landscape",
    "released-code": "What the published code computes",
}
SAID = {
    "masking": "1 is passed. A failed check does not say that the model is weak; it says that its robust accuracies cannot be believed.",
    "robustness": "Accuracies carry Wilson 95 % intervals; a target is met by the lower bound. The worst case counts an image only if every attack left it.",
    "suspicion": "Every rate of the served score stands beside that of max softmax, which needs no energy. Of an attack the images that it fooled are counted apart from the rest.",
    "hostile": "The attacker knows model, score and threshold. No flag here is a defence against such a user; these are the figures that say how far it goes.",
    "generation": "No figure is FID unless Inception-v3 with its standard weights was at hand. Distances at small n are biased upwards: read them beside the floor.",
    "released-code": "Half of the stated eps, and a weakened list of attacks: for comparison with published tables only.",
}
OPEN = 14
SHORT = (
    "accuracy_clean", "accuracy_autoattack", "accuracy_worst_case", "masking_suspected", "nll", "flag_rate_clean", "auroc_robust_ood",
    "accuracy_with_rejection", "energy_w1_over_sd", "class_agreement_resnet20", "class_agreement_resnet4b", "kernel_distance_efficientnet_lite0",
)  # fmt: skip
"""Rows a section shows before the rest is folded."""


def write_evaluation_report(c: Context, rows: Sequence[Row]) -> Path:
    """Write report.html into the evaluation's folder and return it."""
    parts = [name for name in HEADINGS if any(row.part == name for row in rows)]
    pictures = figures(c, rows)
    body = "".join(
        f"<h2>{HEADINGS[name]}</h2><p>{SAID.get(name, '')}</p>{''.join(pictures.get(name, []))}{table(ordered(name, [row for row in rows if row.part == name]))}"
        for name in parts
    )
    notes = "".join(f'<p class="note">{html.escape(part)}: {html.escape(text)}</p>' for part, lines in c.warnings.items() for text in lines)
    said = f"<h2>Notes and warnings</h2>{notes}" if notes else ""
    text = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(c.subject.name)}: evaluation</title><style>{STYLE}</style></head><body>
<h1>{html.escape(c.subject.name)} on {html.escape(c.data.name)}</h1>
<p>Weights sha256 {c.subject.weights[:16]}…, served graph {c.subject.graph[:16]}…. Robust figures are in pixels of [0,1]. Every row says how it was made.</p>
{verdict(rows)}{in_short(rows)}{body}{said}</body></html>
"""
    target = c.folder / "report.html"
    target.write_text(text, encoding="utf-8")
    return target


def verdict(rows: Sequence[Row]) -> str:
    """Return the warning that must stand first, if there is one."""
    if not any(row.value for row in rows_where(rows, "masking_suspected")):
        return ""
    failed = ", ".join(row.check for row in rows if row.check and not row.value)
    return f'<p class="bad"><b>Masked gradients are suspected.</b> Failed: {html.escape(failed)}. The robust accuracies below cannot be believed.</p>'


def in_short(rows: Sequence[Row]) -> str:
    """Return the first row of each chief metric, and max softmax's beside a score's: what a reader asks for before anything else."""
    found: list[Row] = []
    for metric in SHORT:
        rows_of = rows_where(rows, metric)
        baseline = [row for row in rows_of[1:] if row.score == BASELINE]
        found += rows_of[:1] + baseline[:1]
    return f"<h2>In short</h2>{table(found)}" if found else ""


def ordered(part: str, rows: Sequence[Row]) -> list[Row]:
    """Return a part's rows as they came; of masking the verdict and its checks first, for the rest is drawn."""
    return sorted(rows, key=lambda row: not (row.check or row.metric == "masking_suspected")) if part == "masking" else list(rows)


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table, most of a long one folded."""
    head = (
        '<tr><th>figure</th><th class="v">value</th><th class="v">95 % interval</th><th class="v">n</th><th>data</th><th>protocol</th></tr>'
    )
    lines = [line(row) for row in rows]
    first = f"<table>{head}{''.join(lines[:OPEN])}</table>"
    if len(lines) <= OPEN:
        return first
    return f"{first}<details><summary>{len(lines) - OPEN} more</summary><table>{head}{''.join(lines[OPEN:])}</table></details>"


def line(row: Row) -> str:
    """Return one row of a table."""
    bounds = "[{:.3f}, {:.3f}]".format(*row.interval) if row.interval else f"± {1.96 * row.stderr:.3f}" if row.stderr is not None else ""
    cells = (
        f"<td>{row.metric}</td>",
        f'<td class="v">{row.value:.4g}</td>',
        f'<td class="v">{bounds}</td>',
        f'<td class="v">{row.n}</td>',
    )
    return f"<tr>{''.join(cells)}<td>{html.escape(data_words(row))}</td><td class='p'>{html.escape(protocol_words(row))}</td></tr>"


def figures(c: Context, rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the images of each part, as <figure>s."""
    from training.evaluation import figures as draw
    from training.evaluation.landscape import clean_of

    found: dict[str, list[str]] = {}

    def add(part: str, image: str, caption: str) -> None:
        found.setdefault(part, []).append(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")

    arrays, shown, eps = c.arrays, c.drawings, c.ball.linf
    if clean_of(arrays) is not None:
        add(
            "landscape",
            draw.inline(draw.landscape(arrays, eps), "energy histograms"),
            "Energies of clean, adversarial, drawn and strange images.",
        )
        if (moved := draw.differences(arrays)) is not None:
            add("landscape", draw.inline(moved, "energy differences"), "What PGD does to the energy of each image.")
    if "slice" in shown:
        add("landscape", draw.inline(draw.ground(shown["slice"], eps, c.data.names), "slice"), "The ground around one image.")
    if "reliability" in shown:
        add(
            "calibration",
            draw.inline(draw.reliability(shown["reliability"]), "reliability diagram"),
            "Reliability on clean test images, 15 bins.",
        )
    if (curves := draw.curves(rows)) is not None:
        add(
            "masking",
            draw.inline(curves, "accuracy against eps"),
            "An honest defence falls to zero as eps grows, and its loss rises with the attack's steps.",
        )
    if (separated := draw.separations(rows)) is not None:
        add("suspicion", draw.inline(separated, "AUROC"), "How well each score tells strange and attacked images from clean ones.")
    if "samples" in shown:
        sheet = draw.sheet(shown["samples"]["image"], len(c.data.names))
        add("generation", pixelated(draw.picture(sheet, "samples")), "Fresh samples, one column a class, seeds in order, none chosen.")
    if "neighbours" in shown:
        import numpy as np

        pair = np.concatenate([shown["neighbours"]["image"], shown["neighbours"]["nearest"]])
        sheet = draw.sheet(pair, len(shown["neighbours"]["image"]), 3)
        add(
            "generation",
            pixelated(draw.picture(sheet, "neighbours")),
            "Above, samples; below, the nearest training image of each in pixels.",
        )
    return found


def pixelated(image: str) -> str:
    """Return an <img> whose pixels stay square."""
    return image.replace("<img ", '<img class="px" ')
