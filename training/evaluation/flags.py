"""Flags: OOD scores with the clean values that calibrate them, the served one and others for comparison."""

from dataclasses import dataclass, replace

import numpy as np

from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.handling import handled, mixture
from ebjdat_serve.manifest import Calibration
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import SUM, alone
from ebjdat_serve.scores import BASELINE, DEFAULT, SCORES, ood_score
from training.evaluation.attacks import Predict
from training.evaluation.context import Context, unit
from training.evaluation.result_cache import Arrays, Task
from training.evaluation.rows import ALPHAS

TEST = 3
"""The seed by which test images are handled; the calibration split is by another."""


@dataclass(frozen=True)
class Flag:
    """A score with its clean calibration values: the served score, or another for comparison."""

    score: str
    weight: float
    clean: np.ndarray  # sorted
    column: int | None = None  # of the terms, where the score is one view alone

    def value(self, found: Arrays) -> Floats:
        """Return the score of each image; high is suspicious."""
        if self.column is not None:
            term: Floats = found["terms"][:, self.column].astype(np.float32)
            return term
        return found["gradient"] if self.score == "gradient_norm" else score_of(self.score, self.weight, found)

    def flags(self, found: Arrays, alpha: float) -> np.ndarray:
        """Return which images are suspicious."""
        detector = Detector(self.clean, alpha)
        return detector.suspicious(detector.p_value(self.value(found)))

    def threshold(self, alpha: float) -> float:
        """Return the largest score that is not flagged at ``alpha``."""
        n = len(self.clean)
        least = int(np.ceil(alpha * (n + 1) - 1 - 1e-9))  # number of clean scores that must reach it
        return float(self.clean[n - least]) if least > 0 else float("inf")


def score_of(score: str, weight: float, found: Arrays) -> Floats:
    """Return the served score, or a score of the logits, of each image, shape (N,), from what ``EvaluatedModel.look`` returned."""
    if score == SUM:
        total: Floats = found["terms"].sum(axis=1).astype(np.float32)
        return total
    return ood_score(score, weight, found["logits"])


def calibration_of(c: Context) -> Calibration | None:
    """Return the calibration of a calibrated bundle."""
    return c.bundle.calibration() if c.bundle is not None and "calibration.json" in c.bundle.manifest.files else None


def handled_share(c: Context) -> float:
    """Return the share of calibration images that was lightly handled before the served score was calibrated."""
    served = calibration_of(c)
    return served.handled if served else 0.0


def calibration_images(c: Context) -> tuple[Floats, Labels]:
    """Return the calibration split as the served score was calibrated on it."""
    return to_unit(mixture(c.data.calibration.image, 1 - handled_share(c))), unit(c.data.calibration)[1]


def images_alike(c: Context, n: int) -> tuple[Floats, Labels]:
    """Return the first n test images, handled as the calibration split was, so that both are exchangeable."""
    some = c.data.test.first(n)
    return to_unit(handled(some.image, TEST, 1 - handled_share(c))), some.label


def flags_of(c: Context) -> tuple[Flag, list[Flag]]:
    """Return the served flag, as calibrated in the bundle, and one for every score, from the calibration split.

    All are calibrated alike: on the split as the bundle's calibration handled it.
    """
    served = calibration_of(c)
    splits: list[tuple[Task, Floats, Labels]] = [(Predict(gradient=True), *calibration_images(c)), (Predict(), *unit(c.data.selection))]
    calibration, selection = c.ledger.run("calibration split", splits)
    every = [Flag(name, score.fit(selection["logits"]), np.empty(0)) for name, score in SCORES.items()]
    every.append(Flag("gradient_norm", 0.0, np.empty(0)))
    if served:
        views = [Flag(alone(name), 0.0, np.empty(0), column) for column, name in enumerate(served.views)]
        every = [Flag(SUM, 0.0, np.empty(0)), *views, *every]
    every = [replace(flag, clean=np.sort(flag.value(calibration)).astype(np.float64)) for flag in able(every, calibration)]
    if served:
        return Flag(SUM, 0.0, np.asarray(served.scores)), every
    return next(flag for flag in every if flag.score == DEFAULT), every


def with_baseline(flag: Flag, every: list[Flag]) -> list[Flag]:
    """Return the served flag and, if it is another, the one of max softmax."""
    return [flag, *(other for other in every if other.score == BASELINE and flag.score != BASELINE)]


def alphas(flag: Flag) -> list[float]:
    """Return the levels that are possible with this number of calibration scores; of a view alone only the first."""
    return [alpha for alpha in (ALPHAS if flag.column is None else ALPHAS[:1]) if alpha * (len(flag.clean) + 1) >= 1]


def able(every: list[Flag], found: Arrays) -> list[Flag]:
    """Return the flags that the set's arrays suffice for: AutoAttack's have no gradient."""
    return [flag for flag in every if flag.score != "gradient_norm" or "gradient" in found]
