"""Metrics as functions of arrays: separation, calibration, intervals, paired tests."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, rankdata, wasserstein_distance

from ebjdat_serve.measures import Array as Array
from ebjdat_serve.measures import auroc as auroc
from ebjdat_serve.measures import flag_rate_interval as flag_rate_interval
from ebjdat_serve.measures import wilson as wilson


def auroc_stderr(negative: Array, positive: Array) -> float:
    """Return the standard error of the AUROC (DeLong, DeLong and Clarke-Pearson 1988).

    var = var_i P(neg_i < pos) / n + var_j P(pos_j > neg) / m, over each value's placement in the other set.
    """
    n, m = len(negative), len(positive)
    above, below = placements(negative, positive)
    return float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)) if min(n, m) > 1 else float("nan")


def placements(negative: Array, positive: Array) -> tuple[Array, Array]:
    """Return the share of negatives below each positive (m,), and of positives above each negative (n,), ties counted half."""
    n, m = len(negative), len(positive)
    ranks = rankdata(np.concatenate([negative, positive]))
    return (ranks[n:] - rankdata(positive)) / n, 1 - (ranks[:n] - rankdata(negative)) / m


def average_precision(negative: Array, positive: Array) -> float:
    """Return the area under the precision-recall curve as the mean precision at each positive, ties taken together (AUPR)."""
    value = np.concatenate([negative, positive])
    truth = np.concatenate([np.zeros(len(negative)), np.ones(len(positive))])
    order = np.argsort(-value, kind="stable")
    value, hits = value[order], np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(value)), len(value) - 1)  # where a tie ends
    precision, recall = hits[last] / (last + 1), hits[last] / len(positive)
    return float((precision * np.diff(recall, prepend=0.0)).sum())


def fpr_at_95(negative: Array, positive: Array) -> float:
    """Return the share of positives that pass as clean when 95 % of clean images do: FPR@95 with clean as the accepted class."""
    threshold = np.sort(negative)[int(np.ceil(0.95 * len(negative))) - 1]
    return float((positive <= threshold).mean())


def negative_log_likelihood(probability: Array, label: NDArray[np.int64]) -> Array:
    """Return -log p(y|x) of each image, nats, shape (N,)."""
    result: Array = -np.log(probability[np.arange(len(label)), label].astype(np.float64).clip(1e-12))
    return result


def brier(probability: Array, label: NDArray[np.int64]) -> Array:
    """Return sum_k (p_k - 1[k = y])^2 of each image, in [0, 2], shape (N,)."""
    result: Array = ((probability.astype(np.float64) - np.eye(probability.shape[1])[label]) ** 2).sum(axis=1)
    return result


def expected_calibration_error(probability: Array, label: NDArray[np.int64], bins: int = 15) -> float:
    """Return sum_b |b|/n |accuracy_b - confidence_b| over equal-width bins of the top probability (N, K)."""
    confidence, correct = probability.max(axis=1), probability.argmax(axis=1) == label
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(correct[index == b].mean() - confidence[index == b].mean()) * (index == b).mean() for b in range(bins) if (index == b).any()
    ]
    return float(sum(gaps))


def calibration_floor(probability: Array, bins: int = 15, draws: int = 100, seed: int = 0) -> float:
    """Return the mean ECE of a perfectly calibrated model with these confidences at this n: labels are drawn from p.

    ECE is biased upwards; only its excess over this floor is miscalibration.
    """
    noise, confidence = np.random.default_rng(seed), probability.max(axis=1).astype(np.float64)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    total = np.bincount(index, confidence, bins)
    gaps = [np.abs(np.bincount(index, noise.random(len(index)) < confidence, bins) - total).sum() for _ in range(draws)]
    return float(np.mean(gaps) / len(index))


def reliability(probability: Array, label: NDArray[np.int64], bins: int = 15) -> list[tuple[float, float, int]]:
    """Return (mean confidence, accuracy, n) of each non-empty bin: the reliability diagram."""
    confidence, correct = probability.max(axis=1), probability.argmax(axis=1) == label
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    found = [index == b for b in range(bins)]
    return [(float(confidence[here].mean()), float(correct[here].mean()), int(here.sum())) for here in found if here.any()]


def wasserstein(a: Array, b: Array) -> float:
    """Return the Wasserstein-1 distance of two samples, in their unit."""
    return float(wasserstein_distance(a, b))


def overlap(a: Array, b: Array) -> float:
    """Return the overlap coefficient sum_b min(a_b, b_b) of two samples' histograms, 1 alike and 0 apart, on sqrt(n) common bins.

    Two small samples of one distribution overlap by less than 1 by chance.
    """
    edges = np.histogram_bin_edges(np.concatenate([a, b]), max(4, int(min(len(a), len(b)) ** 0.5)))
    p, q = (np.histogram(values, edges)[0] / len(values) for values in (a, b))
    return float(np.minimum(p, q).sum())


def mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p-value that two models are right equally often on the same images (McNemar 1947)."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_interval(a: NDArray[np.bool_], b: NDArray[np.bool_], level: float = 0.95) -> tuple[float, float]:
    """Return the interval of mean(a) - mean(b) on the same images (Agresti and Min 2005: half an image added to each of the four cells)."""
    n, only_a, only_b = len(a) + 2, int((a & ~b).sum()) + 0.5, int((b & ~a).sum()) + 0.5
    difference = (only_a - only_b) / n
    half = float(norm.ppf(0.5 + level / 2)) * np.sqrt((only_a + only_b) / n - difference**2) / np.sqrt(n)
    return float(difference - half), float(difference + half)


def auroc_difference_stderr(negative_a: Array, positive_a: Array, negative_b: Array, positive_b: Array) -> float:
    """Return the standard error of AUROC_a - AUROC_b, two scores of the same images (DeLong, DeLong and Clarke-Pearson 1988)."""
    (above_a, below_a), (above_b, below_b) = placements(negative_a, positive_a), placements(negative_b, positive_b)
    n, m = len(negative_a), len(positive_a)
    return float(np.sqrt((above_a - above_b).var(ddof=1) / m + (below_a - below_b).var(ddof=1) / n)) if min(n, m) > 1 else float("nan")


def mean_interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Return the normal interval of a mean."""
    half = float(norm.ppf(0.5 + level / 2)) * float(values.std(ddof=1)) / np.sqrt(len(values)) if len(values) > 1 else float("inf")
    return float(values.mean() - half), float(values.mean() + half)
