"""Views: scores of how unlike the data an image is, whose ranks add up to one OOD score. To add one, write a function, add it to ``VIEWS``.

A view is a function of what was stored when it was fitted and of what is ``Seen`` of images, to a score per image, higher = less like
the data. A score s becomes its upper-tail rank among clean images that the network was not trained on,

    term(s) = -log((1 + #{clean scores >= s}) / (n + 1)),    0 <= term <= log(n + 1), nats

which is finite however strange the image. The terms of the views are added, and the sum is one score, calibrated as one: p-values are
never combined. The correction by one is that of conformal p-values: a clean image's term exceeds t with probability exp(-t) at most.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.manifest import YES, Capabilities
from ebjdat_serve.scores import BASELINE, DEFAULT, SCORES, ood_score

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
"""What a fitted view stores, by name; float16 is widened to float32 when it is used."""

MOST_NEIGHBOURS = 11_000
"""Stored features of the view ``neighbours`` at most: with 128 features of two bytes 2.8 MB."""
NEIGHBOUR_SHARE = 50 / MOST_NEIGHBOURS
"""Which neighbour's distance counts, as a share of the stored features: the 50th of 11,000."""
LEAST_CHANGE = 1e-3
"""What is added to a statistic before its logarithm, in pixels of [0,1]: a quarter of a grey level, so that a flat image has one."""
RIDGE = 1e-4
"""What a Gaussian adds to each variance, as a share of their mean: a dimension in which no training image varies has a scale, too."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, eq=False)
class Seen:
    """What views look at: images (N, 3, H, W) in [0,1], their pooled features (N, F) if the model gives any, and logits (N, K)."""

    image: Floats
    features: Floats | None
    logits: Floats


@dataclass(frozen=True, eq=False)
class Known:
    """What views are fitted on: what is seen of training images and of the selection split; a fit needs the images of neither.

    ``handled`` are the statistics (M, 5) of training images, each as a recompression, a resize or the like left it: benign, though no
    clean image looks so. Fits decide what is powerful; what a p-value speaks of is decided by the images of the calibration alone.
    ``budget``: the most bytes that a view of features may store.
    """

    training: Seen
    handled: Floats
    selection: Seen
    budget: float = math.inf


@dataclass(frozen=True)
class View:
    """A score (N,) of stored arrays and images; its fit, if it has any; and its words, which tell what is unusual about an image."""

    score: Callable[[Arrays, Seen], Doubles]
    words: str
    fit: Callable[[Known], Arrays] = lambda known: {}
    needs_features: bool = False
    needs_energy: bool = False

    def lacks(self, can: Capabilities) -> str:
        """Return why a model of these capabilities does not have the view, "" if it does."""
        if self.needs_features and can.features != YES:
            return f"no features: {can.features}"
        return f"no energy: {can.energy}" if self.needs_energy and can.energy != YES else ""


def of_logits(name: str, words: str) -> View:
    """Return the view of a score of ebjdat_serve/scores.py, its weight fitted on the selection split."""

    def score(stored: Arrays, seen: Seen) -> Doubles:
        return ood_score(name, float(stored["weight"]), seen.logits).astype(np.float64)

    def fit(known: Known) -> Arrays:
        return {"weight": np.asarray(SCORES[name].fit(known.selection.logits), np.float64)}

    return View(score, words, fit, needs_energy=name != BASELINE)


def featured(seen: Seen) -> Floats:
    """Return the features (N, F); raise EbjdatError where the model gives none."""
    if seen.features is None:
        raise EbjdatError("a view of features needs a model that gives features: calibrate again")
    return seen.features


def fit_neighbours(known: Known) -> Arrays:
    """Return unit features (M, F) of the first training images, float16."""
    return {"unit": unit_rows(featured(known.training)[:MOST_NEIGHBOURS]).astype(np.float16)}


def neighbours(stored: Arrays, seen: Seen) -> Doubles:
    """Return 1 - cos(h, h_k) to the k-th nearest stored feature, shape (N,), k = 50 of 11,000 (Sun et al., arXiv 2204.06507)."""
    k = max(1, round(NEIGHBOUR_SHARE * len(stored["unit"])))
    cosine = unit_rows(featured(seen)) @ stored["unit"].T
    return 1.0 - np.partition(cosine, -k, axis=1)[:, -k].astype(np.float64)


def unit_rows(x: Floats) -> Floats:
    """Return the rows of ``x`` at length 1; a row of zeros stays."""
    result: Floats = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    return result


def gaussian(x: NDArray[Any]) -> Arrays:
    """Return the mean (F,) and the whitening (F, F) of a Gaussian of rows (N, F).

    Their covariance is S shrunk by F / (N + F) to its diagonal, and has ``RIDGE`` of its mean variance added.
    """
    n, f = x.shape
    x = x.astype(np.float64)
    mean = x.mean(axis=0)
    covariance = (x - mean).T @ (x - mean) / n
    shrunk = (n * covariance + f * np.diag(np.diag(covariance))) / (n + f)
    shrunk += (RIDGE * np.trace(covariance) / f + 1e-12) * np.eye(f)
    return {"mean": mean.astype(np.float32), "whitening": np.linalg.inv(np.linalg.cholesky(shrunk)).T.astype(np.float32)}


def distance(stored: Arrays, x: NDArray[Any]) -> Doubles:
    """Return the squared Mahalanobis distance of each row of (N, F) to a ``gaussian``, shape (N,)."""
    white = (x - stored["mean"]) @ stored["whitening"]
    result: Doubles = np.square(white, dtype=np.float64).sum(axis=1)
    return result


def fit_relative(known: Known) -> Arrays:
    """Return the Gaussian of all training features; and of each predicted class the mean, with the whitening of what is left.

    No labels are needed. A class that is predicted for none of the training images has no mean. Features of so many dimensions that this
    is beyond the budget are projected at random first.
    """
    x, predicted = featured(known.training), known.training.logits.argmax(axis=1)
    classes, index = np.unique(predicted, return_inverse=True)
    kept: dict[str, NDArray[Any]] = {}
    if (d := dimensions(x.shape[1], len(classes), known.budget)) < x.shape[1]:
        directions = np.random.default_rng(0).normal(size=(x.shape[1], d))
        kept["projection"] = np.linalg.qr(directions)[0].astype(np.float16)
        x = x @ kept["projection"].astype(np.float32)
    means = np.stack([x[predicted == y].mean(axis=0, dtype=np.float64) for y in classes])
    within = gaussian(x - means[index])["whitening"]
    return {**kept, **gaussian(x), "within": within, "white_means": (means @ within).astype(np.float32)}


def dimensions(features: int, classes: int, budget: float) -> int:
    """Return how many of ``features`` dimensions ``fit_relative`` can keep within ``budget`` bytes, 0 if none."""

    def cost(d: int) -> int:
        return 4 * d * (1 + 2 * d + classes) + (2 * features * d if d < features else 0)

    return features if cost(features) <= budget else max((d for d in range(features) if cost(d) <= budget), default=0)


def relative(stored: Arrays, seen: Seen) -> Doubles:
    """Return the squared Mahalanobis distance to the nearest class less that to all training images (Ren et al., arXiv 2106.09022)."""
    x = featured(seen) @ stored["projection"] if "projection" in stored else featured(seen)
    white = (x @ stored["within"]).astype(np.float64)
    means = stored["white_means"].astype(np.float64)
    squared = np.square(white).sum(axis=1)[:, None] - 2 * white @ means.T + np.square(means).sum(axis=1)
    result: Doubles = squared.min(axis=1) - distance(stored, x)
    return result


def statistics(image: Floats) -> Floats:
    """Return five statistics of each image (N, 3, H, W), H and W at least 3, shape (N, 5).

    Logarithms of the total variation, of the mean standard deviation of a channel and of the standard deviation of the luminance's
    Laplacian; the brightness; and the entropy of the luminance's horizontal differences in grey levels, bits. None looks at colour:
    saturation would flag grey images. (The size of the differences after zlib says the same, and depends on which zlib it is.)
    """
    n = len(image)
    luma = np.einsum("nchw,c->nhw", image, LUMA)
    down, across = image[:, :, 1:] - image[:, :, :-1], image[..., 1:] - image[..., :-1]
    variation = np.abs(down).reshape(n, -1).mean(axis=1) + np.abs(across).reshape(n, -1).mean(axis=1)
    channels = image.reshape(n, 3, -1)
    contrast = channels.std(axis=2).mean(axis=1)
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * luma[:, 1:-1, 1:-1]
    grey = np.rint(255 * luma).astype(np.uint8)
    differences = grey[:, :, 1:] - grey[:, :, :-1]  # modulo 256
    entropy = entropies(differences.reshape(n, -1))
    change = np.log(LEAST_CHANGE + np.array([variation, contrast, laplacian.reshape(n, -1).std(axis=1)]))
    return np.array([*change, channels.mean(axis=(1, 2)), entropy], np.float32).T


def entropies(levels: NDArray[np.uint8]) -> Doubles:
    """Return the entropy of the values in each row (N, M), bits, shape (N,)."""
    n, m = levels.shape
    count = np.bincount((levels + 256 * np.arange(n)[:, None]).ravel(), minlength=256 * n).reshape(n, 256)
    p = count / m
    result: Doubles = -(p * np.log2(np.where(count > 0, p, 1.0))).sum(axis=1)
    return result


FAR = "how far its features lie from those of training images"
VIEWS = {
    "logits": of_logits(DEFAULT, "the energy and the entropy of its class"),
    "features": View(relative, FAR, fit_relative, needs_features=True),
    "statistics": View(
        lambda stored, seen: distance(stored, statistics(seen.image)),
        "its contrast, brightness, edges or texture",
        lambda known: gaussian(known.handled),
    ),
    "neighbours": View(neighbours, FAR, fit_neighbours, needs_features=True),
    "gaussian": View(
        lambda stored, seen: distance(stored, featured(seen)), FAR, lambda known: gaussian(featured(known.training)), needs_features=True
    ),
    **{name: of_logits(name, score.equation) for name, score in SCORES.items() if name != DEFAULT},
}
"""The views that can be fitted and served, by name; every score of the logits is one."""
DEFAULT_VIEWS = ("statistics", "logits", "features")
"""docs/decisions/0025 says why these; where several are as strange as can be, the first is named."""
LEAST_FOR_FEATURES, LEAST_DIMENSIONS = 500, 8
"""The fewest calibration images, and dimensions of features within the budget, with which views of features are used."""


def left_out(names: Sequence[str], calibration_n: int, d: int, views: Mapping[str, View] = VIEWS) -> dict[str, str]:
    """Return which of the named views are not used, and why: with so many calibration images, and ``d`` dimensions within the budget."""
    why = ""
    if calibration_n < LEAST_FOR_FEATURES:
        why = f"{calibration_n} calibration images; views of features need {LEAST_FOR_FEATURES}"
    elif d < LEAST_DIMENSIONS:
        why = f"a tenth of the weights' bytes holds {d} dimensions of features; {LEAST_DIMENSIONS} are the least"
    return {name: why for name in names if why and name in views and views[name].needs_features}


def rank_term(clean: NDArray[Any], score: NDArray[Any]) -> Doubles:
    """Return -log((1 + #{clean >= score}) / (n + 1)), nats, in [0, log(n + 1)], of scores (N,) and sorted clean scores (n,).

    A score that is not a number counts as above all.
    """
    n = len(clean)
    at_least = n - np.searchsorted(clean, score, side="left")
    result: Doubles = np.log((n + 1) / (1 + at_least))
    return result


@dataclass(frozen=True, eq=False)
class Combination:
    """Fitted views and the sorted scores (n,) of clean images by each: how an image's terms, their sum and its reason are found."""

    stored: Mapping[str, Arrays]
    clean: Mapping[str, Floats]
    views: Mapping[str, View]

    @cached_property
    def ready(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Return the stored arrays by view, float16 widened to float32 once."""
        return {
            name: {key: array.astype(np.float32) if array.dtype == np.float16 else array for key, array in arrays.items()}
            for name, arrays in self.stored.items()
        }

    @property
    def nbytes(self) -> int:
        """Return the bytes of all that is stored."""
        arrays = [array for stored in self.stored.values() for array in stored.values()]
        return sum(array.nbytes for array in [*arrays, *self.clean.values()])

    def raw(self, seen: Seen) -> Floats:
        """Return each view's score, shape (N, V)."""
        return np.stack([score_of(self.views[name], self.ready[name], seen) for name in self.stored], axis=1)

    def terms(self, seen: Seen) -> Doubles:
        """Return each view's term, shape (N, V), nats."""
        return self.ranked(self.raw(seen))

    def ranked(self, raw: Floats) -> Doubles:
        """Return the term of each score (N, V), nats."""
        return np.stack([rank_term(self.clean[name], column) for name, column in zip(self.stored, raw.T, strict=True)], axis=1)

    def score(self, terms: Doubles) -> Floats:
        """Return the OOD score: the sum of the terms, shape (N,), nats."""
        result: Floats = terms.sum(axis=1).astype(np.float32)
        return result

    def why(self, terms: Doubles) -> list[str]:
        """Return the name of the view with the largest term of each image; of equal ones the first."""
        names = list(self.stored)
        return [names[index] for index in terms.argmax(axis=1)]

    def with_ranks_of(self, raw: Floats) -> "Combination":
        """Return the same views with the ranks of clean images, whose scores (N, V) are given."""
        clean = {name: np.sort(column) for name, column in zip(self.stored, raw.T, strict=True)}
        return Combination(self.stored, clean, self.views)


def score_of(view: View, stored: Arrays, seen: Seen) -> Floats:
    """Return a view's score of each image, shape (N,), as it is kept and compared."""
    return view.score(stored, seen).astype(np.float32)


def fit(names: Sequence[str], known: Known, views: Mapping[str, View] = VIEWS) -> Combination:
    """Return the named views, fitted, without ranks. Raises EbjdatError for an unknown view."""
    if unknown := [name for name in names if name not in views]:
        raise EbjdatError(f"view {', '.join(unknown)} is unknown; this version knows {', '.join(views)}: calibrate again")
    return Combination({name: views[name].fit(known) for name in names}, {}, {name: views[name] for name in names})
