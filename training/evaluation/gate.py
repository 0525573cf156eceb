"""The gate of a refresh: publish a new model only if it is not worse than the store's `current` on held-out images.

Both are evaluated on the same selection images, which neither was trained on; the test set is not used. docs/decisions/0015 has the rule.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import Floats
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.rows import Images, to_json
from ebjdat_serve.sentences import images_name, threat_name
from ebjdat_serve.store import EMPTY, pointed_at
from training.data.datasets import Dataset
from training.evaluation.attacks import Pgd, Predict
from training.evaluation.context import unit
from training.evaluation.evaluated_model import bundle_spec
from training.evaluation.metrics import auroc, auroc_difference_stderr, paired_interval
from training.evaluation.ood_sets import strange_images
from training.evaluation.result_cache import Arrays, ResultCache, work_root
from training.evaluation.rows import ALPHAS, ball_of
from training.methods.adversary import Threat

MARGIN = 0.02
"""Tolerated loss: a model is held back when the whole 95 % interval of a figure's gain lies below -MARGIN."""
ATTACKED = 1000  # selection images under PGD-20, at most
ALPHA = ALPHAS[0]


@dataclass(frozen=True)
class Compared:
    """One figure of both models on the same images; ``gain`` is positive where the new one is better."""

    metric: str
    images: Images
    n: int
    new: float
    current: float
    gain: float
    interval: tuple[float, float]
    against: Images | None = None  # images that they are separated from

    @property
    def worse(self) -> bool:
        """Return whether the new model is worse by more than the margin, with confidence."""
        return self.interval[1] < -MARGIN

    def __str__(self) -> str:
        low, high = self.interval
        where = " vs ".join(images_name(images) for images in (self.images, self.against) if images)
        how = ", ".join(part for part in (self.metric, threat_name(self.images.norm, self.images.eps)) if part)
        text = f"{how} {self.new:.3f} against {self.current:.3f} (gain {self.gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"{text}, n = {self.n}, {where})"


@dataclass(frozen=True)
class Verdict:
    """The gate's decision; ``reason``: why the new model is held back, empty when it passes; ``against``: the current model, if any.

    ``pointed``: the store's current folder at that time, which another publisher may change.
    """

    reason: str
    against: str
    rows: list[Compared]
    pointed: Path

    def comparison(self) -> list[dict[str, Any]]:
        """Return the figures as JSON."""
        names = ("metric", "n", "new", "current", "gain", "interval", "worse")
        plain = [{**to_json(row.images), **{name: getattr(row, name) for name in names}, "margin": MARGIN} for row in self.rows]
        others = [{"against": row.against.dataset, "against_split": row.against.split} if row.against else {} for row in self.rows]
        return [{**row, **other} for row, other in zip(plain, others, strict=True)]


def judge(new: Bundle, store: Path, data: Dataset) -> Verdict:
    """Return whether ``new`` may replace the current version of ``store``; an empty store accepts any model.

    ``new`` is also held back when the current bundle is unreadable, or of other data, labels or size, which prevents a comparison.
    """
    pointed = pointed_at(store)
    if pointed == EMPTY:
        return Verdict("", "", [], pointed)
    try:
        current = Bundle.load(pointed)
    except EbjdatError as error:
        return Verdict(f"it cannot be compared with the current model: {error}", "", [], pointed)
    name = f"{current.manifest.name}@{current.manifest.version}"
    if current.served == new.served:
        return Verdict("", name, [], pointed)
    if other := difference(new, current):
        return Verdict(f"it cannot be compared with {name}: {other}", name, [], pointed)
    rows = list(compare(new, current, data))
    worse = "; ".join(str(row) for row in rows if row.worse)
    return Verdict(f"worse than {name} by more than {MARGIN}: {worse}" if worse else "", name, rows, pointed)


