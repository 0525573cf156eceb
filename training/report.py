#!/usr/bin/env python3
"""report.html of a run, self-contained: `python training/report.py RUN/STAGE`.

Loss and energy curves, clean and PGD accuracy on held-out training images, energy histograms as they evolve, sample sheets.
"""

import base64
import html
import json
from pathlib import Path
from typing import Any

from ebjdat_serve.console import command, parser_of
from training.config import Preset, describe
from training.errors import TrainingError

Row = dict[str, Any]
COLOURS = ("#2858c8", "#d23c32", "#2a9d4a", "#8a4fbf", "#c98a10")
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 220, 52, 22
CHARTS = (
    ("Loss", ("loss", "h2", "h3", "ce", "ce_adv", "kl", "bce")),
    ("Accuracy on training batches", ("accuracy", "accuracy_adv")),
    ("Accuracy on held-out training images", ("selection_clean", "selection_pgd10")),
    ("Energy of data and its spread, nats", ("energy", "energy_sd")),
    ("Energy gaps, nats", ("energy_gap_neg", "energy_gap_adv")),
    ("|mean E(x_adv) - E(x)| / sd E(x), held out", ("selection_gap_over_sd",)),
    ("Chains: share of pixels at 0 or 1", ("saturation",)),
    ("Curriculum T", ("attack_steps",)),
    ("Images per second", ("images_per_second",)),
)


def write_report(folder: Path, preset: Preset | None = None) -> Path:
    """Write ``folder``/report.html from its log and sample sheets; return it."""
    rows = read_log(folder / "log.jsonl")
    charts = "".join(chart(title, {name: series(rows, name) for name in names}) for title, names in CHARTS)
    rollbacks = sum("diverged" in row for row in rows)
    said = html.escape(json.dumps(describe(preset), indent=1)) if preset else ""
    settings = f"<details><summary>configuration</summary><pre>{said}</pre></details>" if preset else ""
    text = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(folder.name)}</title><style>
body{{font:14px system-ui,sans-serif;margin:2em;color:#222}}figure{{display:inline-block;margin:.5em}}figcaption{{font-weight:600}}
svg text{{font:10px system-ui,sans-serif}}img{{image-rendering:pixelated;max-width:100%}}</style></head><body>
<h1>{html.escape(folder.name)}</h1><p>{summary(rows, rollbacks)}</p>{settings}
<h2>Curves</h2>{charts}<h2>Energy E(x) of held-out images, clean, adversarial (PGD-10) and drawn</h2>{landscapes(rows)}
<h2>Samples of the averaged weights, one column a class, seeds fixed, none chosen</h2>{sheets(folder / "samples")}</body></html>
"""
    target = folder / "report.html"
    target.write_text(text, encoding="utf-8")
    return target


def read_log(log: Path) -> list[Row]:
    """Return the rows of a log; of steps that were taken twice, ``series`` keeps the last."""
    kept: list[Row] = []
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                row: Row = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short
            kept.append(row)
    return kept


def series(rows: list[Row], name: str) -> list[tuple[float, float]]:
    """Return (step, value) pairs in order of steps."""
    points = {row["step"]: row[name] for row in rows if name in row and "diverged" not in row and isinstance(row[name], int | float)}
    return sorted((float(step), float(value)) for step, value in points.items() if value == value and abs(value) < 1e30)


def summary(rows: list[Row], rollbacks: int) -> str:
    """Return where the run stands, in a sentence."""
    steps = [row for row in rows if "of" in row]
    looks = [row for row in rows if "selection_clean" in row]
    where = f"Step {steps[-1]['step']} of {steps[-1]['of']}, rolled back for divergence {rollbacks} times." if steps else "No step yet."
    if not looks:
        return where
    last = looks[-1]
    return f"{where} Held-out training images: clean {last['selection_clean']:.3f}, PGD-10 {last['selection_pgd10']:.3f}."


def chart(title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Return one figure with a line a series; nothing when there is nothing to draw."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, high = min(ys), max(ys)
    span, reach = (high - low) or 1.0, max(xs) or 1.0
    drawn, legend = "", ""
    for (name, points), colour in zip(lines.items(), COLOURS * 2, strict=False):
        thin = points[:: max(1, len(points) // 400)]
        path = " ".join(f"{LEFT + (WIDTH - LEFT) * x / reach:.1f},{(HEIGHT - BOTTOM) * (1 - (y - low) / span):.1f}" for x, y in thin)
        drawn += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>'
        legend += f'<span style="color:{colour}">&#9632; {html.escape(name)} {points[-1][1]:.4g}</span> '
    bottom = HEIGHT - BOTTOM
    axis = (
        f'<text y="10">{high:.4g}</text><text y="{bottom}">{low:.4g}</text><text x="{WIDTH - 60}" y="{HEIGHT - 6}">step {reach:.0f}</text>'
    )
    picture = f'<svg width="{WIDTH}" height="{HEIGHT}">{drawn}{axis}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{picture}<br>{legend}</figure>"


def landscapes(rows: list[Row], most: int = 12) -> str:
    """Return the energy histograms over the run, at most so many, the last among them."""
    looks = [row for row in rows if row.get("histograms")]
    chosen = looks[:: max(1, len(looks) // most)]
    if looks and chosen[-1] is not looks[-1]:
        chosen.append(looks[-1])
    return "".join(landscape(row) for row in chosen)


def landscape(row: Row) -> str:
    """Return one set of histograms, overlaid."""
    shown = row["histograms"]
    low, high = shown["range"]
    sets = [name for name in ("clean", "adversarial", "drawn") if name in shown]
    top = max(max(shown[name]) for name in sets) or 1.0
    width, height, bars = 230, 110, ""
    for name, colour in zip(sets, COLOURS, strict=False):
        step = width / len(shown[name])
        points = " ".join(f"{i * step:.1f},{height * (1 - share / top):.1f}" for i, share in enumerate(shown[name]))
        bars += f'<polygon points="0,{height} {points} {width},{height}" fill="{colour}" fill-opacity=".35" stroke="{colour}"/>'
    ends = f'<text x="0" y="{height + 12}">{low:.3g}</text><text x="{width - 32}" y="{height + 12}">{high:.3g}</text>'
    legend = " ".join(f'<span style="color:{colour}">&#9632; {name}</span>' for name, colour in zip(sets, COLOURS, strict=False))
    caption = f"<figcaption>step {row['step']}</figcaption>"
    return f'<figure>{caption}<svg width="{width}" height="{height + 16}">{bars}{ends}</svg><br>{legend}</figure>'


def sheets(folder: Path, most: int = 8) -> str:
    """Return the sample sheets over the run, at most so many, the last among them."""
    files = sorted(folder.glob("*.png"))
    chosen = files[:: max(1, len(files) // most)]
    if files and chosen[-1] != files[-1]:
        chosen.append(files[-1])
    return "".join(
        f"<figure><figcaption>step {int(file.stem)}</figcaption>"
        f'<img alt="samples" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"></figure>'
        for file in chosen
    )


def main() -> None:
    """Write the report of the stage folder named on the command line, of a run that goes on or one that has ended."""
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    with command(parser):
        if not (options.folder / "log.jsonl").is_file():
            raise TrainingError(f"{options.folder} holds no log.jsonl: name the folder of a stage, RUN/PRESET")
        print(write_report(options.folder))


if __name__ == "__main__":
    main()
