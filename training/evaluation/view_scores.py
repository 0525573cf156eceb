"""Differentiable forms of the views (ebjdat_serve/views.py), of their ranks and of their sum, for attacks on the flag.

Two steps of the served score have no useful gradient and get one by a straight-through estimate (BPDA, arXiv 1802.00420): forward they
are exact, backward they are the derivative of a smooth stand-in. A term is a step function of a view's score, whose stand-in
interpolates -log of the upper tail between sorted clean scores; the entropy of grey differences is of a histogram, whose stand-in
spreads each difference over the grey levels beside it. All else is the same formula as the served one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebjdat_serve.scores import DEFAULT
from ebjdat_serve.views import LEAST_CHANGE, LUMA, NEIGHBOUR_SHARE, Combination
from training.evaluation.scores import ood_score_of

Stored = Mapping[str, Tensor]
APART = 0.1
"""Nats between two knots of a rank's stand-in at least: closer ones would make a gradient of the noise of single clean scores."""
SPREAD = 4
"""Grey levels over which the stand-in of the entropy spreads a difference, to either side."""
LEAST_VARIANCE = 1e-16
"""Below it a standard deviation has no gradient: that of a flat image is not finite."""


@dataclass(frozen=True, eq=False)
class SeenTensors:
    """What views look at: images (N, 3, H, W) in [0,1], their features (N, F) and logits (N, K)."""

    image: Tensor
    features: Tensor
    logits: Tensor


Form = Callable[[Stored, SeenTensors], Tensor]


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """Return ``exact``, with the gradient of ``smooth``."""
    return exact.detach() + smooth - smooth.detach()


# Views ---------------------------------------------------------------------------------------------------------------


def of_logits(name: str) -> Form:
    """Return the form of a score of the logits."""
    return lambda stored, seen: ood_score_of(name, float(stored["weight"]))(seen.logits.double()).to(seen.logits.dtype)


def distance(stored: Stored, x: Tensor) -> Tensor:
    """Return the squared Mahalanobis distance of each row (N, F) to a Gaussian, shape (N,)."""
    white: Tensor = (x - stored["mean"]) @ stored["whitening"]
    return white.square().sum(dim=1)


def relative(stored: Stored, seen: SeenTensors) -> Tensor:
    """Return the squared Mahalanobis distance to the nearest class less that to all training images, shape (N,)."""
    x = seen.features @ stored["projection"] if "projection" in stored else seen.features
    white: Tensor = (x @ stored["within"])[:, None] - stored["white_means"]
    return white.square().sum(dim=2).amin(dim=1) - distance(stored, x)


def neighbours(stored: Stored, seen: SeenTensors) -> Tensor:
    """Return 1 - cos(h, h_k) to the k-th nearest stored feature, shape (N,)."""
    k = max(1, round(NEIGHBOUR_SHARE * len(stored["unit"])))
    cosine: Tensor = seen.features / seen.features.norm(dim=1, keepdim=True).clamp_min(1e-12) @ stored["unit"].T
    return 1.0 - cosine.topk(k, dim=1).values[:, -1]


def statistics(image: Tensor) -> Tensor:
    """Return the five statistics (N, 5) of ``ebjdat_serve.views.statistics``."""
    luma = (image * image.new_tensor(LUMA)[:, None, None]).sum(dim=1)
    down, across = image[:, :, 1:] - image[:, :, :-1], image[..., 1:] - image[..., :-1]
    variation = down.abs().flatten(1).mean(dim=1) + across.abs().flatten(1).mean(dim=1)
    contrast = deviation(image.flatten(2)).mean(dim=1)
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * luma[:, 1:-1, 1:-1]
    change = torch.log(LEAST_CHANGE + torch.stack([variation, contrast, deviation(laplacian.flatten(1))], dim=1))
    brightness = image.flatten(1).mean(dim=1)
    grey = torch.round(255 * luma.detach())
    exact = entropy(histogram(grey[:, :, 1:] - grey[:, :, :-1], 1))
    smooth = entropy(histogram(255 * (luma[:, :, 1:] - luma[:, :, :-1]), SPREAD))
    return torch.cat([change, torch.stack([brightness, straight_through(exact, smooth)], dim=1)], dim=1)


def deviation(x: Tensor) -> Tensor:
    """Return the standard deviation over the last dimension, with a gradient of 0 where it is 0."""
    return x.var(dim=-1, unbiased=False).clamp_min(LEAST_VARIANCE).sqrt()


