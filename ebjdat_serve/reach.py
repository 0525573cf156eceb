"""Is the label within reach of a small change? Margin, walk and search; and the policy that sends images to review.

f(x) in R^K are logits, a the predicted class and b the runner-up at the image. The gradient of f_b - f_a is
score(x, b) - score(x, a), since score(x, y) = -dE(x, y)/dx and E(x, y) = -f(x)[y].

    margin        f_a(x) - f_b(x), free (margin consistency, arXiv 2406.18451)
    reach_score   the mean of f_b - f_a along a walk x <- clip(x + step_size sign d(f_b - f_a)/dx), not projected; it ranks
    search        PGD on f_k - f_a, k the likeliest other class, in the l-inf ball of ``radius``; it decides (CPR, arXiv 2305.01139)

None of them is a proof, and none is a defence against an attacker who knows it (docs/decisions/0027-reach.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.batch import Batch
from ebjdat_serve.detection import p_value
from ebjdat_serve.engines import Differentiable, Floats, Labels
from ebjdat_serve.errors import EbjdatError

Scores = NDArray[np.float64]
STEPS = 5
STEP_SIZE = 2 / 255
"""Of the walk, pixels of [0,1]."""
RADIUS = 2 / 255
"""Of the search, l-inf, pixels of [0,1]."""
REVIEW_SHARE = 0.05
"""Share of clean images that goes to review where nobody says another."""
STEP_OVER_RADIUS = 2.5
"""The search's steps together over its radius: enough to cross the ball and to turn."""


def margin(logits: Floats) -> Floats:
    """Return the largest minus the second logit, shape (N,), nats, from logits (N, K)."""
    two = np.partition(logits, -2, axis=1)[:, -2:]
    result: Floats = two[:, 1] - two[:, 0]
    return result


def two_likeliest(logits: Floats) -> tuple[Labels, Labels]:
    """Return the predicted class and the runner-up, each (N,), the first of equal ones."""
    first = logits.argmax(axis=1)
    others = logits.copy()
    np.put_along_axis(others, first[:, None], -np.inf, axis=1)
    return first, others.argmax(axis=1)


def difference(engine: Differentiable, image: Floats, b: Labels, a: Labels) -> tuple[Floats, Floats]:
    """Return d(f_b - f_a)/dx, shape (N, 3, H, W), and f_b - f_a, nats, (N,), from one call of 2N."""
    n = len(image)
    gradient, energy = engine.score(np.concatenate([image, image]), np.concatenate([b, a]))
    return gradient[:n] - gradient[n:], energy[n:] - energy[:n]


def walk(engine: Differentiable, image: Floats, steps: int = STEPS, step_size: float = STEP_SIZE, logits: Floats | None = None) -> Floats:
    """Return f_b - f_a, nats, at the image and after each of ``steps`` sign steps towards the runner-up b, shape (N, steps + 1).

    ``logits`` (N, K) of the image save a forward pass. Takes 2 x ``steps`` gradients. Raises EbjdatError for no step.
    """
    if steps < 1 or not step_size > 0:
        raise EbjdatError(f"a walk takes 1 or more steps of a size above 0, not {steps} of {step_size:g}")
    a, b = two_likeliest(engine.classify(image)[0] if logits is None else logits)
    x, index, leads = image, np.arange(len(image)), []
    for _ in range(steps):
        gradient, lead = difference(engine, x, b, a)
        leads.append(lead)
        x = (x + np.float32(step_size) * np.sign(gradient)).clip(0.0, 1.0)
    end = engine.classify(x)[0]
    return np.stack([*leads, end[index, b] - end[index, a]], axis=1)


def reach_score(
    engine: Differentiable, image: Floats, steps: int = STEPS, step_size: float = STEP_SIZE, logits: Floats | None = None
) -> Floats:
    """Return the mean of f_b - f_a along the walk, nats, shape (N,); high = within reach. Arguments are those of ``walk``.

    The walk leaves any ball: where the runner-up soon overtakes, the image lay near the boundary or was pushed across it. Its first
    points tell small perturbations, its last ones large.
    """
    result: Floats = walk(engine, image, steps, step_size, logits).mean(axis=1)
    return result


