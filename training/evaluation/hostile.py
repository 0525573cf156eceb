"""Adaptive attacks on the flag: robust OOD detection, and robust accuracy with rejection."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.rows import Images, Row
from training.data.image_folders import spread
from training.evaluation.adaptive import VARIANTS, Evade, EvadeBySquare, ScoreAttack
from training.evaluation.attacks import Pgd, Predict
from training.evaluation.autoattack import APGD, AutoAttack
from training.evaluation.context import Context
from training.evaluation.flags import Flag, alphas, flags_of, with_baseline
from training.evaluation.ood import auroc_row, ood_sets
from training.evaluation.ood_sets import MIXED, NEAR
from training.evaluation.result_cache import Task
from training.evaluation.view_scores import without_form

QUERIES = 1000  # of Square on the flag, at most


def hostile_rows(c: Context) -> Iterator[Row]:
    """Yield the figures under adaptive attack: robust OOD detection, and robust accuracy with rejection."""
    if not c.attackers():
        return
    flag, every = flags_of(c)
    if c.subject.views and (blind := without_form(c.subject.views.combination)):
        c.say(f"views {', '.join(blind)} have no differentiable form: gradients attack the sum of the others, Square all of it")
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
    name = NEAR if NEAR in found else MIXED
    junk = found[name][spread(len(found[name]), n)]
    none = np.zeros(len(junk), np.int64)
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
