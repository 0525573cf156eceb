"""Views and sums that benchmarks/views.py compares: those of the package, and what was tried beside them."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ebjdat_serve.engines import Floats
from ebjdat_serve.scores import SCORES, ood_score
from ebjdat_serve.views import (
    DEFAULT_VIEWS,
    LUMA,
    VIEWS,
    Arrays,
    Doubles,
    Known,
    Seen,
    View,
    distance,
    featured,
    gaussian,
    of_logits,
    statistics,
)


@dataclass(frozen=True, eq=False)
class KnownMore(Known):
    """And the head's weight (K, F) and bias (K,), and the images that ``handled`` are the statistics of."""

    weight: Floats = field(kw_only=True)
    bias: Floats = field(kw_only=True)
    images: Floats = field(kw_only=True)


def more(known: Known) -> KnownMore:
    """Return what candidates are fitted on, as what it is."""
    assert isinstance(known, KnownMore)
    return known


def fit_vim(known: Known) -> Arrays:
    """Return ViM's origin, residual space and scale alpha: half of the dimensions are principal (arXiv 2203.10807)."""
    known = more(known)
    origin = -np.linalg.pinv(known.weight) @ known.bias
    centred = (featured(known.training) - origin).astype(np.float64)
    residual = np.linalg.eigh(centred.T @ centred)[1][:, : centred.shape[1] // 2]
    alpha = known.training.logits.max(axis=1).mean() / np.linalg.norm(centred @ residual, axis=1).mean()
    return {"origin": origin.astype(np.float32), "residual": (alpha * residual).astype(np.float32)}


def vim(stored: Arrays, seen: Seen) -> Doubles:
    """Return ViM's score: alpha times the norm of the residual, plus E(x)."""
    energy = ood_score("energy", 0.0, seen.logits)
    result: Doubles = np.linalg.norm((featured(seen) - stored["origin"]) @ stored["residual"], axis=1).astype(np.float64) + energy
    return result


def gen(stored: Arrays, seen: Seen) -> Doubles:
    """Return the generalised entropy sum_y p^g (1 - p)^g, g = .1 (Liu et al., CVPR 2023)."""
    f = seen.logits.astype(np.float64)
    p = np.exp(f - np.logaddexp.reduce(f, axis=1, keepdims=True)).clip(1e-12, 1 - 1e-12)
    result: Doubles = ((p * (1 - p)) ** 0.1).sum(axis=1)
    return result


def fit_react(known: Known) -> Arrays:
    """Return the head, and the 90th percentile of all training features (Sun et al., arXiv 2111.12797)."""
    known = more(known)
    return {"most": np.quantile(featured(known.training), 0.9), "weight": known.weight, "bias": known.bias}  # type: ignore[dict-item]


def react(stored: Arrays, seen: Seen) -> Doubles:
    """Return the energy of the head on features clipped above."""
    clipped = np.minimum(featured(seen), stored["most"]) @ stored["weight"].T + stored["bias"]
    return ood_score("energy", 0.0, clipped.astype(np.float32)).astype(np.float64)


def fit_two_sided(known: Known) -> Arrays:
    """Return the median of the selection split's energies and their mean distance to it on either side."""
    energy = ood_score("energy", 0.0, known.selection.logits)
    middle = float(np.median(energy))
    return {
        "middle": np.array(middle),
        "spread": np.array([middle - energy[energy < middle].mean(), energy[energy > middle].mean() - middle]),
    }


def two_sided(stored: Arrays, seen: Seen) -> Doubles:
    """Return how far E(x) lies from its median on either side, in units of that side's spread (typicality)."""
    off = ood_score("energy", 0.0, seen.logits) - stored["middle"]
    result: Doubles = np.where(off < 0, -off / stored["spread"][0], off / stored["spread"][1])
    return result


def fewer(view: View, n: int) -> View:
    """Return a view fitted on the first ``n`` training images."""

    def first(known: Known) -> Known:
        t = known.training
        return replace(known, training=Seen(t.image[:n], featured(t)[:n], t.logits[:n]))

    return View(view.score, view.words, lambda known: view.fit(first(known)), view.needs_features)


STATISTICS = ("log total variation", "log contrast", "log sd of the Laplacian", "brightness", "entropy")


def with_zlib(image: Floats) -> Floats:
    """Return the statistics with the bytes per difference that zlib needs in place of their entropy."""
    grey = np.rint(255 * np.einsum("nchw,c->nhw", image, LUMA)).astype(np.uint8)
    differences = grey[:, :, 1:] - grey[:, :, :-1]
    size = [len(zlib.compress(one.tobytes(), 1)) / one.size for one in differences]
    return np.column_stack([statistics(image)[:, :4], np.array(size, np.float32)])


def saturation_too(image: Floats) -> Floats:
    """Return the statistics with the mean saturation as a sixth."""
    return np.column_stack([statistics(image), (image.max(axis=1) - image.min(axis=1)).mean(axis=(1, 2))])


def of_statistics(function: Callable[[Floats], Floats]) -> View:
    """Return the view of other statistics."""
    return View(lambda stored, seen: distance(stored, function(seen.image)), "", lambda known: gaussian(function(more(known).images)))


def all_but(index: int) -> Callable[[Floats], Floats]:
    """Return four of the five statistics."""
    return lambda image: np.delete(statistics(image), index, axis=1)


OTHERS = {
    **{f"statistics without {name}": of_statistics(all_but(index)) for index, name in enumerate(STATISTICS)},
    "statistics with zlib": of_statistics(with_zlib),
    "statistics and saturation": of_statistics(saturation_too),
}
CANDIDATES: dict[str, View] = {
    **VIEWS,
    **{name: of_logits(name, "") for name in SCORES if name != "energy_entropy"},
    "neighbours of 2,000": fewer(VIEWS["neighbours"], 2000),
    "vim": View(vim, "", fit_vim),
    "gen": View(gen, ""),
    "react": View(react, "", fit_react),
    "two-sided energy": View(two_sided, "", fit_two_sided),
}
MORE = ("max_softmax", "gen", "react", "two-sided energy")
VIEWED = CANDIDATES | OTHERS
SUMS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in CANDIDATES},
    "sum": DEFAULT_VIEWS,
    **{f"without {name}": tuple(other for other in DEFAULT_VIEWS if other != name) for name in DEFAULT_VIEWS},
    **{f"{name} for features": ("logits", name, "statistics") for name in ("neighbours", "neighbours of 2,000", "gaussian", "vim")},
    **{f"{name} for logits": (name, "features", "statistics") for name in ("energy", *MORE)},
    **{name: ("logits", "features", name) for name in OTHERS},
    **{f"sum and {name}": (*DEFAULT_VIEWS, name) for name in ("neighbours", "gaussian", "vim", *MORE)},
}
"""What is measured: views alone, and sums of the terms of several."""
LARGEST = "largest term"
"""The largest of the default views' terms in place of their sum."""
CLOSELY = ("max_softmax", "sum", "neighbours for features", "sum and max_softmax")
"""What is calibrated in all four ways; the rest in the chosen one."""

LOWER = ("max_softmax", *DEFAULT_VIEWS, "sum")
"""What is measured in other precisions than fp32."""
