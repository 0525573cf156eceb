#!/usr/bin/env python3
"""Calibrate a bundle (calibration.json, views.safetensors): `python training/calibrate.py BUNDLE`.

The views of the OOD score are fitted on training images; their ranks, and the temperature of p(y|x), are of the selection split; their
sum is calibrated on the calibration split. All is computed by the served engine on images decoded by the server's decoder. Ranks and
calibration are of a mixture: half of the images lightly handled, recompressed, resized or the like (docs/decisions/0025).
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.contract import Input
from ebjdat_serve.editing import FORCED, check_editable, edit
from ebjdat_serve.engines import Engine, Floats, Outputs, Precision, load_engine
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.manifest import Calibration
from ebjdat_serve.pixels import Pixels, decode, encode_png, to_unit
from ebjdat_serve.reach import STEPS, margin, reach_score
from ebjdat_serve.view_files import REACH, load_reviewed, load_views, save_views
from ebjdat_serve.views import DEFAULT_VIEWS, VIEWS, Combination, Known, Seen, dimensions, fit, left_out, statistics
from training.card import rewrite
from training.data.bundle_data import check_data, dataset_of
from training.data.datasets import Dataset
from training.evaluation.metrics import fit_temperature
from training.evaluation.rows import SEED
from training.evaluation.shifts import UNTOUCHED, handled, mixture

log = logging.getLogger("training")
FITTED, FITTED_BYTES = 10_000, 2**28
"""Training images that views are fitted on, at most, and their bytes: large ones are fewer."""
REACHED = 1000
"""Calibration images that walk towards their runner-up, at most: each takes ten gradients."""
CHUNK, WALKING = 256, 32
"""Images that are looked at together, and that walk together: gradients take more memory."""


def calibrate(
    bundle: Bundle, data: Dataset, precision: Precision = "fp32", views: Sequence[str] | None = None, reach_steps: int = STEPS
) -> Bundle:
    """Record the views' fits, the sums on the calibration split and the temperature in ``precision``; other precisions are kept.

    The walk of ``reach_score`` takes ``reach_steps``; 0: it is not calibrated, nor where the bundle has no gradient.

    Without ``views`` fp32's are used, so that every precision flags by the same views; calibrations by other views are dropped.
    """
    check_data(bundle, data)
    engine = load_engine(bundle, "auto", "cpu", 1, precision)
    rows = [row for row in bundle.calibrations() if bundle.holds(row.of)]
    known = {row.precision: (*row.views, *row.left_out) for row in rows}
    names = tuple(views or (known.get("fp32", DEFAULT_VIEWS) if precision != "fp32" else DEFAULT_VIEWS))
    clean = served(engine, data.selection.image)
    combination, out = fitted(engine, data, names, clean.logits, bundle.manifest.files["weights.safetensors"].bytes / 10)
    combination = combination.with_ranks_of(looked(engine, combination, handled(data.selection.image, 1))[1])
    mixed = mixture(data.calibration.image)
    found, raw = looked(engine, combination, mixed)
    reviewed = {"ood": combination.score(combination.ranked(raw)), "margin": -margin(found.logits)}
    walked = {REACH: reached(engine, mixed[:REACHED], reach_steps)} if "score" in bundle.functions and reach_steps else {}
    calibration = Calibration(
        of=bundle.measured(precision),
        precision=precision,
        dataset=f"{data.name} calibration split",
        handled=1 - UNTOUCHED,
        temperature=fit_temperature(clean.logits, data.selection.label),
        energies=sorted(float(value) for value in found.energy),
        views=list(combination.stored),
        left_out=out,
        reviewed=list(reviewed),
        reach_steps=reach_steps if walked else 0,
        scores=sorted(float(value) for value in reviewed["ood"]),
    )
    kept = [row for row in rows if row.precision != precision]
    others = [row for row in kept if row.views == calibration.views]
    if lost := sorted({row.precision for row in kept} - {row.precision for row in others}):
        log.warning("dropped calibrations by other views: %s; training/precision.py calibrates again", ", ".join(lost))
    file = bundle.path / "views.safetensors"
    save_views(
        file,
        {**{row.precision: load_views(file, row.precision, row.views) for row in others}, precision: combination},
        {**{row.precision: load_reviewed(file, row.precision, scored(row)) for row in others}, precision: {**reviewed, **walked}},
    )
    write_json(bundle.path / "calibration.json", [asdict(row) for row in sorted([calibration, *others], key=lambda row: row.precision)])
    return bundle.update("calibration.json", file.name)


def fitted(engine: Engine, data: Dataset, names: Sequence[str], selection: Floats, budget: float) -> tuple[Combination, dict[str, str]]:
    """Return the views, fitted but without ranks, and which of ``names`` are left out, and why.

    ``selection`` are the logits of the selection split, ``budget`` the bytes that a view of features may store.
    """
    most = min(FITTED, FITTED_BYTES // data.train.image[0].nbytes)
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(data.train))[:most])
    n, width = len(data.calibration), engine.classify(to_unit(data.train.image[:1])).features.shape[1]
    out = left_out(names, n, dimensions(width, len(data.names), budget))
    used = [name for name in names if name not in out]
    featured = any(VIEWS[name].needs_features for name in used if name in VIEWS)
    training = outputs(engine, data.train.image[chosen]) if featured else engine.classify(to_unit(data.train.image[:1]))
    lightly = [statistics(to_unit(part)) for part in parts(handled(data.train.image[chosen], 0, untouched=0.0))]
    none = np.empty((0, 3, *data.size), np.float32)
    seen = Seen(none, training.features, training.logits)
    known = Known(seen, np.concatenate(lightly), Seen(none, np.empty((0, width), np.float32), selection), budget)
    return fit(used, known), out


def looked(engine: Engine, combination: Combination, image: Pixels) -> tuple[Outputs, Floats]:
    """Return what the engine says of uint8 images (N, H, W, 3), and each view's scores (N, V)."""
    found, raw = [], []
    for part in parts(image):
        unit = to_unit(part)
        found.append(classify_in_chunks(engine, unit))
        raw.append(combination.raw(Seen(unit, found[-1].features, found[-1].logits)))
    return joined(found), np.concatenate(raw)


