#!/usr/bin/env python3
"""Calibrate a bundle (calibration.json, views.safetensors): `python training/calibrate.py BUNDLE`.

The views of the OOD score are fitted on training images; their ranks, and the temperature of p(y|x), are of the selection split; their
sum is calibrated on the calibration split. All is computed by the served engine on images decoded by the server's decoder. Ranks and
calibration are of a mixture: half of the images lightly handled, recompressed, resized or the like (docs/decisions/0025).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.calibrating import FITTED, FITTED_BYTES, REACHED, fit_temperature, fit_views, look, outputs, reached, record, view_names
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.contract import Input
from ebjdat_serve.editing import FORCED, check_editable, edit
from ebjdat_serve.engines import Engine, Floats, Outputs, Precision, load_engine
from ebjdat_serve.handling import UNTOUCHED, handled, mixture
from ebjdat_serve.pixels import Pixels, decode, encode_png, to_unit
from ebjdat_serve.reach import STEPS
from ebjdat_serve.views import DEFAULT_VIEWS, LEAST_FOR_FEATURES, VIEWS, Combination, statistics
from training.card import rewrite
from training.data.bundle_data import check_data, dataset_of
from training.data.datasets import Dataset
from training.evaluation.rows import SEED

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
    known = {row.precision: (*row.views, *row.left_out) for row in bundle.calibrations() if bundle.holds(row.of)}
    usual = view_names(bundle.manifest.capabilities)
    names = tuple(views or (known.get("fp32", usual) if precision != "fp32" else usual))
    clean = served(engine, data.selection.image)
    combination, out = fitted(engine, bundle, data, names, clean.logits)
    combination = combination.with_ranks_of(look(engine, combination, parts(handled(data.selection.image, 1))).raw)
    mixed, walks = mixture(data.calibration.image), "score" in bundle.functions and reach_steps > 0
    return record(
        bundle,
        precision,
        combination,
        look(engine, combination, parts(mixed)),
        reached(engine, parts(mixed[:REACHED], WALKING), reach_steps) if walks else np.empty(0, np.float32),
        dataset=f"{data.name} calibration split",
        handled=1 - UNTOUCHED,
        temperature=fit_temperature(clean.logits, data.selection.label),
        left_out=out,
        reach_steps=reach_steps,
    )


def fitted(engine: Engine, bundle: Bundle, data: Dataset, names: Sequence[str], selection: Floats) -> tuple[Combination, dict[str, str]]:
    """Return the views, fitted on training images but without ranks, and which of ``names`` are left out, and why.

    ``selection`` are the logits of the selection split.
    """
    most = min(FITTED, FITTED_BYTES // data.train.image[0].nbytes)
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(data.train))[:most])
    n, image = len(data.calibration), data.train.image[chosen]
    featured = n >= LEAST_FOR_FEATURES and any(VIEWS[name].needs_features for name in names if name in VIEWS)
    training = outputs(engine, parts(image) if featured else [data.train.image[:1]])
    lightly = np.concatenate([statistics(to_unit(part)) for part in parts(handled(image, 0, untouched=0.0))])
    return fit_views(names, training, lightly, selection, bundle=bundle, calibration_n=n)


def parts(image: Pixels, size: int = CHUNK) -> list[Pixels]:
    """Return images in chunks."""
    return [image[i : i + size] for i in range(0, len(image), size)]


def carded(bundle: Bundle) -> Bundle:
    """Return the bundle with its card, if it has one, written again, since it names the views of the flag."""
    return rewrite(bundle) if "README.md" in bundle.manifest.files else bundle


def served(engine: Engine, image: Pixels) -> Outputs:
    """Return what the engine says of uint8 images (N, H, W, 3), encoded as PNG and decoded by the server's decoder."""
    size = Input(*image.shape[1:3])
    return outputs(engine, parts(np.stack([decode(encode_png(one), size) for one in image])))


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
