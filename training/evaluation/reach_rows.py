"""Rows of margin, walk, search and policy: separation, risk against coverage, review share, and accuracy with rejection."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ebjdat_serve.detection import p_value
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.reach import RADIUS, Policy, Scores, margin, p_values
from ebjdat_serve.rows import Images, Row
from ebjdat_serve.sentences import set_name
from training.evaluation.attacks import Pgd, Predict, Transfer
from training.evaluation.autoattack import AutoAttack, Square
from training.evaluation.context import Context
from training.evaluation.flags import Flag, calibration_images, flags_of, handled_share, images_alike, score_of
from training.evaluation.metrics import auroc, auroc_stderr, flag_rate_interval
from training.evaluation.reach import Attack, EvadeReach, Points, Rejecter, Searched, Slope, Walk, aurc, rankings
from training.evaluation.result_cache import Arrays, Task
from training.evaluation.rows import ALPHAS, compared_with, number, proportion
from training.evaluation.shifts import corrupted
from training.methods.adversary import Threat

SHARES = (0.01, 0.05, 0.1)
VIEWS = (("ood", "margin"), ("ood", "reach"), ("ood", "margin", "reach"))
"""What a policy is made of: without the walk, with it in the margin's place, and with both."""
NAMES = {"ood": "ood_score", "margin": "margin", "reach": "reach_score"}
CORRUPTIONS, SEVERITY = ("gaussian noise", "gaussian blur", "jpeg"), 3
PARTS = ("apgd-ce", "apgd-dlr")
"""Of AutoAttack, which move every image towards the highest loss; its targeted attacks cost nine times as much."""
RADII = (0.0, 0.125, 0.25)
"""Of the search, over eps."""


def reach_rows(c: Context) -> Iterator[Row]:
    """Yield everything about "is the label within reach?", cheapest first."""
    yield from review_rows(c)
    yield from coverage_rows(c)
    yield from separation_rows(c)
    yield from rejection_rows(c)


def measured(c: Context, flag: Flag, image: Floats, label: Labels, title: str, *more: Task) -> dict[str, Scores]:
    """Return the scores of images: those of the walk, and of ``more``."""
    arrays: Arrays = {}
    for work in (Walk(), *more):
        (found,) = c.ledger.run(f"{type(work).__name__.lower()}, {title}", [(work, image, label)])
        arrays |= found
    return rankings(arrays, flag.score, flag.weight)


def calibrated(c: Context, flag: Flag) -> dict[str, Scores]:
    """Return the scores of the calibration split in its order; the search has no p-value."""
    return measured(c, flag, *calibration_images(c), "calibration split")


def chosen(scores: Mapping[str, Scores], views: tuple[str, ...]) -> dict[str, Scores]:
    """Return the scores of a policy's views."""
    return {view: scores[NAMES[view]] for view in views}


def review_rows(c: Context) -> Iterator[Row]:
    """Yield the share that each policy sends to review of test images, handled as the calibration's, and where it should lie."""
    flag, _ = flags_of(c)
    own, calibration = measured(c, flag, *images_alike(c, c.suite.test), "clean"), calibrated(c, flag)
    note = "images handled as the calibration's" if handled_share(c) else None
    for views in VIEWS:
        clean = chosen(calibration, views)
        for share in (share for share in SHARES if share * (len(clean["ood"]) + 1) >= len(views)):
            policy = Policy.calibrated(clean, share)
            sent = policy.review(p_values(clean, chosen(own, views)))
            expected = flag_rate_interval(policy.n, len(sent), (policy.cuts + 1) / (policy.n + 1))
            yield c.share("review_share", sent, c.where, c.subject.graph, alpha=share, views=views, expected=expected, note=note)


def coverage_rows(c: Context) -> Iterator[Row]:
    """Yield the error and the area under the risk-coverage curve of each score, on clean, corrupted and attacked images."""
    flag, _ = flags_of(c)
    for images, image, label in covered(c):
        scores = measured(c, flag, image, label, set_name(images))
        wrong = classes(c, image, label) != label
        yield c.share("error", wrong, images, c.subject.graph)
        for score, value in scores.items():
            yield number("aurc", aurc(value, wrong), len(wrong), images, c.subject.graph, score=score)


def classes(c: Context, image: Floats, label: Labels) -> Labels:
    """Return the served classes (N,)."""
    (found,) = c.ledger.run("classes", [(Predict(), image, label)])
    result: Labels = found["logits"].argmax(axis=1)
    return result


