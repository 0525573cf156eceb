"""What a bundle must pass before it is served.

Servers, at their start and at a refresh, and `publish`, `sign`, `rollback` and `verify` call ``verified``: none accepts what another
refuses.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve import selftest
from ebjdat_serve.bundle import MANIFEST, Bundle, resolve
from ebjdat_serve.contract import Input
from ebjdat_serve.cpus import cpus
from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import Device, Engine, EngineKind, Floats, Outputs, Precision, load_engine
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.manifest import OF_IMAGES, YES, Calibration, RecordedCalibration
from ebjdat_serve.reach import Review
from ebjdat_serve.rows import Row, to_json
from ebjdat_serve.scored_by import chosen, scored_by
from ebjdat_serve.sgld import Chains, Prior
from ebjdat_serve.view_files import REACH, load_reviewed
from ebjdat_serve.views import Combination, Seen

SMALL = 64 * 64
"""Pixels of an image up to which decoding and HTTP take about as much of the CPUs as the network (docs/decisions/0033)."""
DEEPEST = 64
"""Levels of nesting in a bundle's JSON; pydantic writes 255."""
NOT_CALIBRATED = "the model is not calibrated: ebjdat-serve calibrate BUNDLE DIR does that with images like those it will see"


@dataclass(frozen=True)
class Terms:
    """How a bundle is to be served. ``trust``: public keys, 32 bytes each, one of which must have signed it; none: unsigned ones too."""

    engine: EngineKind = "auto"
    device: Device = "auto"
    precision: Precision = "fp32"
    alpha: float = 0.05
    threads: int | None = 1  # None: as many as ``threads_for`` says
    trust: tuple[bytes, ...] = ()
    review_share: float | None = None  # of clean images; None: reach.REVIEW_SHARE, or the least that can be kept
    calibration: str = OF_IMAGES  # its name
    models: int = 1  # that share the CPUs

    def threads_for(self, size: Input) -> int:
        """Return the threads of a worker whose model takes images of ``size``: all CPUs' where its network is most of the work."""
        usual = cpus() if size.height * size.width > SMALL else cpus() // 2
        return self.threads or max(1, usual // self.models)


USUAL = Terms()
"""The terms of a server without options."""


@dataclass(frozen=True)
class Opened:
    """A bundle open in an engine: its prior, and the relative error of each output of the self-test."""

    engine: Engine
    prior: Prior | None  # where steps were asked for and the bundle has them
    errors: dict[str, float]


@dataclass(frozen=True)
class Calibrated:
    """What turns outputs into p-values and a decision."""

    calibration: Calibration
    combination: Combination
    detector: Detector
    review: Review
    check: Review | None  # with the walk's reach, where it can be served
    recorded: RecordedCalibration | None  # where ``calibration`` is of recorded scores
    scored_by: str


@dataclass(frozen=True)
class Verified:
    """A bundle that can be served; ``opened`` unless no functions were asked for."""

    bundle: Bundle
    calibrated: Calibrated | None  # None: the bundle has no calibration
    no_check: str  # why check=reach cannot be answered, "" where it can
    rows: list[Row]
    opened: Opened | None


def verified(path: Path, terms: Terms, functions: Sequence[str] = (), *, key: str = "") -> Verified:
    """Return the bundle at ``path``, a bundle or a store, after every check that serving it by ``terms`` needs.

    The engine is opened for ``functions`` (classify, score, step), as far as the bundle has them, self-tested and run once; without any,
    only the files are checked.
    ``key`` is the ``Bundle.served`` that the bundle must have. Raises BundleError; EbjdatError for an alpha that the calibration cannot
    serve; EngineError for an engine that cannot run here.
    """
    folder = resolve(path)
    try:
        return _verified(folder, terms, functions, key)
    except EbjdatError:
        raise
    except Exception as error:
        # whatever a strange bundle makes a library raise
        raise BundleError(f"{folder} cannot be opened: {type(error).__name__}: {error}") from error


def _verified(folder: Path, terms: Terms, functions: Sequence[str], key: str) -> Verified:
    signed = ""
    if terms.trust:
        from ebjdat_serve.signing import check_signature  # cryptography costs 100 ms and memory

        signed = check_signature(folder, terms.trust)
    bundle = Bundle.load(folder)
    if signed and bundle.key != signed:
        raise BundleError(f"{folder} was changed while it was read; publish the change as a new version")
    if key and bundle.served != key:
        raise BundleError(f"{folder} is not the bundle that was verified; publish a change as a new version")
    bundle.check_precision(terms.precision)
    rows = bundle.metrics()
    check_json(asdict(bundle.manifest), f"{folder / MANIFEST}")
    check_json(list(map(to_json, rows)), f"{folder}: metrics.json")
    if terms.calibration != OF_IMAGES and not bundle.calibrated:
        raise BundleError(f"{folder} has no calibration {terms.calibration[:40]!r}, nor one on images")
    calibrated, no_check = _calibrated(bundle, terms) if bundle.calibrated else (None, NOT_CALIBRATED)
    if (reason := bundle.manifest.capabilities.gradient) != YES:
        no_check = f"check=reach takes gradients, which the model does not have: {reason}"
    opened = _opened(bundle, calibrated.combination if calibrated else None, terms, functions) if functions else None
    return Verified(bundle, calibrated, no_check, rows, opened)


def _calibrated(bundle: Bundle, terms: Terms) -> tuple[Calibrated, str]:
    """Return the calibration of the served precision, and why check=reach cannot be answered, "" where it can."""
    calibration, file = bundle.calibration(terms.precision), bundle.path / "views.safetensors"
    check_json(calibration.dataset, f"{bundle.path}: calibration.json")
    combination = bundle.combination(terms.precision)
    for name, view in combination.views.items():
        if lacks := view.lacks(bundle.manifest.capabilities):
            raise BundleError(f"{file}: the view {name} needs what the model does not have ({lacks}): calibrate again")
    reviewed = load_reviewed(file, terms.precision, calibration.reviewed)
    if not np.array_equal(np.sort(reviewed["ood"]), np.asarray(calibration.scores, np.float32)):
        raise BundleError(f"{file}: {terms.precision}.reviewed.ood are not the scores of calibration.json: calibrate again")
    by = scored_by(bundle, terms.precision, combination)
    recorded = chosen(bundle, terms.calibration, terms.precision, by)
    if recorded:
        calibration = recorded.in_place_of(calibration)
        reviewed = recorded.reviewed(calibration.reviewed)
        check, no_check = None, f"the calibration {recorded.name} is of recorded scores, of which none is of the walk of check=reach"
    else:
        check, no_check = _check_of(file, terms, bundle, calibration, reviewed)
    detector, review = Detector(np.asarray(calibration.scores), terms.alpha), Review.of(reviewed, terms.review_share)
    return Calibrated(calibration, combination, detector, review, check, recorded, by), no_check


def _check_of(
    file: Path, terms: Terms, bundle: Bundle, calibration: Calibration, reviewed: dict[str, NDArray[Any]]
) -> tuple[Review | None, str]:
    """Return the policy with the walk's reach, calibrated on the first of the images, or None and why there is none."""
    if bundle.manifest.capabilities.gradient != YES:
        return None, "there is no gradient"
    if not calibration.reach_steps:
        return None, f"the walk of check=reach is not calibrated for {terms.precision} in this bundle (ebjdat-serve calibrate)"
    reach = load_reviewed(file, terms.precision, [REACH])
    first = {name: scores[: len(reach[REACH])] for name, scores in reviewed.items()}
    try:
        return Review.of({**first, **reach}, terms.review_share), ""
    except EbjdatError as error:
        return None, f"check=reach: {error}"


def _opened(bundle: Bundle, combination: Combination | None, terms: Terms, functions: Sequence[str]) -> Opened:
    """Open the engine, replay the self-test, and run what a worker runs: three blank images, one chain of the last class drawn."""
    m = bundle.manifest
    functions = [function for function in functions if function in bundle.functions]
    engine = load_engine(bundle, terms.engine, terms.device, terms.threads_for(m.input), terms.precision)
    errors = selftest.verify(bundle, engine, functions)
    blank = np.stack([np.full((3, m.input.height, m.input.width), level, np.float32) for level in (0.0, 0.5, 1.0)])
    seen = engine.classify(blank)
    found: list[NDArray[Any]] = [values for values in seen if values is not None]
    if combination:
        found.append(_scored(bundle, combination, blank, seen))
    prior = Prior.load(bundle.path / "prior.safetensors") if "step" in functions else None
    if prior:
        found.append(engine.advance(Chains.start(prior, m.sampler, prior.labels[-1:], seed=0), 1).image)
    if not all(np.isfinite(values).all() for values in found):
        raise BundleError(f"{bundle.path}: a blank image or a first step gives values that are not finite")
    return Opened(engine, prior, errors)


def _scored(bundle: Bundle, combination: Combination, image: Floats, seen: Outputs) -> Floats:
    """Return each view's score (N, V) of images; raise BundleError for views of which no image, or no image alone, has a score."""
    alone = Seen(image[:1], None if seen.features is None else seen.features[:1], seen.logits[:1])
    raw, first = combination.raw(Seen(image, seen.features, seen.logits)), combination.raw(alone)
    views = len(combination.stored)
    if (raw.shape, first.shape) != ((len(image), views), (1, views)):
        raise BundleError(f"{bundle.path}: views.safetensors holds arrays of wrong shapes, with which no image has a score")
    return raw


def check_json(data: Any, where: str, depth: int = 0) -> None:
    """Raise BundleError for text that JSON cannot carry in UTF-8 (a lone surrogate), and for nesting that no answer could hold."""
    if depth > DEEPEST:
        raise BundleError(f"{where}: nested more than {DEEPEST} levels deep")
    if isinstance(data, str):
        try:
            data.encode()
        except UnicodeEncodeError as error:
            raise BundleError(f"{where}: {data[:40]!r} cannot be sent as JSON: it holds a lone surrogate, half of a character") from error
    elif isinstance(data, dict):
        for name, value in data.items():
            check_json(name, where, depth + 1)
            check_json(value, where, depth + 1)
    elif isinstance(data, list | tuple):
        for value in data:
            check_json(value, where, depth + 1)
