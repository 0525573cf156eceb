"""Has the traffic drifted? A sequential test of live p-values that accounts for the finite calibration set (docs/drift.md).

Given one calibration set of n images, p-values of clean traffic are not uniform: the mass of each bin of p-values is off by some
1/sqrt(n), for ever, so that a martingale which bets against uniform p-values ends in a false alarm. What is exact is Pólya's urn. If n
calibration and t live scores are exchangeable and none are equal, the rank of the next one among them is uniform, so it falls into bin k
with probability

    q_k = (m_k + N_k) / (n + 1 + t),

where m_k of the n + 1 ranks that a p-value can have, and N_k of the live p-values so far, are in the bin (the masses are Dirichlet(m),
and this is their predictive). A bet on alternative a multiplies its stake by f(k) = a_k / sum_j q_j a_j, whose mean under q is 1. One
that begins at time s with the stake w_s has w_s prod_{s <= r <= t} f(k_r), and so the sum over all s and alternatives, with stakes that
sum to 1,

    e_t = R_t + sum_{s <= t} (R_{s-1} - R_s) / A sum_a prod_{s <= r <= t} f_a(k_r),    R_t = 1 / (1 + log(1 + t / T)),

is a martingale that begins at 1 and is never negative: over the draw of the calibration set and of the traffic, P(e_t >= 1/level for some
t) <= level (Ville 1939), however long one looks. e_t is never below R_t, so clean traffic before a drift costs but log(1/R_t), and the
prior probability of its time: some log t. Nothing here needs torch, images or a server.
"""

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.001
"""Probability of a false alarm, ever, of one version of a model."""
EDGES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1.0)
"""Inclusive upper bounds of the bins of p-values."""
T = 100.0
"""Images in which a drift is expected as much as in all the time up to exp(1) times as many: half of the stakes are placed by 172."""
MOST = 1e250
"""Stakes are cut here, which only makes e smaller."""


def shifted(mean: float, spread: float = 1.0) -> Doubles:
    """Return the odds (K,) of each bin against uniform p-values, when scores have moved by ``mean`` sd and are ``spread`` times as wide.

    In normal scores: p = 1 - Phi(z), z ~ N(mean, spread^2).
    """
    unit, live = NormalDist(), NormalDist(mean, spread)
    below = np.array([0.0, *(1 - live.cdf(unit.inv_cdf(1 - edge)) for edge in EDGES[:-1]), 1.0])
    odds: Doubles = np.maximum(np.diff(below) / np.diff([0.0, *EDGES]), 1e-6)
    return odds


def mixed(share: float) -> Doubles:
    """Return the odds (K,) of each bin when a ``share`` of the traffic has scores that are higher by 2.5 sd."""
    odds: Doubles = 1 - share + share * shifted(2.5)
    return odds


ALTERNATIVES: dict[str, Doubles] = {
    **{f"scores are higher by {by:g} sd": shifted(by) for by in (0.15, 0.3, 0.6, 1.2)},
    **{f"scores are lower by {by:g} sd": shifted(-by) for by in (0.15, 0.3, 0.6, 1.2)},
    "scores spread wider": shifted(0.0, 1.25),
    "scores lie closer together": shifted(0.0, 0.8),
    **{f"{share:.0%} of the images are unlike the data": mixed(share) for share in (0.03, 0.1, 0.3)},
}
"""What is bet on, in words, and the odds (K,) of each bin of p-values."""
ODDS = np.stack(list(ALTERNATIVES.values()), axis=1)  # (K, A)
NAMES = list(ALTERNATIVES)


def reserve(t: int) -> float:
    """Return R_t, the prior probability that a drift begins after the first ``t`` images."""
    return 1 / (1 + math.log1p(t / T))


