"""Measures of scores and proportions that training and the wheel take; SciPy computes them (extra [calibrate], [import] or [train])."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom, binomtest, rankdata

Array = NDArray[np.floating]


def auroc(negative: Array, positive: Array) -> float:
    """Return P(score of a positive > score of a negative), ties counted half: the area under the ROC curve."""
    ranks = rankdata(np.concatenate([negative, positive]))
    n, m = len(negative), len(positive)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion."""
    interval = binomtest(successes, n).proportion_ci(level, "wilson")
    return float(interval.low), float(interval.high)


def flag_rate_interval(calibration_n: int, test_n: int, alpha: float, level: float = 0.99) -> tuple[float, float]:
    """Return the interval of the flag rate of ``test_n`` clean images, given ``calibration_n`` exchangeable energies.

    An image is flagged when c of the n calibration energies reach its own with (1 + c)/(n + 1) < alpha; the rate
    given the calibration set is then Beta(k, n + 1 - k), k = #{such c}, and the count Beta-binomial.
    """
    k = int(np.sum((1 + np.arange(calibration_n + 1)) / (calibration_n + 1) < alpha))
    if k == 0:
        return 0.0, 0.0  # no score is ever flagged
    spread = betabinom(test_n, k, calibration_n + 1 - k)
    low, high = spread.ppf((1 - level) / 2), spread.ppf((1 + level) / 2)
    return float(low / test_n), float(high / test_n)