def histogram(difference: Tensor, spread: int) -> Tensor:
    """Return the share of differences in each of 256 levels, modulo 256, shape (N, 256).

    A difference counts by a triangle of half-width ``spread``: with 1 and whole numbers it is the plain histogram.
    """
    x = difference.flatten(1)
    below = torch.floor(x.detach())
    share = x.new_zeros(len(x), 256)
    for offset in range(1 - spread, spread + 1):
        level = below + offset
        weight = (1 - (x - level).abs() / spread).clamp_min(0) / spread
        share = share.scatter_add(1, level.long() % 256, weight)
    return share / x.shape[1]


def entropy(share: Tensor) -> Tensor:
    """Return the entropy of each row (N, M), bits, shape (N,)."""
    return -(share * torch.log2(torch.where(share > 0, share, 1.0))).sum(dim=1)


FORMS: dict[str, Form] = {
    "logits": of_logits(DEFAULT),
    "features": relative,
    "statistics": lambda stored, seen: distance(stored, statistics(seen.image)),
    "neighbours": neighbours,
    "gaussian": lambda stored, seen: distance(stored, seen.features),
    "energy": of_logits("energy"),
    "max_softmax": of_logits("max_softmax"),
}
"""The differentiable form of each view, by its name in ``VIEWS``; one without is attacked through the others, and by Square."""


def without_form(combination: Combination) -> list[str]:
    """Return the names of the views without a differentiable form."""
    return [name for name in combination.stored if name not in FORMS]


# Ranks and their sum -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rank:
    """The term of a view, from sorted clean scores; and its stand-in between knots (score, term), double, and beyond the last."""

    clean: Tensor
    score: Tensor
    term: Tensor
    slope: float

    def exact(self, score: Tensor) -> Tensor:
        """Return log((n + 1) / (1 + #{clean >= score})), shape (N,)."""
        n = len(self.clean)
        at_least = n - torch.searchsorted(self.clean, score.detach().float().contiguous(), side="left")
        return torch.log((n + 1) / (1.0 + at_least))

    def smooth(self, score: Tensor) -> Tensor:
        """Return the stand-in: linear between knots, 0 below the first; beyond the last it rises by the logarithm of the distance."""
        s = score.double()
        inside = s.clamp(self.score[0], self.score[-1])
        right = torch.searchsorted(self.score, inside.detach().contiguous()).clamp(1, len(self.score) - 1)
        left = right - 1
        rise = (self.term[right] - self.term[left]) / (self.score[right] - self.score[left])
        total = self.term[left] + rise * (inside - self.score[left]) + torch.log1p(self.slope * (s - self.score[-1]).clamp_min(0))
        return total.to(score.dtype)

    def __call__(self, score: Tensor) -> Tensor:
        return straight_through(self.exact(score), self.smooth(score))


def rank_of(clean: NDArray[np.float32], device: torch.device) -> Rank:
    """Return the rank among sorted clean scores (n,)."""
    n = len(clean)
    values, first = np.unique(clean.astype(np.float64), return_index=True)
    if len(values) == 1:
        values, first = np.array([values[0] - 1, values[0]]), np.zeros(2, np.int64)
    terms = np.log((n + 1) / (1 + n - first))  # of a score equal to the value
    kept = [0]
    for i in range(1, len(values)):
        if terms[i] - terms[kept[-1]] >= APART or i == len(values) - 1:
            kept.append(i)
    score, term = values[kept], terms[kept]
    middle = int(np.searchsorted(term[:-1], term[-1] / 2, side="right")) - 1
    slope = (term[-1] - term[middle]) / (score[-1] - score[middle]) or 1.0  # of the upper half
    arrays = [torch.from_numpy(x).to(device) for x in (clean, score, term)]
    return Rank(arrays[0], arrays[1], arrays[2], float(slope))


@dataclass(frozen=True, eq=False)
class SumOfViews:
    """The OOD score of a combination as a differentiable function of what is seen of images."""

    stored: Mapping[str, Stored]
    ranks: Mapping[str, Rank]

    def __call__(self, seen: SeenTensors) -> Tensor:
        """Return the sum of the terms, shape (N,), nats; a view without a differentiable form adds nothing."""
        total = seen.logits.new_zeros(len(seen.logits))
        for name, stored in self.stored.items():
            total = total + self.ranks[name](FORMS[name](stored, seen))
        return total


def sum_of_views(combination: Combination, device: torch.device) -> SumOfViews:
    """Return the sum of the views that have a differentiable form, on a device."""
    names = [name for name in combination.stored if name in FORMS]
    stored = {
        name: {key: torch.from_numpy(np.asarray(array, np.float32)).to(device) for key, array in combination.ready[name].items()}
        for name in names
    }
    return SumOfViews(stored, {name: rank_of(combination.clean[name], device) for name in names})