class DriftTest:
    """e_t of one stream of p-values, or of several ``streams`` at a time, each with a calibration set of ``n``."""

    def __init__(self, n: int, streams: int = 0) -> None:
        ranks = np.arange(1, n + 2) / (n + 1)
        self.n, self.t = n, 0
        self.bin_of_rank: Ints = np.searchsorted(EDGES, np.append(0.0, ranks) - 1e-12)  # by p-value times n + 1; there is no 0
        shape = (streams,) if streams else ()
        self.counts = np.zeros((*shape, len(EDGES)), np.int64)
        self.stakes = np.zeros((*shape, len(NAMES)))
        self._each = (np.arange(streams),) if streams else ()
        self._urn = np.bincount(self.bin_of_rank[1:], minlength=len(EDGES))  # m_k
        self._mass = self._urn @ ODDS + np.zeros_like(self.stakes)  # (n + 1 + t) sum_k q_k a_k

    def bins(self, p: Sequence[float] | Doubles) -> Ints:
        """Return the bins of p-values, each a multiple of 1/(n + 1)."""
        found: Ints = self.bin_of_rank[np.rint(np.asarray(p) * (self.n + 1)).astype(np.int64)]
        return found

    def add(self, where: "int | Ints") -> None:
        """Take the bin of the next p-value of each stream."""
        odds, total = ODDS[where], self.n + 1 + self.t
        self.stakes += (reserve(self.t) - reserve(self.t + 1)) / len(NAMES)
        self.stakes *= odds * total / self._mass
        self._mass += odds
        self.counts[*self._each, where] += 1
        self.t += 1
        if self.t % 16 == 0:  # odds are below 60
            np.minimum(self.stakes, MOST, out=self.stakes)

    def add_p(self, p: float) -> float:
        """Take the next p-value, a multiple of 1/(n + 1), of the one stream; return the log e-value."""
        self.add(int(self.bins([p])[0]))
        return float(self.log_e)

    @property
    def log_e(self) -> Doubles:
        """The log e-value of each stream, nats."""
        found: Doubles = np.log(reserve(self.t) + self.stakes.sum(-1))
        return found

    @property
    def leading(self) -> str:
        """What the one stream's evidence speaks for most."""
        return NAMES[int(self.stakes.argmax())]

    def tenths(self) -> list[int]:
        """Return how many of the one stream's p-values are up to .1, .2 … 1."""
        found = np.zeros(10, np.int64)
        np.add.at(found, np.ceil(np.asarray(EDGES) * 10 - 1e-9).astype(np.int64) - 1, self.counts)
        return found.tolist()

    def restore(self, counts: Sequence[int], stakes: Sequence[float]) -> None:
        """Go on where a test of the same n was, of one stream; raise ValueError for what no test leaves."""
        found, bets = np.asarray(counts), np.asarray(stakes, np.float64)
        if found.shape != self.counts.shape or found.dtype != np.int64 or found.min() < 0 or found.max() > 2**40:
            raise ValueError(f"counts must be {len(EDGES)} integers from 0 on")
        if bets.shape != self.stakes.shape or not (np.isfinite(bets).all() and (bets >= 0).all()):
            raise ValueError(f"stakes must be {len(NAMES)} numbers from 0 on")
        self.counts, self.stakes, self.t = found, np.minimum(bets, MOST), int(found.sum())
        self._mass = (self._urn + found) @ ODDS


class Jumper:
    """The simple jumper martingale (Vovk et al., arXiv 2102.10439), which takes p-values for uniform: shown beside, not for alarms.

    The capital on each of the bets 1 + eps (p - 1/2), eps in -1, 0, 1, of which a share J is spread over all before each p-value.
    """

    J = 0.01
    EPS = np.array([-1.0, 0.0, 1.0])

    def __init__(self, streams: int = 0) -> None:
        shape = (streams,) if streams else ()
        self.capital, self.log_e = np.full((*shape, 3), 1 / 3), np.zeros(shape)

    def add(self, p: "float | Doubles") -> None:
        """Take the next p-value of each stream."""
        if isinstance(p, float):  # of one stream: plain numbers are five times as fast
            odds = (1.5 - p, 1.0, 0.5 + p)
            bets = [(share + self.J * (1 / 3 - share)) * factor for share, factor in zip(self.capital.tolist(), odds, strict=True)]
            total = sum(bets)
            self.capital[:] = [bet / total for bet in bets]
            self.log_e = self.log_e + math.log(total)
            return
        self.capital += self.J * (1 / 3 - self.capital)  # it sums to 1
        self.capital *= 1 + self.EPS * (p[..., None] - 0.5)
        sums = self.capital.sum(-1)
        self.capital /= sums[..., None]
        self.log_e = self.log_e + np.log(sums)


class Ranks:
    """Ranks of live scores among ``scores`` (n,), sorted ascending, in which equal scores are put in order at random.

    The order of equal calibration scores is drawn once: the urn is exact then, also where scores are few different numbers.
    """

    def __init__(self, scores: Sequence[float], seed: int = 0) -> None:
        self.scores, self._order = list(scores), np.random.default_rng(seed).random(len(scores)).tolist()

    def of(self, score: float) -> int:
        """Return 1 + the number of calibration scores above a score, 1 to n + 1."""
        low, high = bisect_left(self.scores, score), bisect_right(self.scores, score)
        above = len(self.scores) - high
        if low < high:
            mine = random.random()
            above += sum(one >= mine for one in self._order[low:high])
        return 1 + above


def share_interval(hits: int, n: int, level: float = 0.05) -> tuple[float, float]:
    """Return an interval of a rate, of ``hits`` among ``n`` so far, that holds it at all times together with probability 1 - ``level``.

    The rates p whose e-value, the mixture of likelihoods over Beta(1/2, 1/2) against that of p, is below 1/level (Robbins 1970).
    """
    if not n:
        return 0.0, 1.0

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    mixture = log_beta(hits + 0.5, n - hits + 0.5) - log_beta(0.5, 0.5)

    def outside(p: float) -> bool:
        likelihood = (hits * math.log(p) if hits else 0.0) + ((n - hits) * math.log1p(-p) if n > hits else 0.0)
        return mixture - likelihood >= -math.log(level)

    def bound(far: float) -> float:
        near = hits / n
        for _ in range(50):
            middle = (near + far) / 2
            near, far = (near, middle) if outside(middle) else (middle, far)
        return far

    return (bound(0.0) if hits else 0.0), (bound(1.0) if hits < n else 1.0)