def covered(c: Context) -> Iterator[tuple[Images, Floats, Labels]]:
    """Yield the sets of the risk-coverage curves: clean, corrupted, and under PGD, fooled or not."""
    yield c.where, *c.test(c.suite.test)
    some = c.data.test.first(c.suite.shifted)
    for name in CORRUPTIONS:
        images = replace(c.where, corruption=name, severity=SEVERITY, recipe="own")
        yield images, to_unit(corrupted(some.image, name, SEVERITY)), some.label
    for images, attack, n in attacks(c):
        if images.attack == "pgd":
            image, label = c.test(min(n, c.suite.shifted))
            yield images, made_by(c, images, attack, image, label)["image"], label


def attacks(c: Context) -> Iterator[tuple[Images, Attack, int]]:
    """Yield the attacks, cheapest first, with the number of images; each takes its full course, so that the last iterate counts."""
    linf, half, _ = c.ball.threats()
    for threat in (linf, half):
        under = replace(c.where, norm="linf", eps=threat.eps)
        images = replace(under, attack="pgd", objective="ce", steps=20, step_over_eps=0.25, iterate="last")
        yield images, Pgd(threat, leave=False), c.suite.looked
        if c.surrogate is not None:
            images = replace(under, attack="transfer", steps=20, iterate="last", surrogate=c.surrogate.parent.name)
            transfer = Transfer(threat, str(c.surrogate), c.surrogate_sha256)
            yield replace(images, surrogate_of=c.surrogate_sha256), transfer, c.suite.looked
    for threat in (linf, half) if c.suite.strong and c.attackers() else ():
        under = replace(c.where, norm="linf", eps=threat.eps)
        yield replace(under, attack="square", queries=c.suite.queries), Square(threat, c.suite.queries), c.suite.strong
        yield replace(under, attack="apgd_ce_dlr"), AutoAttack(threat, PARTS), c.suite.strong
        if c.suite.autoattack:
            rand = c.subject.random
            yield (
                replace(under, attack="autoattack", version="rand" if rand else "standard"),
                AutoAttack(threat, rand=rand),
                c.suite.autoattack,
            )


def made_by(c: Context, images: Images, attack: Attack, image: Floats, label: Labels) -> Arrays:
    """Return the attacked images and the logits there."""
    (made,) = c.ledger.run(set_name(images), [(Points(attack), image, label)])
    return made


def separation_rows(c: Context) -> Iterator[Row]:
    """Yield the separation of images that an attack fooled from clean ones by each score, and the share that is sent to review."""
    flag, _ = flags_of(c)
    image, label = c.test(max(c.suite.looked, c.suite.strong))
    clean = measured(c, flag, image, label, "clean", Slope(), Searched())
    calibration, of = calibrated(c, flag), c.subject.graph
    right = classes(c, image, label) == label
    yield proportion("unstable", int(clean["unstable"].sum()), len(label), c.where, of, radius=RADIUS)
    for images, attack, n in attacks(c):
        made = made_by(c, images, attack, image[:n], label[:n])
        fooled = right[:n] & (made["logits"].argmax(axis=1) != label[:n])
        yield proportion("attack_success", int(fooled.sum()), int(right[:n].sum()), images, of)
        if not fooled.any():
            c.say(f"{set_name(images)}: no image is fooled, so nothing is separated")
            continue
        found = measured(c, flag, made["image"][fooled], label[:n][fooled], set_name(images), Slope(), Searched())
        first = {name: value[:n] for name, value in clean.items()}
        yield from fooled_rows(c, replace(images, subset="fooled"), found, first, right[:n], calibration)


def fooled_rows(
    c: Context, where: Images, fooled: dict[str, Scores], clean: dict[str, Scores], right: Any, calibration: dict[str, Scores]
) -> Iterator[Row]:
    """Yield AUROC against all clean images and against the right ones, power at alpha .05, and review shares of fooled images."""
    of, alpha = c.subject.graph, ALPHAS[0]
    for score, value in fooled.items():
        for metric, some in (("reach_auroc", np.ones(len(right), bool)), ("reach_auroc_right", right)):
            reference = clean[score][some]
            about = {"stderr": auroc_stderr(reference, value), "score": score, **compared_with(c.data.name, "test", len(reference))}
            yield number(metric, auroc(reference, value), len(reference) + len(value), where, of, **about)
        if score in calibration:
            caught = p_value(np.sort(calibration[score]), value) < alpha
            yield proportion("reach_power", int(caught.sum()), len(caught), where, of, alpha=alpha, score=score)
        elif score == "unstable":
            yield proportion("unstable", int(value.sum()), len(value), where, of, radius=RADIUS)
    for views in VIEWS:
        reference = chosen(calibration, views)
        sent = Policy.calibrated(reference, alpha).review(p_values(reference, chosen(fooled, views)))
        yield proportion("review_share", int(sent.sum()), len(sent), where, of, alpha=alpha, views=views)


