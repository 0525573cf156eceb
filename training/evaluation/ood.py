"""OOD detection: scores and flag rates on OOD, attacked, adaptively attacked and benignly shifted images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.rows import ALL_SETS, COMPARED, Images, Row
from ebjdat_serve.scores import BASELINE, DEFAULT, SCORES, ood_score
from ebjdat_serve.sentences import set_name
from training.data.datasets import data_root, read_atlas
from training.data.image_folders import load_images
from training.errors import DataError
from training.evaluation.adaptive import VARIANTS, Evade, EvadeBySquare, ScoreAttack
from training.evaluation.attacks import Pgd, Predict, Transfer
from training.evaluation.autoattack import APGD, AutoAttack
from training.evaluation.context import Context, unit
from training.evaluation.metrics import auroc, auroc_stderr, average_precision, flag_rate_interval, fpr_at_95
from training.evaluation.result_cache import Arrays, Task
from training.evaluation.rows import ALPHAS, SEED, compared_with, number, proportion
from training.evaluation.shifts import SHIFTS, shifted
from training.methods.adversary import Threat

OOD_ATLASES = {"svhn_train_first1080": "svhn", "cifar100_test_3000": "cifar100"}  # file -> its data set
FACTORS = (0.25, 0.5, 1.0, 2.0)  # of eps, PGD's strength: 2/255 to 16/255
BLANK = "blank images"  # every pixel of one colour, drawn uniformly
NEAR = "cifar100_test_3000"
QUERIES = 1000  # of Square on the flag, at most


@dataclass(frozen=True)
class Flag:
    """A score with its clean calibration values: the served score, or another for comparison."""

    score: str
    weight: float
    clean: np.ndarray  # sorted

    def value(self, found: Arrays) -> Floats:
        """Return the score of each image; high is suspicious."""
        return found["gradient"] if self.score == "gradient_norm" else ood_score(self.score, self.weight, found["logits"])

    def flags(self, found: Arrays, alpha: float) -> np.ndarray:
        """Return which images are suspicious."""
        detector = Detector(self.clean, alpha)
        return detector.suspicious(detector.p_value(self.value(found)))

    def threshold(self, alpha: float) -> float:
        """Return the largest score that is not flagged at ``alpha``."""
        n = len(self.clean)
        least = int(np.ceil(alpha * (n + 1) - 1 - 1e-9))  # number of clean scores that must reach it
        return float(self.clean[n - least]) if least > 0 else float("inf")


def flags_of(c: Context) -> tuple[Flag, list[Flag]]:
    """Return the served flag, as calibrated in the bundle, and one for every score, from the calibration split."""
    splits: list[tuple[Task, Floats, Labels]] = [(Predict(gradient=True), *unit(c.data.calibration)), (Predict(), *unit(c.data.selection))]
    calibration, selection = c.ledger.run("calibration split", splits)
    served = c.bundle.calibration() if c.bundle is not None and "calibration.json" in c.bundle.manifest.files else None
    weights = {name: score.fit(selection["logits"]) for name, score in SCORES.items()} | ({served.score: served.weight} if served else {})
    every = [Flag(score, weights.get(score, 0.0), np.empty(0)) for score in COMPARED]
    every = [replace(flag, clean=np.sort(flag.value(calibration)).astype(np.float64)) for flag in every]
    if served is None:
        return next(flag for flag in every if flag.score == DEFAULT), every
    return Flag(served.score, served.weight, np.asarray(served.scores)), every


def with_baseline(flag: Flag, every: list[Flag]) -> list[Flag]:
    """Return the served flag and, if it is another, the one of max softmax."""
    return [flag, *(other for other in every if other.score == BASELINE and flag.score != BASELINE)]


def alphas(flag: Flag) -> list[float]:
    """Return the levels that are possible with this number of calibration scores."""
    return [alpha for alpha in ALPHAS if alpha * (len(flag.clean) + 1) >= 1]


def suspicion_rows(c: Context) -> Iterator[Row]:
    """Yield clean flag rates, and the separation by each score and the flag rates of OOD and attacked images.

    Images that an attack fooled are counted apart from the rest, which look clean to any score.
    """
    flag, every = flags_of(c)
    clean = c.look(c.where, Predict(gradient=True), *c.test(max(c.suite.test, c.suite.looked, c.suite.autoattack)))
    flags = with_baseline(flag, every)
    for shown in flags:
        for alpha in alphas(shown):
            yield from clean_rows(c, shown, clean, alpha)
    sets = {**strange(c), **attacked(c)}
    for images, found in sets.items():
        for other in able(every, found):
            yield from separation_rows(c, other, images, like(images, clean, found), found)
        for shown in flags:
            yield from power_rows(c, shown, images, found)
        if images.attack:
            yield from fooled_rows(c, flags, every, images, like(images, clean, found), found)
    pairs = list(compared(clean, sets))
    for reference in ("energy", BASELINE):
        for other in every:
            if other.score != reference:
                yield versus(c, other, next(flag for flag in every if flag.score == reference), pairs, len(clean["label"]))


def able(every: list[Flag], found: Arrays) -> list[Flag]:
    """Return the flags that the set's arrays suffice for: AutoAttack's have no gradient."""
    return [flag for flag in every if flag.score != "gradient_norm" or "gradient" in found]


def fooled(clean: Arrays, found: Arrays) -> np.ndarray:
    """Return which images the attack fooled, (N,) bool: classified right before it and wrong after it by the served model."""
    label = found["label"]
    hit: np.ndarray = (clean["logits"].argmax(axis=1) == label) & (found["logits"].argmax(axis=1) != label)
    return hit


def part_of(found: Arrays, chosen: np.ndarray) -> Arrays:
    """Return the logits and gradients of the chosen images."""
    return {key: found[key][chosen] for key in ("logits", "gradient") if key in found}


def compared(clean: Arrays, sets: dict[Images, Arrays]) -> Iterator[tuple[Arrays, Arrays]]:
    """Yield (clean images, others) of each set; of an attack only the images that it fooled, if there are any."""
    for images, found in sets.items():
        own = like(images, clean, found)
        if not images.attack:
            yield own, found
        elif (hit := fooled(own, found)).any():
            yield own, part_of(found, hit)


def fooled_rows(c: Context, flags: list[Flag], every: list[Flag], images: Images, clean: Arrays, found: Arrays) -> Iterator[Row]:
    """Yield an attack's success rate, and AUROC and flag rate of fooled images and of the rest, against all their clean images."""
    hit, of = fooled(clean, found), c.subject.graph
    right = int((clean["logits"].argmax(axis=1) == found["label"]).sum())
    if right:
        yield proportion("attack_success", int(hit.sum()), right, images, of)
    for which, chosen in (("fooled", hit), ("not fooled", ~hit)):
        part, subset = part_of(found, chosen), replace(images, subset=which)
        if not chosen.any():
            c.say(f"{set_name(images)}: no image is {which}, so no rate is of those")
            continue
        for other in able(every, found):
            yield auroc_row(c, f"auroc_{other.score}", other, subset, other.value(clean), other.value(part))
        for flag in flags:
            # not kept for paired tests: other models have other fooled images
            for alpha in alphas(flag):
                hits = flag.flags(part, alpha)
                yield proportion("flag_power", int(hits.sum()), len(hits), subset, of, alpha=alpha, score=flag.score)


