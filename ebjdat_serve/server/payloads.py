"""What requests to workers carry, and what workers return."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.counterfactual import LONGEST, STEP_COST, Norm
from ebjdat_serve.pixels import Pixels
from ebjdat_serve.reach import CHECK_COST
from ebjdat_serve.sgld import Sampler

TOP = 5
"""Classes that an answer names."""


@dataclass(frozen=True)
class Predictions:
    """What the model predicts of n images: arrays with n rows, NaN where it has no energy or no calibration."""

    probability: NDArray[np.float32]  # (n, K), calibrated p(y|x)
    joint_energy: NDArray[np.float32]  # (n, K), nats: -f(x)[y], also where a model without an energy gives log-probabilities for f
    energy: NDArray[np.float32]
    suspicion: NDArray[np.float32]
    p_value: NDArray[np.float64]
    suspicious: NDArray[np.bool_]  # no image is, without a calibration
    top: NDArray[np.int64]  # (n, TOP), classes, the likeliest first
    why: NDArray[np.int64]  # the view of the OOD score with the largest term, by its place in the calibration
    margin: NDArray[np.float32]  # nats
    margin_p_value: NDArray[np.float64]  # NaN where the calibration has no margins
    reasons: NDArray[np.bool_]  # (n, R), which of what the policy looks at sends the image to review

    def __getitem__(self, rows: slice) -> "Predictions":
        return Predictions(*(array[rows] for array in vars(self).values()))


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of all images of ``parts``, in order."""
    return Predictions(*(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class GenerateJob:
    """Draw ``n`` images of class ``label``; image i depends on ``seed`` + i. A preview every ``every`` steps; 0: none."""

    label: int
    n: int
    sampler: Sampler
    seed: int
    every: int = 0

    @property
    def work(self) -> int:
        """Chain-steps."""
        return self.n * self.sampler.steps


@dataclass(frozen=True)
class GeneratedImages:
    """The result of a GenerateJob: pixels (n, H, W, 3), and what the model predicts of exactly those."""

    image: Pixels
    predictions: Predictions


@dataclass(frozen=True)
class GeneratePreview:
    """The chains of a GenerateJob after ``step`` steps of the slowest: pixels (n, H, W, 3) and predictions."""

    step: int
    image: Pixels
    predictions: Predictions


@dataclass(frozen=True)
class ExplainJob:
    """Find the nearest image to ``image`` (1, H, W, 3) of class ``target``, None: the runner-up; a preview every ``every`` steps, 0: none.

    ``radius`` of the ball is in pixel units of [0,1], in ``norm``; ``least`` is the probability of the target that is asked for.
    """

    image: Pixels
    target: int | None
    norm: Norm
    radius: float
    least: float
    every: int = 0
    n: ClassVar[int] = 1

    @property
    def work(self) -> int:
        """Chain-steps at most."""
        return STEP_COST * LONGEST


@dataclass(frozen=True)
class CheckJob:
    """Tell whether the labels of images (n, H, W, 3) are within reach: a walk of ``steps``, and a search of as many within ``radius``."""

    image: Pixels
    radius: float
    steps: int
    every: ClassVar[int] = 0

    @property
    def n(self) -> int:
        """Images."""
        return len(self.image)

    @property
    def work(self) -> int:
        """Chain-steps."""
        return CHECK_COST * self.n * self.steps


@dataclass(frozen=True)
class Checked:
    """The result of a CheckJob, arrays with n rows."""

    predictions: Predictions
    reach: NDArray[np.float32]  # mean of f_runner-up - f_label along the walk, nats
    reach_p_value: NDArray[np.float64]
    stable: NDArray[np.bool_]  # the search found no other label
    reasons: NDArray[np.bool_]  # (n, R), which of ood, margin and reach send the image to review


@dataclass(frozen=True)
class Explanation:
    """A search so far, or at its end: input and counterfactual as pixels (2, H, W, 3), and what the model predicts of exactly those.

    ``path`` (steps, 4) has counterfactual.MEASURES of what each step tried, NaN where there was none.
    """

    step: int
    target: int
    valid: bool  # the counterfactual is of the target
    image: Pixels
    predictions: Predictions
    path: NDArray[np.float32]
