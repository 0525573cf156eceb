"""Distances between two sets of features: Frechet and kernel distances, precision and recall, nearest neighbours."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
BLOCK = 500


def frechet_distance(a: Array, b: Array) -> float:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two feature sets (N, D) read as Gaussians (arXiv 1706.08500).

    The trace of the root is sum_i sqrt(lambda_i) of S_a^(1/2) S_b S_a^(1/2), which is symmetric: no complex square root.
    """
    mean_a, mean_b = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    cov_a, cov_b = np.cov(a.astype(np.float64), rowvar=False), np.cov(b.astype(np.float64), rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(cov_a))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ np.atleast_2d(cov_b) @ root)
    trace = float(np.trace(np.atleast_2d(cov_a)) + np.trace(np.atleast_2d(cov_b)) - 2 * np.sqrt(inner.clip(0)).sum())
    return float(((mean_a - mean_b) ** 2).sum()) + trace


def frechet_infinity(fake: Array, real: Array, points: int = 8, seed: int = 0) -> tuple[float, float]:
    """Return the Frechet distance extrapolated to infinitely many fakes, and the standard error of the fit (arXiv 1911.07023).

    FD_n is linear in 1/n to first order: fits a line through FD of random subsets, from a quarter of the fakes to all, at 1/n = 0.
    """
    noise, sizes = np.random.default_rng(seed), np.linspace(len(fake) // 4, len(fake), points).astype(int)
    inverse = 1.0 / sizes
    values = np.asarray([frechet_distance(fake[noise.permutation(len(fake))[:n]], real) for n in sizes])
    coefficients, covariance = np.polyfit(inverse, values, 1, cov=True)
    return float(coefficients[1]), float(np.sqrt(covariance[1, 1]))


def kernel_distance(a: Array, b: Array, size: int = 1000) -> tuple[float, float, int]:
    """Return the unbiased squared MMD with k(x, y) = (x.y / D + 1)^3 (KID, arXiv 1801.01401), its standard error, and the number of blocks.

    The mean over disjoint blocks, whose deviation gives the error: at least five blocks from 250 images on.
    """
    n = min(len(a), len(b))
    size = min(size, max(n // 5, 50), n)
    found = [mmd(a[i : i + size], b[i : i + size]) for i in range(0, n - size + 1, size)]
    error = float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else float("nan")
    return float(np.mean(found)), error, len(found)


def mmd(a: Array, b: Array) -> float:
    """Return the unbiased squared maximum mean discrepancy of two equal-sized sets under the cubic kernel."""
    a, b, n = a.astype(np.float64), b.astype(np.float64), len(a)
    within, other, across = (((x @ y.T) / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    inside = (within.sum() - np.trace(within) + other.sum() - np.trace(other)) / (n * (n - 1))
    return float(inside - 2 * across.mean())


def precision_recall(fake: Array, real: Array, k: int = 3) -> tuple[float, float]:
    """Return the share of fakes inside the real manifold and of reals inside the fake one (Kynkaanniemi et al., arXiv 1904.06991).

    A manifold is the union of balls around its points that reach to the k-th neighbour.
    """
    return inside(fake, real, radius(real, k)), inside(real, fake, radius(fake, k))


def radius(points: Array, k: int) -> Array:
    """Return the distance of each point to its k-th neighbour."""
    parts = [np.sort(distances(points[i : i + BLOCK], points), axis=1)[:, k] for i in range(0, len(points), BLOCK)]
    return np.concatenate(parts)


def inside(query: Array, centre: Array, reach: Array) -> float:
    """Return the share of ``query`` within the radius of any centre."""
    parts = [(distances(query[i : i + BLOCK], centre) <= reach).any(axis=1) for i in range(0, len(query), BLOCK)]
    return float(np.concatenate(parts).mean())


def nearest(query: Array, known: Array) -> tuple[Array, NDArray[np.int64]]:
    """Return the distance of each query to its nearest known point, and its index."""
    parts = [distances(query[i : i + BLOCK], known) for i in range(0, len(query), BLOCK)]
    return np.concatenate([d.min(axis=1) for d in parts]), np.concatenate([d.argmin(axis=1) for d in parts])


def distances(a: Array, b: Array) -> Array:
    """Return Euclidean distances (N, M)."""
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    result: Array = np.sqrt(squared.clip(0))
    return result


def inception_score(probability: Array, splits: int = 10) -> tuple[float, float, int]:
    """Return exp E KL(p(y|x) || p(y)), its standard error and the number of splits (arXiv 1606.03498); p is any classifier's."""
    parts = np.array_split(probability.astype(np.float64), min(splits, max(1, len(probability) // 50)))
    scores = [np.exp((p * (np.log(p + 1e-16) - np.log(p.mean(axis=0) + 1e-16))).sum(axis=1).mean()) for p in parts]
    error = float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else float("nan")
    return float(np.mean(scores)), error, len(parts)
