"""Is the label within reach of a small change? Margin, walk and search; and the policy that sends images to review.

f(x) in R^K are logits, a the predicted class and b the runner-up at the image. The gradient of f_b - f_a is
score(x, b) - score(x, a), since score(x, y) = -dE(x, y)/dx and E(x, y) = -f(x)[y].

    margin        f_a(x) - f_b(x), free (margin consistency: Kim et al., arXiv 2406.18451)
    reach_score   f_b - f_a after a walk x <- clip(x + step_size sign d(f_b - f_a)/dx), not projected; it ranks
    search        PGD on f_k - f_a, k the likeliest other class, in the l-inf ball of ``radius``; it decides (CPR, arXiv 2305.01139)

None of them is a proof, and none is a defence against an attacker who knows it (docs/decisions/0027-reach.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.detection import p_value
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.errors import EbjdatError

Scores = NDArray[np.float64]
STEPS = 5
STEP_SIZE = 2 / 255
"""Of the walk, pixels of [0,1]."""
RADIUS = 2 / 255
"""Of the search, l-inf, pixels of [0,1]."""
STEP_OVER_RADIUS = 2.5
"""The search's steps together over its radius: enough to cross the ball and to turn."""


class Differentiable(Protocol):
    """The part of an engine that walk and search use."""

    def classify(self, image: Floats) -> tuple[Floats, ...]:
        """Return logits (N, K) first."""

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,)."""


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


def difference_gradient(engine: Differentiable, image: Floats, b: Labels, a: Labels) -> Floats:
    """Return d(f_b - f_a)/dx, shape (N, 3, H, W), from one call of 2N."""
    gradient, _ = engine.score(np.concatenate([image, image]), np.concatenate([b, a]))
    result: Floats = gradient[: len(image)] - gradient[len(image) :]
    return result


def reach_score(
    engine: Differentiable, image: Floats, steps: int = STEPS, step_size: float = STEP_SIZE, logits: Floats | None = None
) -> Floats:
    """Return f_b - f_a, nats, shape (N,), where ``steps`` sign steps towards the runner-up b end; high = within reach.

    The walk leaves any ball: where the runner-up soon overtakes, the image lay near the boundary or was pushed across it. ``logits``
    (N, K) of the image save a forward pass. Takes 2 x ``steps`` gradients.
    """
    if steps < 1 or not step_size > 0:
        raise EbjdatError(f"a walk takes 1 or more steps of a size above 0, not {steps} of {step_size:g}")
    a, b = two_likeliest(engine.classify(image)[0] if logits is None else logits)
    x = image
    for _ in range(steps):
        x = (x + np.float32(step_size) * np.sign(difference_gradient(engine, x, b, a))).clip(0.0, 1.0)
    end, index = engine.classify(x)[0], np.arange(len(x))
    result: Floats = end[index, b] - end[index, a]
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
        gradient = difference_gradient(engine, x, two_likeliest(f)[1], a[going])
        x = (x + np.float32(STEP_OVER_RADIUS * radius / steps) * np.sign(gradient)).clip(low[going], high[going])
        f = engine.classify(x)[0]
        same = f.argmax(axis=1) == a[going]
        stable[going[~same]] = False
        going, x, f = going[same], x[same], f[same]
    return stable


# Policy --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """A view whose p-value is at most its level."""

    view: str
    p_value: float
    level: float


@dataclass(frozen=True)
class Decision:
    """``review`` with the reasons, or ``accept`` without."""

    decision: Literal["accept", "review"]
    reasons: tuple[Reason, ...] = ()


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

    def decide(self, p_values: Mapping[str, float]) -> Decision:
        """Return the decision on one image, and its reasons, from its p-value of every view of the policy."""
        levels = self.levels.items()
        reasons = tuple(Reason(view, float(p_values[view]), level) for view, level in levels if p_values[view] <= level)
        return Decision("review" if reasons else "accept", reasons)


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
