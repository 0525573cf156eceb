"""The rows of metrics.json: one measurement each, with n, protocol, seed and the sha256 of what was measured."""

import re
from dataclasses import dataclass
from typing import Any

from training.data.sources import balls
from training.evaluation.metrics import wilson
from training.methods.adversary import Threat

SEED = 0
COMPARING = ("suspicion", "landscape")
"""Parts whose rows compare a set of images, n, with clean test images, which each row counts under ``clean``."""
ALPHAS = (0.05, 0.01)
Row = dict[str, Any]


@dataclass(frozen=True)
class Ball:
    """The threats of a data set that figures are quoted at: l-inf, its half, and l2; pixels of [0,1]."""

    linf: float
    l2: float

    def threats(self) -> tuple[Threat, Threat, Threat]:
        """Return l-inf eps, l-inf eps/2 and l2 eps."""
        return Threat("linf", self.linf), Threat("linf", self.linf / 2), Threat("l2", self.l2)


def ball_of(dataset: str) -> Ball:
    """Return the ball of a data set: 8/255 and l2 0.5, on eight-pixel digits 51/255 and 1."""
    return Ball(*balls(dataset))


def number(metric: str, value: float, n: int, dataset: str, protocol: str, of: str) -> Row:
    """Return one row of metrics.json."""
    return {"metric": metric, "value": float(value), "n": int(n), "dataset": dataset, "protocol": protocol, "seed": SEED, "of": of}


def proportion(metric: str, successes: int, n: int, dataset: str, protocol: str, of: str) -> Row:
    """Return one row of metrics.json with Wilson's 95 % interval: a target is met by its lower bound."""
    return {**number(metric, successes / n, n, dataset, protocol, of), "interval": list(wilson(int(successes), n))}


def estimate(metric: str, value: float, interval: tuple[float, float], n: int, dataset: str, protocol: str, of: str) -> Row:
    """Return one row of metrics.json with an interval of its own kind, which the protocol names."""
    return {**number(metric, value, n, dataset, protocol, of), "interval": [float(bound) for bound in interval]}


def eps_name(eps: float) -> str:
    """Return eps as the field writes it: 8/255."""
    units = eps * 255
    return f"{units:.0f}/255" if abs(units - round(units)) < 1e-6 else f"{eps:g}"


def threat_name(threat: Threat) -> str:
    """Return a threat in words: l-inf 8/255, l2 0.5."""
    return f"l-inf {eps_name(threat.eps)}" if threat.norm == "linf" else f"l2 {threat.eps:g}"


def outcome_free(row: Row) -> str:
    """Return a row's protocol without what it says of one model's own outcome."""
    return "" if row["metric"].startswith("check_") else re.sub(r"interval \[[^]]*\]|, 0\.\d{3} of all", "", row["protocol"])