def search(
    engine: Differentiable, image: Floats, radius: float = RADIUS, steps: int = STEPS, logits: Floats | None = None
) -> NDArray[np.bool_]:
    """Return stable, shape (N,): no iterate of PGD within l-inf ``radius``, pixels of [0,1], has another label. Not a proof.

    Each step ascends f_k - f_a, k the likeliest other class where it stands. An image whose label changed takes no further step;
    the others take 2 gradients and a forward pass a step.
    """
    if steps < 1 or not radius > 0:
        raise EbjdatError(f"a search takes 1 or more steps in a radius above 0, not {steps} in {radius:g}")
    f = engine.classify(image)[0] if logits is None else logits
    a = f.argmax(axis=1)
    low, high = (image - np.float32(radius)).clip(0.0, 1.0), (image + np.float32(radius)).clip(0.0, 1.0)
    stable, x, going = np.ones(len(image), bool), image, np.arange(len(image))
    for _ in range(steps):
        if not len(going):
            break
        gradient, _ = difference(engine, x, two_likeliest(f)[1], a[going])
        x = (x + np.float32(STEP_OVER_RADIUS * radius / steps) * np.sign(gradient)).clip(low[going], high[going])
        f = engine.classify(x)[0]
        same = f.argmax(axis=1) == a[going]
        stable[going[~same]] = False
        going, x, f = going[same], x[same], f[same]
    return stable


# Walk and search in steps --------------------------------------------------------------------------------------------

CHECK_COST = 4
"""Langevin steps that a step of a check costs: the gradients of two logits at the walk and at the search, and a forward pass of both."""


@dataclass(frozen=True)
class Checks(Batch):
    """The complete state of N checks: a walk and a search from the same image, of as many steps."""

    origin: Floats  # (N, 3, H, W) in [0,1]
    first: Labels  # (N,) predicted class
    second: Labels  # (N,) runner-up
    radius: Floats  # (N,) of the search
    size: Floats  # (N,) step size of the search
    image: Floats  # (N, 3, H, W): where the walk is
    searched: Floats  # (N, 3, H, W): where the search is
    rival: Labels  # (N,) the likeliest class there but the first
    passed: Floats  # (N,) sum of f_second - f_first, nats, where the walk has been, as score says it
    lead: Floats  # (N,) f_second - f_first where the walk is, as classify says it
    stable: NDArray[np.bool_]  # (N,) the search has found no other label
    step: Labels  # (N,)

    moving: ClassVar[tuple[str, ...]] = ("image", "searched", "rival", "passed", "lead", "stable", "step")

    @property
    def reach(self) -> Floats:
        """Return the mean of f_second - f_first along the walk so far, nats, (N,)."""
        return ((self.passed + self.lead) / (self.step + 1)).astype(np.float32)

    @staticmethod
    def start(image: Floats, logits: Floats, *, radius: float = RADIUS, steps: int = STEPS) -> "Checks":
        """Return checks of images (N, 3, H, W), of which the model says ``logits`` (N, K), before the first of ``steps`` steps."""
        n, (first, second) = len(image), two_likeliest(logits)
        each = [np.full(n, value, np.float32) for value in (radius, STEP_OVER_RADIUS * radius / steps)]
        return Checks(
            image, first, second, each[0], each[1], image.copy(), image.copy(), second.copy(), np.zeros(n, np.float32), -margin(logits),
            np.ones(n, bool), np.zeros(n, np.int64),
        )  # fmt: skip


def advance(engine: Differentiable, checks: Checks, steps: int) -> Checks:
    """Return ``checks`` after ``steps`` steps of each; the results are those of ``reach_score`` and ``search``."""
    for _ in range(steps):
        checks = check_step(engine, checks)
    return checks


def check_step(engine: Differentiable, c: Checks) -> Checks:
    """Return checks after one step of the walk and one of the search."""
    n, index = len(c), np.arange(len(c))
    here, rivals = np.concatenate([c.image, c.searched]), np.concatenate([c.second, c.rival])
    gradient, leads = difference(engine, here, rivals, np.concatenate([c.first, c.first]))
    sign = np.sign(gradient)
    walked = (c.image + np.float32(STEP_SIZE) * sign[:n]).clip(0.0, 1.0)
    radius, size = c.radius[:, None, None, None], c.size[:, None, None, None]
    searched = (c.searched + size * sign[n:]).clip((c.origin - radius).clip(0.0, 1.0), (c.origin + radius).clip(0.0, 1.0))
    logits = engine.classify(np.concatenate([walked, searched]))[0]
    ahead, there = logits[:n], logits[n:]
    others = there.copy()
    others[index, c.first] = -np.inf
    stable = c.stable & (there.argmax(axis=1) == c.first)
    return replace(
        c,
        image=walked,
        searched=searched,
        rival=others.argmax(axis=1),
        passed=c.passed + leads[:n],
        lead=ahead[index, c.second] - ahead[index, c.first],
        stable=stable,
        step=c.step + 1,
    )