# Rejection -----------------------------------------------------------------------------------------------------------


def rejecter(c: Context, radius: float) -> Rejecter:
    """Return the policy of OOD score and margin at a review share of .05, and the search in ``radius``."""
    flag, _ = flags_of(c)
    clean = chosen(calibrated(c, flag), VIEWS[0])
    edge = {}
    for view, level in Policy.calibrated(clean, ALPHAS[0]).levels.items():
        above = round(level * (len(clean[view]) + 1)) - 1  # clean images beyond the level
        edge[view] = float(np.sort(clean[view])[len(clean[view]) - 1 - above])
    spread = float(clean["ood"].std() / clean["margin"].std())
    return Rejecter(-edge["margin"], flag.score, flag.weight, edge["ood"], spread, radius)


def rejection_rows(c: Context) -> Iterator[Row]:
    """Yield the share of images for which no wrong, accepted point of the ball was found, beside robust accuracy at eps - radius.

    If the search were exact, the first would be at least the second: a wrong point without another label within the radius has wrong
    points nearer to the image. Far above it, the attack is more likely weak than the rejection strong (Tramer, arXiv 2107.11630).
    """
    linf, _, _ = c.ball.threats()
    (image, label), of = c.test(c.suite.hostile), c.subject.graph
    for radius in (share * linf.eps for share in RADII):
        r, about = rejecter(c, radius), {"alpha": ALPHAS[0], "views": VIEWS[0], "radius": radius}
        tries = list(evasions(linf, r, len(c.data.names)))
        holds = np.ones(len(label), bool)
        for attack in tries:
            left = np.flatnonzero(holds)
            title = f"radius {radius * 255:g}/255, {attack.objective}, target {attack.target}"
            (found,) = c.ledger.run(title, [(attack, image[left], label[left])])
            holds[left] = found["holds"]
        images = replace(c.where, attack="reach", norm="linf", eps=linf.eps, steps=EvadeReach.steps, restarts=len(tries))
        yield c.share("accuracy_with_search", holds, images, of, **about)
        inner = Threat("linf", linf.eps - radius)
        masks = c.run("PGD at eps - radius", *(Pgd(inner, objective=name, restarts=2) for name in ("ce", "margin")), n=c.suite.hostile)
        under = replace(c.where, attack="pgd", norm="linf", eps=inner.eps, steps=20, step_over_eps=0.25, restarts=2, iterate="each")
        robust = masks[0]["robust_mask"] & masks[1]["robust_mask"]
        yield c.share("accuracy_less_radius", robust, under, of, radius=radius)
        yield from clean_rejection_rows(c, r, about)


def evasions(threat: Threat, r: Rejecter, classes: int) -> Iterator[EvadeReach]:
    """Yield the adaptive attacks, cheapest first."""
    yield EvadeReach(threat, r, "alone", start="image", steps=40)
    yield EvadeReach(threat, r, "worst")
    yield EvadeReach(threat, r, "sum", start="image")
    if classes > 2:
        yield EvadeReach(threat, r, "worst", 2, "image")


def clean_rejection_rows(c: Context, r: Rejecter, about: dict[str, Any]) -> Iterator[Row]:
    """Yield the share of clean images that are rejected, and the accuracy of those accepted."""
    image, label = c.test(c.suite.looked)
    (found,) = c.ledger.run("clean", [(Predict(), image, label)])
    logits = found["logits"]
    accepted = (margin(logits) >= r.margin) & (score_of(r.score, r.weight, found) <= r.room)
    if r.radius > 0:
        (searched,) = c.ledger.run("search, clean", [(Searched(r.radius, r.steps), image, label)])
        accepted &= searched["stable"]
    right = logits.argmax(axis=1) == label
    yield c.share("clean_rejected", ~accepted, c.where, c.subject.graph, **about)
    yield proportion("accuracy_accepted", int((right & accepted).sum()), int(accepted.sum()), c.where, c.subject.graph, **about)
