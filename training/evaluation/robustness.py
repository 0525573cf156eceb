"""Robust accuracy, and checks for gradient masking."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.rows import Images, Row
from ebjdat_serve.sentences import attack_words
from training.evaluation.attacks import OBJECTIVES, Pgd, Trace, Transfer
from training.evaluation.autoattack import APGD, AutoAttack, ReleasedAutoAttack, Square
from training.evaluation.context import Context
from training.evaluation.evaluated_model import ANSWERS
from training.evaluation.result_cache import Arrays, Task
from training.evaluation.rows import number
from training.methods.adversary import Threat

CURVE = (1, 2, 4, 8)  # multiples of eps; on pixels of 8/255 the last is 64/255
ZERO = 0.02  # largest accuracy of a network without masking at 64/255
SLACK = 0.02  # share of images that only a black-box attack may break, by chance
NO_GRADIENT = 0.01  # share of images that may have no usable gradient
UNMASKING = 5000  # queries of Square where masking is suspected


def robust_rows(c: Context) -> Iterator[Row]:
    """Yield accuracies under PGD-20, APGD, AutoAttack, Square and transferred attacks, and the worst case of all on the same images."""
    linf, half, l2 = c.ball.threats()
    s, eot, rand = c.suite, c.eot, c.subject.random
    robust_masks: dict[str, NDArray[np.bool_]] = {}
    warned: list[tuple[Images, int, int]] = []

    def attacked(metric: str, work: Task, n: int, images: Images, worst: bool = False) -> Row:
        (found,) = c.run(f"{metric} {attack_words(images)}", work, n=n)
        if worst:
            robust_masks[metric] = found["robust_mask"]
        if "notes" in found:
            warned.append((images, c.tell(found, attack_words(images)), len(found["robust_mask"])))
        return c.share(metric, found["robust_mask"], images, c.subject.weights)

    for threat, metric, n in (
        (linf, "accuracy_pgd20", s.attacked),
        (half, "accuracy_pgd20", s.attacked_other),
        (l2, "accuracy_pgd20_l2", s.attacked_other),
    ):
        yield attacked(metric, Pgd(threat, eot=eot), n, under_pgd(c, "ce", threat), threat == linf)
    yield attacked("accuracy_pgd20_margin", Pgd(linf, objective="margin", eot=eot), s.attacked_other, under_pgd(c, "margin", linf), True)
    if s.strong:
        restarts = Pgd(linf, objective="margin", restarts=5, eot=eot)
        yield attacked("accuracy_pgd20_restarts", restarts, s.strong, under_pgd(c, "margin", linf, 5), True)
        if (other := surrogate_of(c)) is not None:
            yield attacked("accuracy_transfer", other, s.strong, under_transfer(c), True)
    if s.strong and c.attackers():
        if not rand:
            yield attacked("accuracy_apgd", AutoAttack(linf, APGD), s.strong, under(c, "apgd", linf), True)
        yield attacked("accuracy_square", Square(linf, s.queries), s.strong, under_square(c, linf, s.queries), True)
    for threat, n in ((linf, s.autoattack), (half, s.autoattack_other), (l2, s.autoattack_other)):
        if n and c.attackers():
            metric = "accuracy_autoattack" + ("_l2" if threat.norm == "l2" else "")
            images = replace(under(c, "autoattack", threat), version="rand" if rand else "standard")
            yield attacked(metric, AutoAttack(threat, rand=rand), n, images, threat == linf)
    yield worst_case(c, robust_masks)
    for images, times, n in warned:
        yield number("autoattack_warnings", times, n, images, c.subject.weights)


def under(c: Context, attack: str, threat: Threat) -> Images:
    """Return the test images under an attack."""
    return replace(c.where, attack=attack, norm=threat.norm, eps=threat.eps)


def under_pgd(c: Context, objective: str, threat: Threat, restarts: int = 1) -> Images:
    """Return the test images under PGD-20."""
    images = replace(under(c, "pgd", threat), objective=objective, steps=20, step_over_eps=0.25, restarts=restarts)
    return replace(images, iterate="last", eot=c.eot, answers=ANSWERS) if c.eot > 1 else replace(images, iterate="each")


def under_square(c: Context, threat: Threat, queries: int) -> Images:
    """Return the test images under Square alone."""
    return replace(under(c, "square", threat), queries=queries)


def surrogate_of(c: Context) -> Transfer | None:
    """Return the transferred attack; without a surrogate for the data, warn and return None."""
    if c.surrogate is None:
        takes = "python training/evaluate.py BUNDLE --surrogate WEIGHTS takes weights of the trainer"
        c.say(f"transfer: not measured, there is no surrogate for {c.data.name}: {takes}")
        return None
    return Transfer(c.ball.threats()[0], str(c.surrogate), c.surrogate_sha256)


def under_transfer(c: Context) -> Images:
    """Return the test images under the transferred attack."""
    assert c.surrogate is not None
    images = replace(under(c, "transfer", c.ball.threats()[0]), steps=20, iterate="last")
    return replace(images, surrogate=c.surrogate.parent.name, surrogate_of=c.surrogate_sha256)


def worst_case(c: Context, robust_masks: dict[str, NDArray[np.bool_]]) -> Row:
    """Return the share of images that are right under every l-inf attack, of the images that all attacks ran on."""
    n = min(map(len, robust_masks.values()))
    whole = np.logical_and.reduce([found[:n] for found in robust_masks.values()])
    images = replace(under(c, "worst_case", c.ball.threats()[0]), attacks=tuple(robust_masks))
    return c.share("accuracy_worst_case", whole, images, c.subject.weights)


def masking_rows(c: Context) -> Iterator[Row]:
    """Yield the checks for gradient masking (arXiv 1802.00420, 1902.06705): 1 passed, 0 failed.

    A failed check does not show that the model is weak, but that its robust accuracies are unreliable.
    """
    linf, _, _ = c.ball.threats()
    of = c.subject.weights
    eps = [linf.eps * factor for factor in CURVE]
    (trace,) = c.run("loss against steps", Trace(linf), n=c.suite.checked)
    curve = c.run("accuracy against eps", *(Pgd(Threat("linf", value), eot=c.eot) for value in eps), n=c.suite.checked)
    shares, n = [found["robust_mask"] for found in curve], len(trace["zero"])
    for value, found in zip(eps, shares, strict=True):
        yield c.share("accuracy_at_eps", found, under_pgd(c, "ce", Threat("linf", value)), of)
    for column, steps in enumerate(Trace(linf).steps):
        images = replace(under(c, "pgd", linf), objective="ce", steps=steps)
        yield number("loss_at_steps", float(trace["loss"][:, column].mean()), n, images, of)
    checks = [*white_box_checks(c, trace, shares, eps[-1]), *black_box_checks(c)]
    yield from checks
    # a model with random outputs is attacked by averaged gradients, which is not masking by itself
    failed = [str(row.check) for row in checks if not row.value and row.check != "deterministic"]
    yield number("masking_suspected", float(bool(failed)), n, c.where, of)
    if failed:
        c.say(f"the robust accuracies of {c.subject.name} cannot be believed: {', '.join(failed)} failed; gradients are probably masked")
        if c.attackers():
            (asked,) = c.run("unmasking", Square(linf, UNMASKING), n=min(50, c.suite.checked))
            yield c.share("accuracy_unmasked", asked["robust_mask"], under_square(c, linf, UNMASKING), of)


def check(c: Context, name: str, passed: bool, n: int, images: Images, observed: dict[str, float], limit: float | None = None) -> Row:
    """Return the row of a check: 1 passed, 0 failed."""
    of = c.subject.weights
    return number(f"check_{name}", float(passed), n, images, of, check=name, observed=observed, limit=limit)


def white_box_checks(c: Context, trace: Arrays, shares: Sequence[NDArray[np.bool_]], widest: float) -> Iterator[Row]:
    """Yield the checks that use only gradients; ``widest`` is the eps of the last of ``shares``."""
    n, where = len(trace["zero"]), c.where
    loss, zero, varied = trace["loss"].astype(np.float64), trace["zero"], trace["varied"]
    robust, left, noisy = float(shares[0].mean()), float(shares[-1].mean()), float(trace["noisy"].mean())
    images = replace(under(c, "pgd", Threat("linf", widest)), steps=20)
    yield check(c, "falls_to_zero", left <= ZERO, n, images, {"accuracy": left}, ZERO)
    mean, change = loss.mean(axis=0), np.diff(loss, axis=1)
    tolerated = 0.01 * np.abs(mean[:-1]).clip(0.1) + 3.5 * change.std(axis=0) / len(loss) ** 0.5  # the last for models with random outputs
    rises = bool(np.isfinite(mean).all() and mean[-1] > mean[0] and (change.mean(axis=0) > -tolerated).all())
    climbed = replace(where, attack="pgd", objective="ce", steps=Trace.steps[-1])
    yield check(c, "loss_rises_with_steps", rises, n, climbed, {"first": float(mean[0]), "last": float(mean[-1])})
    none = float(zero.mean())
    yield check(c, "gradients_exist", none <= NO_GRADIENT, n, where, {"share": none}, NO_GRADIENT)
    yield check(c, "deterministic", not varied.any(), n, where, {"share": float(varied.mean())})
    yield check(c, "noise_is_weaker", noisy >= robust, n, where, {"noise": noisy, "pgd": robust})


def black_box_checks(c: Context) -> Iterator[Row]:
    """Yield the checks that no black-box attack breaks images that the gradient does not."""
    linf, _, _ = c.ball.threats()
    n = min(c.suite.strong, c.suite.checked) or c.suite.checked
    white = np.logical_and.reduce(
        [found["robust_mask"] for found in c.run("white box", *(Pgd(linf, objective=name, eot=c.eot) for name in OBJECTIVES), n=n)]
    )
    boxes: dict[str, Task] = {}
    if (other := surrogate_of(c)) is not None:
        boxes["transfer"] = other
    if c.attackers():
        boxes["square"] = Square(linf, c.suite.queries)
    for name, work in boxes.items():
        (found,) = c.run(f"black box {name}", work, n=n)
        alone, left = float((white & ~found["robust_mask"]).mean()), float(found["robust_mask"].mean())
        seen = {"alone": alone, "black_box": left, "white_box": float(white.mean())}
        yield check(c, f"white_box_beats_{name}", alone <= SLACK, len(white), c.where, seen, SLACK)


def released_rows(c: Context) -> Iterator[Row]:
    """Yield the accuracies of the published EB-JDAT code's protocol: half of the stated 8/255, weaker attacks (docs/evaluation.md)."""
    half, of = c.ball.threats()[1], c.subject.weights
    pgd = Pgd(half, steps=20, step_over_eps=0.125, leave=False)
    (found,) = c.run("released PGD-20", pgd, n=c.suite.attacked)
    images = replace(under(c, "pgd", half), steps=pgd.steps, step_over_eps=pgd.step_over_eps, iterate="last")
    yield c.share("accuracy_pgd20_released_code", found["robust_mask"], images, of)
    if not c.attackers():
        return
    n = c.suite.autoattack or c.suite.strong
    work = ReleasedAutoAttack(half.eps)
    (found,) = c.run("released AutoAttack", work, n=n)
    c.tell(found, "released-code")
    images = replace(under(c, "released_autoattack", half), steps=work.iterations, queries=work.queries)
    yield c.share("accuracy_autoattack_released_code", found["robust_mask"], images, of)