# Policy --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """Review where any view's p-value is at most its level; the levels together send ``share`` of clean images to review.

    If calibration images are exchangeable with traffic, the expected share is cuts / (n + 1), the largest that is at most the one
    asked for, and the share given the calibration set is Beta(cuts, n + 1 - cuts), as for one score; with ties it is smaller.
    """

    levels: dict[str, float]
    cuts: int
    n: int

    @classmethod
    def calibrated(cls, clean: Mapping[str, Scores], share: float) -> "Policy":
        """Return the policy of a ``share``, from each view's scores (n,) of the same clean images in the same order, high = suspicious.

        Raises EbjdatError when the images are too few for the share, or differ in number.
        """
        counts = sorted({len(scores) for scores in clean.values()})
        if len(counts) != 1:
            raise EbjdatError(f"a policy takes the scores of the same images in each view, not of {', '.join(map(str, counts)) or 'none'}")
        (n,) = counts
        cuts = int(np.floor(share * (n + 1) + 1e-9))
        if not (len(clean) <= cuts <= n):
            least = len(clean) / (n + 1)
            raise EbjdatError(
                f"a review share of {share:g} cannot be kept with {n} calibration images and {len(clean)} views ({', '.join(clean)}): "
                f"choose {least:.3g} <= share < 1"
            )
        return cls(cut(clean, cuts), cuts, n)

    @property
    def expected(self) -> float:
        """Return the expected share of clean images sent to review."""
        return self.cuts / (self.n + 1)

    def review(self, p_values: Mapping[str, Scores]) -> NDArray[np.bool_]:
        """Return which images (N,) go to review, from the p-values (N,) of every view of the policy."""
        result: NDArray[np.bool_] = np.logical_or.reduce([p_values[view] <= level for view, level in self.levels.items()])
        return result


@dataclass(frozen=True)
class Review:
    """A policy, and the sorted clean scores (n,) of each view that it looks at, high = suspicious."""

    policy: Policy
    clean: dict[str, Scores]

    @classmethod
    def of(cls, clean: Mapping[str, NDArray[Any]], share: float | None) -> "Review":
        """Return the policy of a ``share``, by default the usual one or the least that so many images can keep; as ``calibrated``."""
        scores = {view: values.astype(np.float64) for view, values in clean.items()}
        least = len(scores) / (1 + min(map(len, scores.values()), default=0))
        policy = Policy.calibrated(scores, max(REVIEW_SHARE, least) if share is None else share)
        return cls(policy, {view: np.sort(values) for view, values in scores.items()})

    def look(self, scores: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Scores], NDArray[np.bool_]]:
        """Return the p-values (N,) of each view's scores (N,), and which views send which images to review, (N, V)."""
        found = {view: p_value(clean, scores[view]) for view, clean in self.clean.items()}
        return found, np.stack([found[view] <= self.policy.levels[view] for view in self.clean], axis=1)


def cut(clean: Mapping[str, Scores], cuts: int) -> dict[str, float]:
    """Return each view's level: the largest p-value of the region that ``cuts`` cuts take from the clean scores.

    The views take turns; each cut removes the image that scores highest in the view among those left. These are statistically
    equivalent blocks (Wald 1943; Tukey 1947): the region that k cuts remove has the probability Beta(k, n + 1 - k), however the
    views depend on each other, so nothing is lost to a union bound.
    """
    (n,) = {len(scores) for scores in clean.values()}
    left, threshold = np.ones(n, bool), dict.fromkeys(clean, np.inf)
    downwards = {view: iter(np.argsort(-scores, kind="stable")) for view, scores in clean.items()}
    for view in islice(cycle(clean), cuts):
        i = next(i for i in downwards[view] if left[i])
        left[i], threshold[view] = False, clean[view][i]
    # s > threshold, in terms of p = (1 + #{clean >= s}) / (n + 1); a tie with the threshold is not removed
    return {view: float(1 + np.sum(scores > threshold[view])) / (n + 1) for view, scores in clean.items()}


def p_values(clean: Mapping[str, Scores], scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """Return each view's upper-tail conformal p-values (N,) of ``scores`` among its clean ones."""
    return {view: p_value(np.sort(clean[view]), value) for view, value in scores.items()}
