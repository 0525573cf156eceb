"""Counterfactuals: the nearest image, within a ball, that the model takes for another class (DAT, arXiv 2510.13872).

    x <- Pi(x + eta g / ||g||),   g = df(x)[t]/dx - df(x)[r]/dx = score(x, t) - score(x, r),   r = argmax_{y != t} f(x)[y]

Pi projects onto the ball around the input, and onto [0,1]. DAT climbs f(x)[t] alone; less its strongest rival it is found more often, and
nearer (docs/decisions/0026). The ascent ends at the first image of class t; bisection on the way there from the input finds a nearer one.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.batch import Batch
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Differentiable, Floats, Labels

Norm = Literal["l2", "linf"]
NORMS: tuple[Norm, ...] = get_args(Norm)
RADIUS: dict[Norm, float] = {"l2": 4.0, "linf": 32 / 255}
"""The usual radius of the ball: DAT's in l2, and one of about the same share of counterfactuals found in l-inf."""
STEPS = 25
"""Steps of the ascent at most."""
BISECTIONS = 6
"""Bisections between the input and the first image of the target: the last two are 1/64 of that way apart."""
LONGEST = STEPS + BISECTIONS
STEP_COST = 2
"""Langevin steps that a step costs: two gradients and a forward pass in the ascent, a forward pass in a bisection."""
REACH = 2.5
"""Length of the whole ascent in radii: one in a straight line is at the ball's surface after two fifths of its steps."""
MARGIN = 0.01
"""Nats by which the target's logit must be the largest, so that batches of other sizes, which round otherwise, agree."""
LEVELS = np.float32(255)
MEASURES = ("probability of the target", "probability of the input's class", "l2", "linf")
TINY = np.float32(1e-30)
Mask = NDArray[np.bool_]
Number = TypeVar("Number", np.float32, np.bool_)


def length(delta: Floats, linf: Mask) -> Floats:
    """Return the norm (N,) of differences (N, 3, H, W) of images in [0,1]: l-inf where ``linf``, else l2."""
    flat = delta.reshape(len(delta), -1)
    result: Floats = np.where(linf, np.abs(flat).max(axis=1), np.linalg.norm(flat, axis=1)).astype(np.float32)
    return result


def steepest(slope: Floats, linf: Mask) -> Floats:
    """Return the direction (N, 3, H, W) of norm 1 in which each gradient climbs most: g / ||g||, in l-inf its sign; 0 of 0."""
    norm = length(slope, np.zeros(len(slope), np.bool_))
    unit = slope / np.maximum(_each(norm), TINY)
    return np.where(_each(linf), np.sign(slope), unit).astype(np.float32)


def project(delta: Floats, radius: Floats, linf: Mask) -> Floats:
    """Return the nearest (N, 3, H, W) to ``delta`` in the ball of ``radius`` (N,) around 0."""
    bound = _each(radius)
    shrunk = delta * np.minimum(1, bound / np.maximum(_each(length(delta, linf)), TINY))
    return np.where(_each(linf), delta.clip(-bound, bound), shrunk).astype(np.float32)


def in_levels(delta: Floats, radius: Floats, linf: Mask) -> Floats:
    """Return ``delta``, which is in the ball, in whole levels of 1/255 and in the ball: to the nearest, or if that is outside towards 0."""
    nearest: Floats = np.rint(delta * LEVELS) / LEVELS
    inner: Floats = np.trunc(delta * LEVELS) / LEVELS
    return np.where(_each(length(nearest, linf) <= radius), nearest, inner)


def _each(value: NDArray[Number]) -> NDArray[Number]:
    """Return values (N,) as (N, 1, 1, 1)."""
    return value[:, None, None, None]


@dataclass(frozen=True)
class Searches(Batch):
    """The complete state of N searches; ``best`` is in whole levels of 1/255, and so is what 8-bit pixels deliver."""

    origin: Floats  # (N, 3, H, W) in [0,1], in whole levels
    source: Labels  # (N,) class of the input
    target: Labels  # (N,)
    radius: Floats  # (N,) in pixel units of [0,1]
    linf: Mask  # (N,): the norm of the ball is l-inf, else l2
    least: Floats  # (N,) probability of the target that an image must have
    temperature: Floats  # (N,) of p(y|x)
    image: Floats  # (N, 3, H, W): x
    rival: Labels  # (N,) the strongest other class at x
    best: Floats  # (N, 3, H, W): the nearest image of the target so far; until there is one, x
    found: Mask  # (N,): there is one
    low: Floats  # (N,) share of the way from the input to x at which the target is not reached,
    high: Floats  # and at which it is
    step: Labels  # (N,) steps taken; LONGEST when it is over
    path: Floats  # (N, LONGEST + 1, 4): MEASURES of the image that each step tried; NaN where there was none

    moving: ClassVar[tuple[str, ...]] = ("image", "rival", "best", "found", "low", "high", "step", "path")

    @staticmethod
    def start(
        origin: Floats, logits: Floats, target: Labels, *, norm: Norm, radius: float, least: float = 0.0, temperature: float = 1.0
    ) -> "Searches":
        """Return searches from images (N, 3, H, W) in whole levels, of which the model says ``logits`` (N, K), before their first step."""
        n = len(target)
        every = [np.full(n, value, np.float32) for value in (radius, least, temperature)]
        s = Searches(
            origin=origin, source=logits.argmax(axis=1), target=target, radius=every[0], linf=np.full(n, norm == "linf"), least=every[1],
            temperature=every[2], image=origin.copy(), rival=rivals(logits, target), best=origin.copy(), found=np.zeros(n, np.bool_),
            low=np.zeros(n, np.float32), high=np.ones(n, np.float32), step=np.zeros(n, np.int64),
            path=np.full((n, LONGEST + 1, len(MEASURES)), np.nan, np.float32),
        )  # fmt: skip
        s.path[:, 0] = measures(s, origin, logits)
        there = s.reached(logits)
        return replace(s, found=there, step=np.where(there, LONGEST - 1, 0))  # every search has a step to take

    def reached(self, logits: Floats) -> Mask:
        """Return which images, of logits (N, K), are of the target: the largest by MARGIN, and of probability ``least`` or more."""
        lead = _of(logits, self.target) - _of(logits, rivals(logits, self.target))
        return (lead >= MARGIN) & (_of(probabilities(logits / self.temperature[:, None], 1.0), self.target) >= self.least)