def auroc_row(c: Context, metric: str, flag: Flag, images: Images, clean: np.ndarray, other: np.ndarray, **more: Any) -> Row:
    """Return the AUROC of a score's values on images, the positives, against those on clean ones."""
    n, error = len(clean) + len(other), auroc_stderr(clean, other)
    against = compared_with(c.data.name, "test", len(clean))
    return number(metric, auroc(clean, other), n, images, c.subject.graph, stderr=error, score=flag.score, **against, **more)


def power_rows(c: Context, flag: Flag, images: Images, found: Arrays) -> Iterator[Row]:
    """Yield the share of a set that is flagged, at each alpha."""
    for alpha in alphas(flag):
        yield c.share("flag_power", flag.flags(found, alpha), images, c.subject.graph, alpha=alpha, score=flag.score)


def clean_rows(c: Context, flag: Flag, clean: Arrays, alpha: float) -> Iterator[Row]:
    """Yield the clean flag rate at ``alpha`` and whether it lies in its Beta-binomial interval."""
    n, of = len(clean["logits"]), c.subject.graph
    hits = flag.flags(clean, alpha)
    low, high = flag_rate_interval(len(flag.clean), n, alpha)
    yield c.share("flag_rate_clean", hits, c.where, of, alpha=alpha, score=flag.score)
    inside, about = float(low <= hits.mean() <= high), {"alpha": alpha, "score": flag.score, "expected": (low, high)}
    yield number("flag_rate_clean_in_interval", inside, n, c.where, of, **about)


def separation_rows(c: Context, flag: Flag, images: Images, clean: Arrays, found: Arrays) -> Iterator[Row]:
    """Yield AUROC, AUPR and FPR@95 of one score on one set against clean test images; the set is the positive class."""
    a, b = flag.value(clean), flag.value(found)
    n, of = len(a) + len(b), c.subject.graph
    against = {"score": flag.score, **compared_with(c.data.name, "test", len(a))}
    yield auroc_row(c, f"auroc_{flag.score}", flag, images, a, b)
    yield number(f"aupr_{flag.score}", average_precision(a, b), n, images, of, **against)
    passed = round(fpr_at_95(a, b) * len(b))
    yield proportion(f"fpr95_{flag.score}", passed, len(b), images, of, **against)


