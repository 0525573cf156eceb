"""What the HTTP process counts for /metrics: plain numbers, at some microseconds a request, written out when they are asked for."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ebjdat_serve.server.payloads import Predictions

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
TENTHS = tuple(i / 10 for i in range(1, 11))
KEPT = 20
"""Versions of a model whose counts are kept."""
Value = TypeVar("Value")


class Histogram:
    """Counts of values in buckets, whose ``bounds`` are inclusive upper ones, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass
class QueueTally:
    """What one queue did for one bundle."""

    queue: Histogram = field(default_factory=Histogram)  # seconds that a request waited
    compute: Histogram = field(default_factory=Histogram)  # seconds that a batch, or a job, took in its worker
    batch: Histogram = field(default_factory=lambda: Histogram(SIZES))


@dataclass
class Tally:
    """What was answered with one version of one model; ``labels`` are by class index."""

    version: str
    labels: Sequence[str]
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and code
    durations: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))  # by route
    answered: Counter[str] = field(default_factory=Counter)  # seconds of responses below 400, by route
    decode: Histogram = field(default_factory=Histogram)
    images: int = 0
    suspicious: int = 0
    p_value: Histogram = field(default_factory=lambda: Histogram(TENTHS))
    predicted: Counter[int] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)

    def predict(self, predictions: Predictions, decisions: Iterable[str | None]) -> None:
        """Count what was predicted of images."""
        self.images += len(predictions.suspicious)
        self.suspicious += int(np.count_nonzero(predictions.suspicious))
        for classes in predictions.top[:, 0].tolist():
            self.predicted[classes] += 1
        for p in predictions.p_value.tolist():
            if p == p:  # NaN without a calibration
                self.p_value.add(p)
        for decision in decisions:
            if decision:
                self.decisions[decision] += 1


class Newest(dict[str, Value]):
    """Values by what they are of, KEPT at most: the one that was used longest ago is dropped first."""

    def of(self, key: str, make: Callable[[], Value]) -> Value:
        """Return the value of ``key``, a new one where there is none."""
        value = self[key] = self.pop(key) if key in self else make()
        if len(self) > KEPT:
            del self[next(iter(self))]
        return value