def rivals(logits: Floats, target: Labels) -> Labels:
    """Return the strongest class (N,) but the target."""
    others = logits.copy()
    others[np.arange(len(target)), target] = -np.inf
    strongest: Labels = others.argmax(axis=1)
    return strongest


def _of(values: Floats, label: Labels) -> Floats:
    return values[np.arange(len(label)), label]


def advance(engine: Differentiable, searches: Searches, steps: int) -> Searches:
    """Return ``searches`` after ``steps`` steps each, those that are over as they were."""
    for _ in range(steps):
        going = np.flatnonzero(searches.step < LONGEST)
        if not len(going):
            break
        if len(going) == len(searches):
            searches = search_step(engine, searches)
        else:
            moved = search_step(engine, searches.rows(going))
            searches = searches.rows(np.arange(len(searches)))  # a copy: what was given does not change
            searches.put(going, moved)
    return searches


def search_step(engine: Differentiable, s: Searches) -> Searches:
    """Return searches that are not over after one step each: of the ascent until an image of the target is found, then a bisection."""
    image = s.image.copy()
    if len(climb := np.flatnonzero(~s.found)):
        image[climb] = ascend(engine, s.rows(climb))
    share = np.where(s.found, (s.low + s.high) / 2, 1).astype(np.float32)
    tried = np.rint((s.origin + in_levels(_each(share) * (image - s.origin), s.radius, s.linf)) * LEVELS) / LEVELS
    logits = engine.classify(tried)[0]
    there = s.reached(logits)
    step = s.step + 1
    path = s.path.copy()
    path[np.arange(len(s)), step] = measures(s, tried, logits)
    return replace(
        s,
        image=image,
        rival=rivals(logits, s.target),
        best=np.where(_each(there | ~s.found), tried, s.best),
        found=s.found | there,
        low=np.where(s.found & ~there, share, s.low),
        high=np.where(there, share, s.high),
        # bisections begin at STEPS, however early the ascent found one; an ascent that found none is over
        step=np.where(s.found, step, np.where(there, STEPS, np.where(step < STEPS, step, LONGEST))),
        path=path,
    )


def ascend(engine: Differentiable, s: Searches) -> Floats:
    """Return x <- Pi(x + eta g / ||g||), (N, 3, H, W)."""
    eta = s.radius * np.float32(REACH / STEPS)
    moved: Floats = s.image + _each(eta) * steepest(gradient(engine, s), s.linf)
    result: Floats = (s.origin + project(moved - s.origin, s.radius, s.linf)).clip(0, 1)
    return result


def gradient(engine: Differentiable, s: Searches) -> Floats:
    """Return df(x)[t]/dx - df(x)[r]/dx, (N, 3, H, W)."""
    return engine.score(s.image, s.target)[0] - engine.score(s.image, s.rival)[0]


def measures(s: Searches, image: Floats, logits: Floats) -> Floats:
    """Return what ``path`` keeps of images (N, 3, H, W), in the order of MEASURES."""
    probability, delta, linf = probabilities(logits / s.temperature[:, None], 1.0), image - s.origin, np.ones(len(s), np.bool_)
    return np.stack([_of(probability, s.target), _of(probability, s.source), length(delta, ~linf), length(delta, linf)], axis=1)


def counterfactuals(engine: Differentiable, origin: Floats, target: Labels | None = None, **how: Any) -> Searches:
    """Return finished searches from images (N, 3, H, W) in whole levels; without ``target``, (N,), for the runner-up of each."""
    logits = engine.classify(origin)[0]
    wanted = rivals(logits, logits.argmax(axis=1)) if target is None else target
    return advance(engine, Searches.start(origin, logits, wanted, **how), LONGEST)