def versus(c: Context, flag: Flag, reference: Flag, pairs: list[tuple[Arrays, Arrays]], clean: int) -> Row:
    """Return the share of sets that a score separates better than ``reference``; of attacks, the fooled images. It decides the default."""
    can = [pair for pair in pairs if len(able([flag, reference], pair[1])) == 2]
    wins = sum(auroc(flag.value(a), flag.value(b)) > auroc(reference.value(a), reference.value(b)) for a, b in can)
    metric = f"sets_better_than_{reference.score}_{flag.score}"
    images = Images(dataset=ALL_SETS, subset="fooled")
    about = {"score": flag.score, "baseline": reference.score, **compared_with(c.data.name, "test", clean)}
    return proportion(metric, wins, len(can), images, c.subject.graph, **about)


def like(images: Images, clean: Arrays, found: Arrays) -> Arrays:
    """Return the clean images that a set is compared with: those that an attack started from, else all."""
    return {key: value[: len(found["logits"])] for key, value in clean.items()} if images.attack else clean


def strange(c: Context) -> dict[Images, Arrays]:
    """Return the model's outputs on the OOD sets."""
    sets = {Images(dataset=name): image[: c.suite.test] for name, image in ood_sets(c)}
    return {images: c.look(images, Predict(gradient=True), image) for images, image in sets.items()}


def ood_sets(c: Context) -> Iterator[tuple[str, Floats]]:
    """Yield (name, images in [0,1]) of the OOD sets; missing sets are reported once."""
    return strange_images(c.data.name, c.data.test.image[: max(2, min(1000, c.suite.test))], c.say)


