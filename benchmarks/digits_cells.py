#!/usr/bin/env python3
"""Vary EB-JDAT's objective on digits, three seeds: `python benchmarks/digits_cells.py` (results: benchmarks/digits_cells.json).

Cells: the inner maximum climbs CE or E(x, y); the energies are aligned by the relative gap or the paper's signed one; AWP on or off. Every
cell of a seed continues the same FGSM-RS warm start with the light weights of docs/equal_budget.md, and so does the control, plain
adversarial training, for the same labelled images. Rows are written one by one, and an interrupted run continues. --table writes the
table of docs/methods.md.
"""

import argparse
import contextlib
import io
import itertools
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.tables import DOCS, HERE, pivot, placed
from ebjdat_serve.bundle import write_json
from ebjdat_serve.networks import build
from ebjdat_serve.pixels import to_unit
from training.config import Preset, describe, stages
from training.data.datasets import Dataset, load
from training.evaluation.attacks import Pgd
from training.evaluation.evaluated_model import open_module
from training.loop.clock import Clock
from training.loop.loop import train
from training.loop.state import load_weights
from training.methods.adversary import Attack
from training.methods.at import AdversarialTraining
from training.methods.sharpness import Awp
from training.overrides import override
from training.presets import DIGITS

SEEDS = (0, 1, 2)
RESULTS = HERE / "digits_cells.json"
LIGHT = ("w1=0.03", "w2=0.2", "clean_weight=0")
WARM, CONTROL = "warm start", "plain adversarial training"


@dataclass(frozen=True)
class Cell:
    """One setting of the objective."""

    inner: str
    alignment: str
    awp: bool

    @property
    def name(self) -> str:
        """Return the name of its rows."""
        return f"inner {self.inner}, alignment {self.alignment}, AWP {'on' if self.awp else 'off'}"

    def stage(self) -> Preset:
        """Return its training stage."""
        stage = override(DIGITS, [*LIGHT, f"inner={self.inner}", f"alignment={self.alignment}"])
        return replace(stage, sharpness=Awp(gamma=0.005) if self.awp else None)


CELLS = [Cell(*chosen) for chosen in itertools.product(("ce", "joint_energy"), ("relative", "paper"), (False, True))]


def runs() -> dict[str, Preset]:
    """Return the stages that continue a warm start, by name: the control first."""
    control = replace(DIGITS, method=AdversarialTraining(Attack(steps=10)))
    return {CONTROL: control, **{cell.name: cell.stage() for cell in CELLS}}


def bits(mask: NDArray[np.bool_]) -> str:
    """Return per-image results (N,) as a string of 0 and 1."""
    return "".join("1" if one else "0" for one in mask)


def measured(weights: Path, stage: Preset, data: Dataset) -> dict[str, Any]:
    """Return clean and PGD-20 accuracy on the test split, and the images that survive PGD-20."""
    model = build(stage.architecture, len(data.names), load_weights(weights)).requires_grad_(False)
    image, subject = to_unit(data.test.image), open_module("digits", model, "")
    clean = subject.logits(image).argmax(axis=1) == data.test.label
    robust = Pgd(stage.threat).run(subject, image, data.test.label)["robust_mask"]
    figures = {"accuracy_clean": float(clean.mean()), "accuracy_pgd20": float(robust.mean())}
    return {"n": len(clean), **figures, "clean": bits(clean), "robust": bits(robust)}


def run(name: str, stage: Preset, data: Dataset, folder: Path, init: Path | None) -> tuple[Path, dict[str, Any]]:
    """Train one stage from ``init``; return its weights and its row. Raises TrainingError when it diverges."""
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        weights = train(stage, data, folder, init=init, clock=Clock(), device=torch.device("cpu"))
    seconds = time.process_time() - began
    configuration = json.loads(json.dumps(describe(stage)))
    row = {"name": name, "unit": "share", "seed": stage.seed, "seconds": seconds, "configuration": configuration}
    figures = measured(weights, stage, data)
    return weights, {**row, "value": figures["accuracy_pgd20"], **figures}


def complete(rows: list[dict[str, Any]], seed: int, data: Dataset, file: Path, shorter: float) -> None:
    """Train and measure what ``rows`` lack of a seed, from one warm start, and write them to ``file`` as they come."""
    warm = override(stages(DIGITS)[0], [f"seed={seed}"])
    warm = replace(warm, epochs=shorter * warm.epochs)
    with tempfile.TemporaryDirectory() as folder:
        init, about = run(WARM, warm, data, Path(folder) / "warm", None)
        for name, stage in runs().items():
            stage = replace(stage, seed=seed, epochs=shorter * stage.epochs)
            configuration = json.loads(json.dumps(describe(stage)))
            if any(row["name"] == name and row["configuration"] == configuration for row in rows):
                continue
            _, row = run(name, stage, data, Path(folder) / f"{len(rows)}", init)
            rows.append(row)
            write_json(file, rows)
            print(f"seed {seed}, {name}: clean {row['accuracy_clean']:.3f}, PGD-20 {row['value']:.3f}, {row['seconds']:.0f} s", flush=True)
    rows.append(about)  # the last row of a seed: it is complete
    write_json(file, rows)


def difference(rows: list[dict[str, Any]], control: list[dict[str, Any]], what: str) -> tuple[float, float, float]:
    """Return the difference of two runs' per-image results, its 95 % half-width over images, and its sd over seeds.

    Runs are paired by seed, results by image; an image's difference is the mean over seeds, since the seeds share the images.
    """
    each = np.array(
        [[int(a) - int(b) for a, b in zip(row[what], other[what], strict=True)] for row, other in zip(rows, control, strict=True)]
    )
    of_image = each.mean(axis=0)
    return float(of_image.mean()), float(1.96 * of_image.std() / of_image.size**0.5), float(each.mean(axis=1).std(ddof=1))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    found = {name: sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"]) for name in (WARM, *runs())}
    head = ["run", "clean", "minus control", "PGD-20", "minus control", "sd over seeds", "CPU seconds"]
    lines = []
    for name, each in found.items():
        cells = [name]
        for figure, what in (("accuracy_clean", "clean"), ("accuracy_pgd20", "robust")):
            values = [row[figure] for row in each]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")
            change, half, spread = difference(each, found[CONTROL], what)
            cells.append("" if name == CONTROL else f"{change:+.3f} [{change - half:+.3f}, {change + half:+.3f}]")
        seconds = np.mean([row["seconds"] for row in each])
        lines.append([*cells, "" if name == CONTROL else f"{spread:.3f}", f"{seconds:.0f}"])
    return pivot(head, lines)


def main() -> None:
    """Train the missing runs, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="train nothing: write the table of docs/methods.md")
    parser.add_argument("--shorter", type=float, default=1.0, help="multiplies all epochs, for a trial run")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else []
    if options.table:
        if not rows:
            parser.error(f"{options.json} holds no rows: measure them first, without --table")
        page = DOCS / "methods.md"
        page.write_text(placed(page.read_text(encoding="utf-8"), "cells", table(rows)), encoding="utf-8")
        return
    if options.shorter != 1 and options.json == RESULTS:
        parser.error(f"--shorter {options.shorter:g} trains other runs than those of {RESULTS.name}: name another file by --json")
    torch.set_num_threads(1)
    data = load("digits")
    for seed in SEEDS:
        if not any(row["name"] == WARM and row["seed"] == seed for row in rows):
            complete(rows, seed, data, options.json, options.shorter)


if __name__ == "__main__":
    main()
