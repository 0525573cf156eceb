"""Fit the views of the OOD score and calibrate their sum: from chunks of pixels to calibration.json and views.safetensors.

Three sets of images that have none in common: the views are fitted on the first, their ranks are of the second, and p-values, margins and
the walk of check=reach are of the third. training/calibrate.py calls this with the splits of a training set, ``ebjdat-serve calibrate``
with the images of a folder. Chunks are looked at one after the other: what is kept of an image are numbers, never its pixels.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ebjdat_serve.bundle import Bundle, recorded_file, write_json
from ebjdat_serve.engines import Engine, Floats, Labels, Outputs, Precision
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.install import install
from ebjdat_serve.manifest import YES, Calibration, Capabilities
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.reach import margin, reach_score
from ebjdat_serve.scored_by import scored_by
from ebjdat_serve.scores import BASELINE
from ebjdat_serve.view_files import REACH, load_reviewed, load_views, save_views
from ebjdat_serve.views import DEFAULT_VIEWS, VIEWS, Combination, Known, Seen, dimensions, fit, left_out

log = logging.getLogger("ebjdat_serve")
FITTED, FITTED_BYTES = 10_000, 2**28
"""Images that views are fitted on, at most, and the bytes of what is held of them: pixels in training, features here."""
REACHED = 1000
"""Calibration images that walk towards their runner-up, at most: each takes ten gradients."""


@dataclass(frozen=True)
class Looked:
    """What was seen of calibration images, in order; ``logits`` of the first ones that were asked for."""

    raw: Floats  # (N, V), each view's score
    margin: Floats  # (N,), nats
    energy: Floats  # (N,), nats; (0,) where the model has none
    logits: Floats  # (M, K)


def view_names(can: Capabilities) -> tuple[str, ...]:
    """Return the views to fit where nobody names others: without an energy, max softmax in place of the view of the logits."""
    return DEFAULT_VIEWS if can.energy == YES else tuple(BASELINE if name == "logits" else name for name in DEFAULT_VIEWS)


def fit_views(
    names: Sequence[str],
    training: Outputs,
    lightly: Floats,
    selection: Floats,
    *,
    bundle: Bundle,
    calibration_n: int,
) -> tuple[Combination, dict[str, str]]:
    """Return the views, fitted but without ranks, and which of ``names`` are left out, and why.

    ``training`` is what the engine says of the images to fit on, ``lightly`` the statistics (M, 5) of them, handled; ``selection`` are
    logits of images that the network was not trained on. A view of features may store a tenth of the weights' bytes.
    """
    can, classes = bundle.manifest.capabilities, len(bundle.manifest.labels)
    budget = bundle.manifest.files["weights.safetensors"].bytes / 10
    none = np.empty((0, 3, bundle.manifest.input.height, bundle.manifest.input.width), np.float32)
    width = 0 if training.features is None else training.features.shape[1]
    out = {name: lacks for name in names if name in VIEWS and (lacks := VIEWS[name].lacks(can))}
    able = [name for name in names if name not in out]
    out |= left_out(able, calibration_n, dimensions(width, classes, budget))
    seen = Seen(none, training.features, training.logits)
    known = Known(seen, lightly, Seen(none, np.empty((0, width), np.float32), selection), budget)
    return fit([name for name in names if name not in out], known), out


def look(engine: Engine, combination: Combination, chunks: Iterable[Pixels], keep: int = 0) -> Looked:
    """Return what views and policy take of uint8 images (N, H, W, 3) in chunks, and the logits of the first ``keep``."""
    raw: list[Floats] = []
    margins, energies, logits, kept = [], [], [], 0
    for chunk in chunks:
        unit = to_unit(chunk)
        found = classify_in_chunks(engine, unit)
        refuse_not_finite(found, sum(len(part) for part in raw))
        raw.append(combination.raw(Seen(unit, found.features, found.logits)))
        margins.append(margin(found.logits))
        energies.append(np.empty(0, np.float32) if found.energy is None else found.energy)
        logits.append(found.logits[: max(0, keep - kept)])
        kept += len(logits[-1])
    if not raw:
        raise EbjdatError("there are no images to calibrate on")
    return Looked(np.concatenate(raw), np.concatenate(margins), np.concatenate(energies), np.concatenate(logits))


def refuse_not_finite(found: Outputs, before: int) -> None:
    """Raise EbjdatError for the first image, after ``before`` others, whose outputs are not finite: no rank among them is one."""
    finite = np.logical_and.reduce([np.isfinite(part.reshape(len(part), -1)).all(axis=1) for part in found if part is not None])
    if not finite.all():
        place = before + int(np.argmin(finite)) + 1
        raise EbjdatError(f"the model's answer is not finite on one of the images, number {place} of its part at random: leave it out")


def outputs(engine: Engine, chunks: Iterable[Pixels]) -> Outputs:
    """Return what the engine says of uint8 images (N, H, W, 3) in chunks."""
    return Outputs.join([classify_in_chunks(engine, to_unit(chunk)) for chunk in chunks])


def reached(engine: Engine, chunks: Iterable[Pixels], steps: int) -> Floats:
    """Return the ``reach_score`` of uint8 images (N, H, W, 3) in chunks."""
    return np.concatenate([reach_score(engine, to_unit(chunk), steps) for chunk in chunks])


def record(
    bundle: Bundle,
    precision: Precision,
    combination: Combination,
    looked: Looked,
    walked: Floats,
    *,
    dataset: str,
    handled: float,
    temperature: float,
    left_out: dict[str, str],
    reach_steps: int,
) -> Bundle:
    """Write calibration.json and views.safetensors; other precisions are kept if they flag by the same views.

    ``walked`` (M,) are the reach scores of the first images, none if the walk is not calibrated.
    """
    reviewed = {"ood": combination.score(combination.ranked(looked.raw)), "margin": -looked.margin}
    calibration = Calibration(
        of=bundle.measured(precision),
        precision=precision,
        dataset=dataset,
        handled=handled,
        temperature=temperature,
        energies=sorted(float(value) for value in looked.energy),
        views=list(combination.stored),
        left_out=left_out,
        reviewed=list(reviewed),
        reach_steps=reach_steps if len(walked) else 0,
        scores=sorted(float(value) for value in reviewed["ood"]),
    )
    made_by = "ebjdat-serve quantize" if bundle.manifest.imported else "training/precision.py"
    kept = [row for row in bundle.calibrations() if bundle.holds(row.of) and row.precision != precision]
    others = [row for row in kept if row.views == calibration.views]
    if lost := sorted({row.precision for row in kept} - {row.precision for row in others}):
        log.warning("dropped calibrations by other views: %s; %s calibrates again", ", ".join(lost), made_by)
    for row in others:
        if precision == "fp32" and row.dataset != dataset:
            log.warning("%s stays calibrated on %s; %s calibrates it again", row.precision, row.dataset, made_by)
    file, walk = bundle.path / "views.safetensors", {REACH: walked} if len(walked) else {}
    save_views(
        file,
        {**{row.precision: load_views(file, row.precision, row.views) for row in others}, precision: combination},
        {**{row.precision: reviewed_of(file, row) for row in others}, precision: {**reviewed, **walk}},
    )
    write_json(bundle.path / "calibration.json", [asdict(row) for row in sorted([calibration, *others], key=lambda row: row.precision)])
    return without_stale(bundle.update("calibration.json", file.name), precision)


def without_stale(bundle: Bundle, precision: str) -> Bundle:
    """Return the bundle without calibrations by scores that were recorded in ``precision`` with other views or ranks than it has now."""
    by = scored_by(bundle, precision, bundle.combination(precision))
    stale = [name for name, row in bundle.recorded().items() if row.precision == precision and row.scored_by != by]
    if not stale:
        return bundle
    log.warning("dropped the calibrations by recorded scores %s: they were of other views or ranks", ", ".join(stale))
    return bundle.without(*map(recorded_file, stale))


def reviewed_of(file: Path, row: Calibration) -> dict[str, Floats]:
    """Return the scores that views.safetensors has of a calibration's images, and of the first of them that walked."""
    walked = load_reviewed(file, row.precision, [REACH]) if row.reach_steps else {}
    return {**load_reviewed(file, row.precision, row.reviewed), **walked}


def fit_temperature(logits: Floats, label: Labels) -> float:
    """Return the temperature in [0.05, 20] that minimises the negative log-likelihood of the labels (Guo et al., arXiv 1706.04599).

    Brent's method in log temperature: the likelihood is unimodal there. Raises EbjdatError without SciPy.
    """
    try:
        from scipy.optimize import minimize_scalar  # of the extra [calibrate]: a server does without
        from scipy.special import log_softmax
    except ImportError as error:
        raise EbjdatError(f"a temperature is fitted by SciPy, which is not installed: {install('calibrate')}") from error
    f, index = logits.astype(np.float64), np.arange(len(label))  # float32 noise of 1e-3 would hide the minimum

    def nll(log_temperature: float) -> float:
        return float(-log_softmax(f / np.exp(log_temperature), axis=1)[index, label].mean())

    return float(np.exp(minimize_scalar(nll, bounds=np.log([0.05, 20.0]), method="bounded", options={"xatol": 1e-6}).x))