def strange_images(dataset: str, some: Pixels, say: Callable[[str], None]) -> Iterator[tuple[str, Floats]]:
    """Yield (name, images in [0,1]) of a data set's OOD sets, ``some`` of its images for interpolation; report missing sets by ``say``."""
    height, width = some.shape[1:3]
    draw = np.random.default_rng(SEED)
    yield "uniform noise", to_unit(draw.integers(0, 256, (1000, height, width, 3), dtype=np.uint8))
    order = draw.permutation(len(some))
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)  # one cycle, so that no image is paired with itself
    yield "interpolations", to_unit(((some.astype(np.uint16) + some[partner]) // 2).astype(np.uint8))
    colour = np.random.default_rng(SEED).integers(0, 256, (1000, 1, 1, 3), dtype=np.uint8)
    yield BLANK, to_unit(np.broadcast_to(colour, (1000, height, width, 3)))
    for name, source in OOD_ATLASES.items():
        if source == dataset:
            continue  # a data set is not OOD for itself
        file = data_root() / f"{name}.webp"
        if (height, width) == (32, 32) and file.is_file():
            yield name, to_unit(read_atlas(file, 32))
        else:
            say(f"{name}: not measured, {name}.webp is not in the data folder or the model's size is not 32 x 32")
    for folder in sorted((data_root() / "ood").glob("*")):
        try:
            yield folder.stem, to_unit(load_images(str(folder), height, width))
        except DataError as error:
            say(f"{folder.name}: not measured, {error}")


def attacked(c: Context) -> dict[Images, Arrays]:
    """Return the model's outputs on the first test images under PGD of four strengths, and under the transferred attack."""
    n, eps = c.suite.looked, c.ball.linf
    image, label = c.test(n)
    sets = {}
    for factor in FACTORS:
        images = replace(c.where, attack="pgd", norm="linf", eps=eps * factor, steps=20)
        sets[images] = c.look(images, Pgd(Threat("linf", eps * factor), leave=False, eot=c.eot), image, label)
    if c.surrogate is not None:
        images = replace(c.where, attack="transfer", norm="linf", eps=eps)
        sets[images] = c.look(images, Transfer(Threat("linf", eps), str(c.surrogate), c.surrogate_sha256), image, label)
    if c.suite.autoattack and c.attackers():
        few = c.test(c.suite.autoattack)
        images = replace(c.where, attack="autoattack", norm="linf", eps=eps)
        sets[images] = c.look(images, AutoAttack(Threat("linf", eps), rand=c.subject.random), *few)
        c.tell(sets[images], set_name(images))
    return sets


def hostile_rows(c: Context) -> Iterator[Row]:
    """Yield the figures under adaptive attack: robust OOD detection, and robust accuracy with rejection."""
    if not c.attackers():
        return
    flag, every = flags_of(c)
    energy = [other for other in every if other.score == "energy" and flag.score != "energy" and c.suite.thorough]
    for other in with_baseline(flag, every) + energy:
        yield from robust_ood_rows(c, other)
        yield from rejection_rows(c, other)
    half = c.ball.threats()[1]
    (found,) = c.run("at half of eps", Pgd(half, objective="margin", restarts=2, eot=c.eot), n=c.suite.hostile)
    images = replace(c.where, attack="pgd", norm=half.norm, eps=half.eps, objective="margin", steps=20, restarts=2)
    yield c.share("accuracy_at_half_eps", found["robust_mask"], images, c.subject.weights)


def robust_ood_rows(c: Context, flag: Flag) -> Iterator[Row]:
    """Yield the AUROC when OOD images are perturbed to look normal, clean images to look OOD, and both."""
    threat, n = c.ball.threats()[0], c.suite.hostile
    image, label = c.test(n)
    found = dict(ood_sets(c))
    name = NEAR if NEAR in found else "interpolations"
    junk, none = found[name][:n], np.zeros(min(n, len(found[name])), np.int64)
    queries = min(c.suite.queries, QUERIES)
    down, up = (ScoreAttack(threat, flag.score, flag.weight, up, queries) for up in (False, True))
    todo: list[tuple[Task, Floats, Labels]] = [(Predict(), image, label), (up, image, label), (Predict(), junk, none), (down, junk, none)]
    parts = c.ledger.run(f"robust OOD, {flag.score}", todo)
    clean, raised, strange_, lowered = (flag.value(part) for part in parts)
    by_square = float(np.mean([parts[i]["square"].mean() for i in (1, 3)]))
    if by_square > 0.2:
        c.say(f"Square moved the score {flag.score} further than PGD on {by_square:.2f} of the images: its gradient is probably masked")
    cases = {"none": (clean, strange_), "ood": (clean, lowered), "clean": (raised, strange_), "both": (raised, lowered)}
    attack: dict[str, Any] = {"attack": "score", "norm": threat.norm, "eps": threat.eps, "steps": down.steps, "restarts": 2}
    images = Images(dataset=name, queries=queries, **attack)
    for moved, (a, b) in cases.items():
        yield auroc_row(c, "auroc_robust_ood", flag, images, a, b, moved=moved)


def rejection_rows(c: Context, flag: Flag) -> Iterator[Row]:
    """Yield the share of images for which no misclassified, unflagged point of the ball was found.

    A detector that is robust at eps implies some classifier, however slow, that is robust at eps/2 (Tramer, arXiv 2107.11630). So a
    share far above the model's own accuracy at eps/2 more likely shows a weak attack.
    """
    threat, _, _ = c.ball.threats()
    n, of = c.suite.hostile, c.subject.graph
    image, label = c.test(n)
    for alpha in alphas(flag) if c.suite.thorough else alphas(flag)[:1]:
        common = (threat, flag.score, flag.weight, flag.threshold(alpha), float(flag.clean.std()) or 1.0)
        queries = min(c.suite.queries, QUERIES)
        works: list[Task] = [*(Evade(*common, variant) for variant in VARIANTS), EvadeBySquare(*common, queries)]
        todo = [(work, image, label) for work in works]
        holds = np.logical_and.reduce([part["holds"] for part in c.ledger.run(f"rejection, {flag.score}, alpha {alpha}", todo)])
        holds &= ~unseen(c, flag, alpha, n)
        attack: dict[str, Any] = {"attack": "evasion", "norm": threat.norm, "eps": threat.eps, "steps": Evade.steps, "restarts": 2}
        images = replace(c.where, queries=queries, **attack)
        yield c.share("accuracy_with_rejection", holds, images, of, alpha=alpha, score=flag.score)


def unseen(c: Context, flag: Flag, alpha: float, n: int) -> np.ndarray:
    """Return the images for which the ordinary APGD, which ignores the flag, ends on a misclassified, unflagged point, (N,) bool."""
    (found,) = c.run("APGD", AutoAttack(c.ball.threats()[0], APGD, rand=c.subject.random), n=n)
    c.tell(found, "APGD")
    _, label = c.test(n)
    missed: np.ndarray = (found["logits"].argmax(axis=1) != label) & ~flag.flags(found, alpha)
    return missed


def shift_rows(c: Context) -> Iterator[Row]:
    """Yield accuracy and flag rate under benign shifts, through the server's decoder."""
    flags = with_baseline(*flags_of(c))
    some, of, alpha = c.data.test.first(c.suite.shifted), c.subject.graph, ALPHAS[0]
    for name, shift in {"none": None, **SHIFTS}.items():
        image = to_unit(some.image if shift is None else shifted(some.image, shift))
        (found,) = c.ledger.run(f"shift {name}", [(Predict(), image, some.label)])
        where = replace(c.where, shift=name) if shift else c.where
        for flag in flags:
            yield c.share("flag_rate_shifted", flag.flags(found, alpha), where, of, alpha=alpha, score=flag.score)
        yield c.share("accuracy_shifted", found["logits"].argmax(axis=1) == some.label, where, of)
