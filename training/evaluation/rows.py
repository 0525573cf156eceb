"""Constructors of rows (ebjdat_serve/rows.py defines the fields), and the threats of each data set."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ebjdat_serve.rows import Images, Row
from training.data.sources import balls
from training.evaluation.metrics import wilson
from training.methods.adversary import Threat

SEED = 0
ALPHAS = (0.05, 0.01)
BASELINE = "max_softmax"
"""The baseline score, which needs no energy (Hendrycks and Gimpel, arXiv 1610.02136), measured with the served one."""


@dataclass(frozen=True)
class Ball:
    """The threats of a data set: l-inf, its half, and l2; pixels of [0,1]."""

    linf: float
    l2: float

    def threats(self) -> tuple[Threat, Threat, Threat]:
        """Return l-inf eps, l-inf eps/2 and l2 eps."""
        return Threat("linf", self.linf), Threat("linf", self.linf / 2), Threat("l2", self.l2)


def ball_of(dataset: str) -> Ball:
    """Return the ball of a data set: 8/255 and l2 0.5, on eight-pixel digits 51/255 and 1."""
    return Ball(*balls(dataset))


def number(metric: str, value: float, n: int, images: Images, of: str, **more: Any) -> Row:
    """Return a row; ``more`` are further fields."""
    return Row(metric=metric, value=float(value), n=int(n), of=of, seed=SEED, **vars(images), **more)


def proportion(metric: str, successes: int, n: int, images: Images, of: str, **more: Any) -> Row:
    """Return the row of a proportion with Wilson's 95 % interval."""
    return number(metric, successes / n, n, images, of, interval=wilson(int(successes), n), interval_kind="wilson", **more)


def compared_with(dataset: str, split: str, n: int) -> dict[str, Any]:
    """Return the fields of the images compared with: n of a data set's split."""
    return {"against": dataset, "against_split": split, "against_n": n}


def estimate(metric: str, value: float, interval: tuple[float, float], n: int, images: Images, of: str, **more: Any) -> Row:
    """Return the row of a mean with its normal 95 % interval."""
    low, high = interval
    return number(metric, value, n, images, of, interval=(float(low), float(high)), interval_kind="normal", **more)


def with_finite_error(row: Row) -> Row:
    """Return a row without an interval or standard error that is not a number."""
    if row.interval is not None and not np.isfinite(row.interval).all():
        return replace(row, interval=None, interval_kind=None)
    return replace(row, stderr=None) if row.stderr is not None and not math.isfinite(row.stderr) else row
