"""From logits to an outlier score to a conformal p-value to a flag (split conformal; Vovk et al. 2005, Bates et al. arXiv 2104.08279)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.errors import EbjdatError

Floats = NDArray[np.float32]
SCORES = ("energy", "max_softmax", "energy_entropy")
"""What may be calibrated; high is suspicious in all of them."""


@dataclass(frozen=True)
class Detector:
    """p = (1 + #{clean calibration scores >= s(x)}) / (n + 1); suspicious when p < alpha.

    For any model, if calibration images are exchangeable with traffic, a clean image is flagged with probability at
    most alpha on average over calibration draws. Given one calibration set the rate is Beta-distributed around it. It
    bounds false alarms; it is no defence against an adaptive attacker.
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
        n = len(self.scores)
        at_least = n - np.searchsorted(self.scores, score.astype(np.float64), side="left")
        result: NDArray[np.float64] = (1 + at_least) / (n + 1)
        return result

    def suspicious(self, p_value: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which p-values are below alpha."""
        return p_value < self.alpha


def suspicion(score: str, weight: float, logits: Floats) -> Floats:
    """Return how little each image looks like the data, shape (N,), nats, from logits (N, K); high is suspicious.

        energy           E(x) = -logsumexp f(x)
        max_softmax      -max_y log p(y|x)
        energy_entropy   E(x) + weight H(p(.|x)); weight 1 is the expected joint energy sum_y p(y|x) E(x, y)

    Raises EbjdatError for an unknown score.
    """
    if score not in SCORES:
        raise EbjdatError(f"score {score!r} is unknown; this version knows {', '.join(SCORES)}: calibrate again")
    f = logits.astype(np.float64)
    top = f.max(axis=1)
    energy = -top - np.log(np.exp(f - top[:, None]).sum(axis=1))
    log_p = f + energy[:, None]
    entropy = -(np.exp(log_p) * log_p).sum(axis=1)
    result: Floats = {"energy": energy, "max_softmax": -log_p.max(axis=1), "energy_entropy": energy + weight * entropy}[score].astype(
        np.float32
    )
    return result


def probabilities(logits: Floats, temperature: float) -> Floats:
    """Return softmax(logits / temperature), shape (N, K): calibrated p(y|x). Energies keep temperature 1."""
    scaled = logits / np.float32(temperature)
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    result: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result
