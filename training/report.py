#!/usr/bin/env python3
"""Write a run's self-contained report.html: `python training/report.py RUN/STAGE`.

Loss and energy curves, clean and PGD accuracy on held-out training images, energy histograms over time, sample sheets.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from ebjdat_serve.console import command, parser_of
from ebjdat_serve.install import install
from training.config import Preset, describe
from training.errors import TrainingError

log = logging.getLogger("training")
Row = dict[str, Any]
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


def write_report(folder: Path, preset: Preset | None = None) -> Path | None:
    """Write ``folder``/report.html from its log and sample sheets and return it.

    Without jinja2 or matplotlib, which training does not need, log the install command and return None.
    """
    try:
        from training.loop import charts
        from training.pages import render
    except ImportError as error:
        log.warning("no report.html: %s is not installed: %s, then python training/report.py %s", error.name, install("train"), folder)
        return None
    rows = read_log(folder / "log.jsonl")
    drawn = {title: {name: points for name in names if (points := series(rows, name))} for title, names in CHARTS}
    drawn = {title: lines for title, lines in drawn.items() if lines}
    looks = charts.spread([row for row in rows if row.get("histograms")], 12)
    target = folder / "report.html"
    target.write_text(
        render(
            "run.html",
            name=folder.name,
            summary=summary(rows, sum("diverged" in row for row in rows)),
            settings=json.dumps(describe(preset), indent=1) if preset else "",
            curves=charts.curves(drawn) if drawn else None,
            histograms=charts.histograms(looks) if looks else None,
            sheets=[(int(file.stem), file.read_bytes()) for file in charts.spread(sorted((folder / "samples").glob("*.png")), 8)],
        ),
        encoding="utf-8",
    )
    return target


def read_log(log: Path) -> list[Row]:
    """Return the rows of a log; for steps taken twice, ``series`` keeps the last."""
    kept: list[Row] = []
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                row: Row = json.loads(line)
            except ValueError:
                continue  # a line truncated by a kill
            kept.append(row)
    return kept


def series(rows: list[Row], name: str) -> list[tuple[float, float]]:
    """Return (step, value) pairs in order of steps."""
    points = {row["step"]: row[name] for row in rows if name in row and "diverged" not in row and isinstance(row[name], int | float)}
    return sorted((float(step), float(value)) for step, value in points.items() if value == value and abs(value) < 1e30)


def summary(rows: list[Row], rollbacks: int) -> str:
    """Return the run's status as text."""
    steps = [row for row in rows if "of" in row]
    looks = [row for row in rows if "selection_clean" in row]
    where = f"Step {steps[-1]['step']} of {steps[-1]['of']}, rolled back for divergence {rollbacks} times." if steps else "No step yet."
    if not looks:
        return where
    last = looks[-1]
    return f"{where} Held-out training images: clean {last['selection_clean']:.3f}, PGD-10 {last['selection_pgd10']:.3f}."


def main() -> None:
    """Write the report of the stage folder named on the command line; the run may still be running."""
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    with command(parser):
        if not (options.folder / "log.jsonl").is_file():
            raise TrainingError(f"{options.folder} holds no log.jsonl: name the folder of a stage, RUN/PRESET")
        if report := write_report(options.folder):
            print(report)
        else:
            sys.exit(1)


if __name__ == "__main__":
    main()
