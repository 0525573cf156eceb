"""OOD detection: scores and flag rates on OOD, attacked, adaptively attacked and benignly shifted images."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Floats
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import ALL_SETS, SUM, Images, Row, alone
from ebjdat_serve.scores import BASELINE
from ebjdat_serve.sentences import set_name
from training.data.image_folders import spread
from training.evaluation.attacks import Pgd, Predict, Transfer
from training.evaluation.autoattack import AutoAttack
from training.evaluation.context import Context
from training.evaluation.flags import Flag, able, alphas, calibration_of, flags_of, handled_share, images_alike, with_baseline
from training.evaluation.metrics import auroc, auroc_stderr, average_precision, flag_rate_interval, fpr_at_95
from training.evaluation.odd import odd_images
from training.evaluation.ood_sets import most, strange_images
from training.evaluation.result_cache import Arrays
from training.evaluation.rows import ALPHAS, compared_with, number, proportion
from training.evaluation.shifts import SHIFTS, shifted
from training.methods.adversary import Threat

FACTORS = (0.25, 0.5, 1.0, 2.0)  # of eps, PGD's strength: 2/255 to 16/255
ODD = 500
"""Odd pictures of each kind, at most."""
SHOWN = 10
"""Wrong acceptances in the report."""


def suspicion_rows(c: Context) -> Iterator[Row]:
    """Yield clean flag rates, and the separation by each score and the flag rates of OOD, odd and attacked images.

    Images that an attack fooled are counted apart from the rest, which look clean to any score.
    """
    flag, every = flags_of(c)
    clean = c.look(c.where, Predict(gradient=True), *c.test(max(c.suite.test, c.suite.looked, c.suite.autoattack)))
    flags = with_baseline(flag, every)
    share = handled_share(c)
    for shown in flags:
        for alpha in alphas(shown):
            yield from clean_rows(c, shown, "clean", clean, alpha, exchangeable=not share)
    if share:
        yield from mixture_rows(c, flags)
    yield from why_rows(c, flag, c.where, clean)
    if alphas(flag):
        c.drawings["accepted"] = wrong_acceptances(c, flag, clean)
    main, odd = {**strange(c), **attacked(c)}, odd_pictures(c)
    flagging = [*flags, *(other for other in every if other.column is not None)]
    for images, found in {**main, **odd}.items():
        for other in able(every, found):
            own = like(images, clean, found)
            if images in main:
                yield from separation_rows(c, other, images, own, found)
            elif len(found["label"]) > 1:  # a rate of one image is a figure, an AUROC of it is none
                yield auroc_row(c, f"auroc_{other.score}", other, images, other.value(own), other.value(found))
        for shown in flagging:
            yield from power_rows(c, shown, images, found)
        yield from why_rows(c, flag, images, found)
        if images.attack:
            yield from fooled_rows(c, flagging, every, images, like(images, clean, found), found)
    pairs = list(compared(clean, main))
    for reference in ("energy", BASELINE):
        for other in every:
            if other.score != reference:
                yield versus(c, other, next(flag for flag in every if flag.score == reference), pairs, len(clean["label"]))


def mixture_rows(c: Context, flags: list[Flag]) -> Iterator[Row]:
    """Yield the flag rate of test images that are handled as the calibration's were, and whether it is as promised."""
    (found,) = c.ledger.run("handled", [(Predict(), *images_alike(c, c.suite.test))])
    for flag in flags:
        for alpha in alphas(flag):
            yield from clean_rows(c, flag, "mixture", found, alpha, exchangeable=True)


def wrong_acceptances(c: Context, flag: Flag, clean: Arrays) -> Arrays:
    """Return the most confident wrong answers on test images that are not flagged: image, label, answer and its probability."""
    calibration = calibration_of(c)
    p = probabilities(clean["logits"], calibration.temperature if calibration else 1.0)
    answer, label = p.argmax(axis=1), clean["label"]
    chosen = np.flatnonzero((answer != label) & ~flag.flags(clean, ALPHAS[0]))
    chosen = chosen[np.argsort(-p[chosen].max(axis=1), kind="stable")][:SHOWN]
    image = c.data.test.image[chosen]
    return {"image": image, "label": label[chosen], "answer": answer[chosen], "probability": p[chosen].max(axis=1)}


def why_rows(c: Context, flag: Flag, images: Images, found: Arrays) -> Iterator[Row]:
    """Yield of each view the share of the flagged images of which its term is the largest; of no views or flagged images nothing."""
    hits = flag.flags(found, ALPHAS[0]) if flag.score == SUM and alphas(flag) else np.zeros(len(found["logits"]), bool)
    if c.subject.views is None or not hits.any():
        return
    spoke = found["terms"][hits].argmax(axis=1)
    for column, name in enumerate(c.subject.views.combination.stored):
        times, about = int((spoke == column).sum()), {"alpha": ALPHAS[0], "score": alone(name)}
        yield proportion("share_of_flags", times, len(spoke), images, c.subject.graph, **about)


def fooled(clean: Arrays, found: Arrays) -> np.ndarray:
    """Return which images the attack fooled, (N,) bool: classified right before it and wrong after it by the served model."""
    label = found["label"]
    hit: np.ndarray = (clean["logits"].argmax(axis=1) == label) & (found["logits"].argmax(axis=1) != label)
    return hit


def part_of(found: Arrays, chosen: np.ndarray) -> Arrays:
    """Return what scores are of, of the chosen images."""
    return {key: found[key][chosen] for key in ("logits", "terms", "gradient") if key in found}


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


def clean_rows(c: Context, flag: Flag, what: str, found: Arrays, alpha: float, exchangeable: bool) -> Iterator[Row]:
    """Yield the flag rate at ``alpha``; if the calibration is ``exchangeable`` with the images, whether it lies in its interval."""
    n, of = len(found["logits"]), c.subject.graph
    hits = flag.flags(found, alpha)
    yield c.share(f"flag_rate_{what}", hits, c.where, of, alpha=alpha, score=flag.score)
    if exchangeable:
        low, high = flag_rate_interval(len(flag.clean), n, alpha)
        inside, about = float(low <= hits.mean() <= high), {"alpha": alpha, "score": flag.score, "expected": (low, high)}
        yield number(f"flag_rate_{what}_in_interval", inside, n, c.where, of, **about)


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
    sets = {Images(dataset=name): image[spread(len(image), c.suite.test)] for name, image in ood_sets(c)}
    return {images: c.look(images, Predict(gradient=True), image) for images, image in sets.items()}


def ood_sets(c: Context) -> Iterator[tuple[str, Floats]]:
    """Yield (name, images in [0,1]) of the OOD sets; missing sets are reported once."""
    return strange_images(c.data, c.data.test.image[: max(2, min(1000, c.suite.test))], c.say)


def odd_pictures(c: Context) -> dict[Images, Arrays]:
    """Return the model's outputs on odd pictures of the test images' size."""
    n = min(ODD, most(*c.data.size), c.suite.test)
    sets = {Images(dataset=name): to_unit(image) for name, image in odd_images(*c.data.size, n).items()}
    return {images: c.look(images, Predict(gradient=True), image) for images, image in sets.items()}


def attacked(c: Context) -> dict[Images, Arrays]:
    """Return the model's outputs on the first test images under PGD of four strengths, and under the transferred attack."""
    n, eps = c.suite.looked, c.ball.linf
    if c.subject.no_network:
        c.say(f"no attack is measured: {c.subject.no_network}")
        return {}
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
