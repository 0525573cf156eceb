#!/usr/bin/env python3
"""Calibrate a bundle (calibration.json): `python training/calibrate.py BUNDLE`.

Clean energies and scores are computed by the served engine on images decoded by the server's decoder; the temperature of
p(y|x), and the weight of a score that has one, are fitted on the selection split.
"""

import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.editing import FORCED, check_editable, edit
from ebjdat_serve.engines import Engine, Floats, Precision, load_engine
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.manifest import Calibration
from ebjdat_serve.pixels import Pixels, decode, encode_png, to_unit
from ebjdat_serve.scores import DEFAULT, SCORES, ood_score, score_named
from training.card import rewrite
from training.data.bundle_data import check_data, dataset_of
from training.data.datasets import Dataset
from training.evaluation.metrics import fit_temperature

log = logging.getLogger("training")


def calibrate(bundle: Bundle, data: Dataset, precision: Precision = "fp32", score: str | None = None) -> Bundle:
    """Record the calibration split's energies and scores and the temperature in ``precision``; other precisions are kept.

    Without a ``score`` fp32's is used, so that every precision flags by the same score; calibrations by another score are dropped.
    """
    check_data(bundle, data)
    engine = load_engine(bundle, "auto", "cpu", 1, precision)
    known = {row.precision: row.score for row in bundle.calibrations() if bundle.holds(row.of)}
    score = score or (known.get("fp32", DEFAULT) if precision != "fp32" else DEFAULT)
    clean, energies = served(engine, data.calibration.image)
    logits, _ = served(engine, data.selection.image)
    weight = score_named(score).fit(logits)
    calibration = Calibration(
        of=bundle.measured(precision),
        precision=precision,
        dataset=f"{data.name} calibration split",
        temperature=fit_temperature(logits, data.selection.label),
        energies=sorted(float(value) for value in energies),
        score=score,
        weight=weight,
        scores=sorted(float(value) for value in ood_score(score, weight, clean)),
    )
    kept = [row for row in bundle.calibrations() if row.precision != precision and bundle.holds(row.of)]
    others = [row for row in kept if row.score == score]
    if lost := sorted({row.precision for row in kept} - {row.precision for row in others}):
        log.warning("dropped calibrations by another score: %s; training/precision.py calibrates again", ", ".join(lost))
    write_json(bundle.path / "calibration.json", [asdict(row) for row in sorted([calibration, *others], key=lambda row: row.precision)])
    return bundle.update("calibration.json")


def carded(bundle: Bundle) -> Bundle:
    """Return the bundle with its card, if it has one, written again, since it names the score of the flag."""
    return rewrite(bundle) if "README.md" in bundle.manifest.files else bundle


def served(engine: Engine, image: Pixels) -> tuple[Floats, Floats]:
    """Return logits (N, K) and energy (N,) of uint8 images (N, H, W, 3), encoded as PNG and decoded by the server's decoder."""
    height, width = image.shape[1:3]
    decoded = np.stack([decode(encode_png(one), height, width) for one in image])
    logits, energy = (np.concatenate(part) for part in zip(*classify_in_chunks(engine, to_unit(decoded)), strict=True))
    return logits, energy


def main() -> None:
    """Calibrate the bundle named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", help="the folder that a bundle of a user's own data was trained on, when it has moved")
    parser.add_argument("--score", choices=SCORES, default=DEFAULT, help="score of the suspicious flag (%(default)s)")
    parser.add_argument("--force", action="store_true", help=FORCED)
    options = parser.parse_args()
    with command(parser):
        data = dataset_of(check_editable(options.bundle, force=options.force), options.data)
        done = edit(options.bundle, lambda draft: carded(calibrate(draft, data, score=options.score)), force=options.force)
        calibration = done.calibration()
        energies = calibration.energies
        score = f"score {calibration.score}, weight {calibration.weight:.3f}"
        print(f"{len(energies)} energies, median {np.median(energies):.3f} nats; temperature {calibration.temperature:.3f}; {score}")
        print(f"into {done.path / 'calibration.json'}")


if __name__ == "__main__":
    main()