def outputs(engine: Engine, image: Pixels) -> Outputs:
    """Return what the engine says of uint8 images (N, H, W, 3)."""
    return joined([classify_in_chunks(engine, to_unit(part)) for part in parts(image)])


def reached(engine: Engine, image: Pixels, steps: int) -> Floats:
    """Return the ``reach_score`` of uint8 images (N, H, W, 3)."""
    return np.concatenate([reach_score(engine, to_unit(image[i : i + WALKING]), steps) for i in range(0, len(image), WALKING)])


def scored(row: Calibration) -> list[str]:
    """Return what views.safetensors has of a calibration's images."""
    return [*row.reviewed, *([REACH] if row.reach_steps else [])]


def joined(found: Sequence[Outputs]) -> Outputs:
    """Return the outputs of several chunks as one."""
    return Outputs(*map(np.concatenate, zip(*found, strict=True)))


def parts(image: Pixels) -> list[Pixels]:
    """Return images in chunks."""
    return [image[i : i + CHUNK] for i in range(0, len(image), CHUNK)]


def carded(bundle: Bundle) -> Bundle:
    """Return the bundle with its card, if it has one, written again, since it names the views of the flag."""
    return rewrite(bundle) if "README.md" in bundle.manifest.files else bundle


def served(engine: Engine, image: Pixels) -> Outputs:
    """Return what the engine says of uint8 images (N, H, W, 3), encoded as PNG and decoded by the server's decoder."""
    size = Input(*image.shape[1:3])
    return outputs(engine, np.stack([decode(encode_png(one), size) for one in image]))


def main() -> None:
    """Calibrate the bundle named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", help="the folder that a bundle of a user's own data was trained on, when it has moved")
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=DEFAULT_VIEWS, help="views of the OOD score (%(default)s)")
    parser.add_argument(
        "--reach-steps", type=int, default=STEPS, help="steps of the walk that tells the label's reach; 0: none (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help=FORCED)
    options = parser.parse_args()
    with command(parser):
        data = dataset_of(check_editable(options.bundle, force=options.force), options.data)
        done = edit(
            options.bundle,
            lambda draft: carded(calibrate(draft, data, views=options.views, reach_steps=options.reach_steps)),
            force=options.force,
        )
        calibration = done.calibration()
        energies = calibration.energies
        named = f"views {', '.join(calibration.views)}"
        print(f"{len(energies)} energies, median {np.median(energies):.3f} nats; temperature {calibration.temperature:.3f}; {named}")
        for name, why in calibration.left_out.items():
            print(f"without {name}: {why}")
        print(f"into {done.path / 'calibration.json'}")


if __name__ == "__main__":
    main()
