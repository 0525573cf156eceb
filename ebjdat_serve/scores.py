"""OOD scores: functions of the logits, higher = less like the data. To add a score, write a function and add it to ``SCORES``.

Each works on NumPy arrays (serving, calibration) and torch tensors (attacks on the flag): ``xp`` is the array module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.errors import EbjdatError

Floats = NDArray[np.float32]


def energy(e: Any, log_p: Any, weight: float, xp: Any) -> Any:
    """Return E(x) = -logsumexp f(x), shape (N,), nats (Liu et al., arXiv 2010.03759)."""
    return e


def max_softmax(e: Any, log_p: Any, weight: float, xp: Any) -> Any:
    """Return -max_y log p(y|x), shape (N,), nats (Hendrycks and Gimpel, arXiv 1610.02136).

    It orders images as 1 - max p does, and has a gradient where p is near 1.
    """
    return -xp.amax(log_p, 1)


def energy_entropy(e: Any, log_p: Any, weight: float, xp: Any) -> Any:
    """Return E(x) + weight H(p(.|x)), shape (N,), nats; with weight 1 the expected joint energy sum_y p(y|x) E(x, y)."""
    return e + weight * -(xp.exp(log_p) * log_p).sum(1)


def equal_spread(logits: Floats) -> float:
    """Return sd E(x) / sd H(p(.|x)) over clean images: the entropy's weight at which both parts of ``energy_entropy`` spread alike."""
    e = ood_score("energy", 0.0, logits)
    entropy = ood_score("energy_entropy", 1.0, logits) - e
    return float(e.std() / max(float(entropy.std()), 1e-6))


@dataclass(frozen=True)
class OodScore:
    """A score of E(x) (N,), log p(y|x) (N, K), a weight and the array module; and the fit of its weight on clean logits, if any."""

    function: Callable[[Any, Any, float, Any], Any]
    equation: str
    """Its formula as text; {weight} is replaced."""
    fit: Callable[[Floats], float] = lambda logits: 0.0


SCORES = {
    "energy": OodScore(energy, "E(x)"),
    "max_softmax": OodScore(max_softmax, "-max log p(y|x)"),
    "energy_entropy": OodScore(
        energy_entropy, "E(x) + {weight:.2f} H(p(.|x)), the energy and the entropy of the class at equal spread", equal_spread
    ),
}
"""The scores that can be calibrated and served, by name."""
DEFAULT = "energy_entropy"
"""The default score of ``suspicious``; docs/decisions/0012 says why it is not the energy alone."""
BASELINE = "max_softmax"
"""The baseline, which needs no energy, reported with every result of the served score."""


def uncalibrated(*, energy: bool) -> str:
    """Return the score of a model without a calibration: nothing of it was fitted, so it ranks images and has no threshold."""
    return "energy" if energy else BASELINE


def score_named(name: str) -> OodScore:
    """Return the score; raise EbjdatError for an unknown one."""
    if name not in SCORES:
        raise EbjdatError(f"score {name!r} is unknown; this version knows {', '.join(SCORES)}: calibrate again")
    return SCORES[name]


def ood_score(name: str, weight: float, logits: Floats) -> Floats:
    """Return the score of each image, shape (N,), nats, from logits (N, K). Raises EbjdatError for an unknown score."""
    score = score_named(name)
    f = logits.astype(np.float64)
    top = f.max(axis=1)
    e = -top - np.log(np.exp(f - top[:, None]).sum(axis=1))
    result: Floats = score.function(e, f + e[:, None], weight, np).astype(np.float32)
    return result
