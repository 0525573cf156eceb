"""What requests to workers carry, and what workers return."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.pixels import Pixels
from ebjdat_serve.sgld import Sampler

TOP = 5
"""Classes that an answer names."""


@dataclass(frozen=True)
class Predictions:
    """What the model predicts of n images: arrays with n rows."""

    probability: NDArray[np.float32]  # (n, K), calibrated p(y|x)
    joint_energy: NDArray[np.float32]  # (n, K), nats
    energy: NDArray[np.float32]
    suspicion: NDArray[np.float32]
    p_value: NDArray[np.float64]
    suspicious: NDArray[np.bool_]
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