def difference(new: Bundle, current: Bundle) -> str:
    """Return why two bundles cannot be compared on the same held-out images, or an empty string."""
    a, b = new.manifest, current.manifest
    if a.labels != b.labels:
        return f"its labels are {', '.join(a.labels)}; the current ones {', '.join(b.labels)}"
    if a.input != b.input:
        return f"it takes {a.input.described()}; the current one {b.input.described()}"
    if a.provenance.data_sha256 != b.provenance.data_sha256:
        sums = f"sha256 {a.provenance.data_sha256[:12]} and {b.provenance.data_sha256[:12]}"
        return f"they were trained on other images ({sums}), so one may have been trained on what the other held out"
    return ""


def compare(new: Bundle, current: Bundle, data: Dataset) -> Iterator[Compared]:
    """Yield every figure of the gate: clean and PGD-20 accuracy, clean flag rate, AUROC on each available OOD set."""
    where, eps = Images(dataset=data.name, split="selection"), ball_of(data.name).linf
    strange = dict(strange_images(data, data.selection.image, lambda text: None))
    mine, its = (seen(bundle, data, strange) for bundle in (new, current))
    yield proportions("accuracy_clean", where, mine.right, its.right)
    yield proportions("accuracy_pgd20", replace(where, attack="pgd", norm="linf", eps=eps, steps=20), mine.robust_mask, its.robust_mask)
    if mine.flagged is not None and its.flagged is not None:
        passed = proportions("flag_rate_clean", where, ~mine.flagged, ~its.flagged)
        yield Compared(passed.metric, where, passed.n, 1 - passed.new, 1 - passed.current, passed.gain, passed.interval)
    for name in strange:
        (a, a_strange), (b, b_strange) = (side.scores[name] for side in (mine, its))
        value, known = auroc(a, a_strange), auroc(b, b_strange)
        half = 1.96 * auroc_difference_stderr(a, a_strange, b, b_strange)
        gain, n = value - known, len(a) + len(a_strange)
        yield Compared("auroc_flag", Images(dataset=name), n, value, known, gain, (gain - half, gain + half), where)


def proportions(metric: str, images: Images, new: NDArray[np.bool_], current: NDArray[np.bool_]) -> Compared:
    """Return two proportions of the same images and their difference with its paired interval."""
    a, b = float(new.mean()), float(current.mean())
    return Compared(metric, images, len(new), a, b, a - b, paired_interval(new, current))


@dataclass(frozen=True)
class Seen:
    """One model's per-image results on the held-out images, (N,) each, and (clean scores, OOD scores) for each OOD set."""

    right: NDArray[np.bool_]
    robust_mask: NDArray[np.bool_]
    flagged: NDArray[np.bool_] | None  # None where the calibration set is too small for ALPHA
    scores: dict[str, tuple[Floats, Floats]]


def seen(bundle: Bundle, data: Dataset, strange: dict[str, Floats]) -> Seen:
    """Return a bundle's results on the selection split, clean and attacked, and on OOD images; cached on disk."""
    spec = bundle_spec(bundle.path)
    ledger = ResultCache(work_root() / "chunks", spec, spec())
    image, label = unit(data.selection)
    attack = Pgd(Threat("linf", ball_of(data.name).linf))
    clean, attacked = ledger.run("gate", [(Predict(), image, label), (attack, image[:ATTACKED], label[:ATTACKED])])
    calibration, combination = bundle.calibration(), bundle.combination()

    def score(found: Arrays) -> Floats:
        return combination.score(found["terms"])

    mine, flagged = score(clean), None
    if ALPHA * (len(calibration.scores) + 1) >= 1:
        detector = Detector(np.asarray(calibration.scores), ALPHA)
        flagged = detector.suspicious(detector.p_value(mine))
    none = [np.zeros(len(images), np.int64) for images in strange.values()]
    looked = ledger.run("gate", [(Predict(), images, zero) for images, zero in zip(strange.values(), none, strict=True)])
    scores = {name: (mine, score(found)) for name, found in zip(strange, looked, strict=True)}
    return Seen(clean["logits"].argmax(axis=1) == label, attacked["robust_mask"], flagged, scores)
