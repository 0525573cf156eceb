"""Numbers about arrays: AUROC, calibration error, Frechet distance, intervals. Nothing here knows a model."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.stats import betabinom, norm, rankdata

Array = NDArray[np.floating]


def auroc(negative: Array, positive: Array) -> float:
    """Return P(score of a positive > score of a negative), ties counted half: the area under the ROC curve."""
    ranks = rankdata(np.concatenate([negative, positive]))
    n, m = len(negative), len(positive)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def expected_calibration_error(probability: Array, label: NDArray[np.int64], bins: int = 15) -> float:
    """Return sum_b |b|/n |accuracy_b - confidence_b| over equal-width bins of the top probability (N, K)."""
    confidence, correct = probability.max(axis=1), probability.argmax(axis=1) == label
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(correct[index == b].mean() - confidence[index == b].mean()) * (index == b).mean() for b in range(bins) if (index == b).any()
    ]
    return float(sum(gaps))


def frechet_distance(a: Array, b: Array) -> float:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two feature sets (N, D) read as Gaussians."""
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)))


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion."""
    z = float(norm.ppf(0.5 + level / 2))
    p = successes / n
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return float((centre - half) / (1 + z**2 / n)), float((centre + half) / (1 + z**2 / n))


def flag_rate_interval(calibration_n: int, test_n: int, alpha: float, level: float = 0.99) -> tuple[float, float]:
    """Return where the flag rate of ``test_n`` clean images must lie, given ``calibration_n`` exchangeable energies.

    An image is flagged when c of the n calibration energies reach its own with (1 + c)/(n + 1) < alpha; the rate
    given the calibration set is then Beta(k, n + 1 - k), k = #{such c}, and the count Beta-binomial.
    """
    k = int(np.sum((1 + np.arange(calibration_n + 1)) / (calibration_n + 1) < alpha))
    spread = betabinom(test_n, k, calibration_n + 1 - k)
    low, high = spread.ppf((1 - level) / 2), spread.ppf((1 + level) / 2)
    return float(low / test_n), float(high / test_n)
