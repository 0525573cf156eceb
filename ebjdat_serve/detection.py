"""Conformal p-values of OOD scores, and the flag (split conformal; Vovk et al. 2005, Bates et al. arXiv 2104.08279)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.errors import EbjdatError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Detector:
    """p = (1 + #{clean calibration scores >= s(x)}) / (n + 1); suspicious when p < alpha.

    For any model, if calibration images are exchangeable with traffic, a clean image is flagged with probability at
    most alpha on average over calibration draws. Given one calibration set the rate is Beta-distributed around it. This
    bounds false alarms; it does not defend against an adaptive attacker.
    """

    scores: NDArray[np.float64]  # (n,), sorted ascending, nats
    alpha: float

    def __post_init__(self) -> None:
        n = len(self.scores)
        if not 1 / (n + 1) <= self.alpha < 1:
            raise EbjdatError(
                f"alpha = {self.alpha:g} cannot be served with {n} calibration images: choose 1/(n+1) = {1 / (n + 1):.3g} <= alpha < 1"
            )

    def p_value(self, score: Floats) -> NDArray[np.float64]:
        """Return the conformal p-value of each score, shape (N,), in [1/(n+1), 1]."""
        return p_value(self.scores, score)

    def suspicious(self, p_value: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which p-values are below alpha."""
        return p_value < self.alpha


def p_value(clean: NDArray[np.float64], score: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return (1 + #{clean >= score}) / (n + 1), shape (N,): the upper-tail conformal p-value among ``clean`` (n,), sorted ascending."""
    n = len(clean)
    at_least = n - np.searchsorted(clean, score.astype(np.float64), side="left")
    result: NDArray[np.float64] = (1 + at_least) / (n + 1)
    return result


@lru_cache
def flag_range(n: int, alpha: float) -> tuple[float, float, float]:
    """Return the share of clean images that is flagged, on average over sets of ``n`` calibration images, and by 95 of 100 such sets.

    The rate given one set is Beta(k, n + 1 - k), where k of the n + 1 p-values are below ``alpha``.
    """
    k = int(np.ceil(alpha * (n + 1) - 1e-9)) - 1
    if k < 1:
        return 0.0, 0.0, 0.0
    low, high = np.quantile(np.random.default_rng(0).beta(k, n + 1 - k, 200_000), [0.025, 0.975])
    return k / (n + 1), float(low), float(high)


def probabilities(logits: Floats, temperature: float) -> Floats:
    """Return softmax(logits / temperature), shape (N, K): calibrated p(y|x). Energies keep temperature 1."""
    scaled = logits / np.float32(temperature)
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    result: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result
