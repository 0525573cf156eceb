"""Accuracy under attack, and whether the attack can be believed: an honest defence fails where a masked one seems to hold."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from training.evaluation.attacks import Pgd, Trace, Transfer
from training.evaluation.autoattack import APGD, AutoAttack, ReleasedAutoAttack, Square
from training.evaluation.context import Context
from training.evaluation.evaluated_model import ANSWERS
from training.evaluation.result_cache import Arrays, Task
from training.evaluation.rows import Row, eps_name, number, threat_name
from training.methods.adversary import Threat

CURVE = (1, 2, 4, 8)  # multiples of eps; on pixels of 8/255 the last is 64/255
ZERO = 0.02  # of what an honest net keeps at 64/255
SLACK = 0.02  # of the images, that a black box may break alone by chance
OBJECTIVE = {"ce": "cross-entropy", "margin": "the margin"}


def robust_rows(c: Context) -> Iterator[Row]:
    """Yield accuracies under PGD-20, APGD, AutoAttack, Square and transferred attacks, and the worst of all on the same images."""
    linf, half, l2 = c.ball.threats()
    s, eot, rand = c.suite, c.eot, c.subject.random
    standing: dict[str, NDArray[np.bool_]] = {}
    warned: list[tuple[str, int, int]] = []

    def attacked(metric: str, work: Task, n: int, protocol: str, worst: bool = False) -> Row:
        (found,) = c.run(f"{metric} {protocol.split(',')[0]}", work, n=n)
        if worst:
            standing[metric] = found["standing"]
        if "notes" in found:
            warned.append((protocol, c.tell(found, protocol), len(found["standing"])))
        return c.share(metric, found["standing"], c.where, protocol, c.subject.weights)

    for threat, metric, n in (
        (linf, "accuracy_pgd20", s.attacked),
        (half, "accuracy_pgd20", s.attacked_other),
        (l2, "accuracy_pgd20_l2", s.attacked_other),
    ):
        yield attacked(metric, Pgd(threat, eot=eot), n, pgd_name(c, "ce", threat), threat == linf)
    yield attacked("accuracy_pgd20_margin", Pgd(linf, objective="margin", eot=eot), s.attacked_other, pgd_name(c, "margin", linf), True)
    if s.strong:
        restarts = Pgd(linf, objective="margin", restarts=5, eot=eot)
        yield attacked("accuracy_pgd20_restarts", restarts, s.strong, pgd_name(c, "margin", linf, 5), True)
        if (other := surrogate_of(c)) is not None:
            yield attacked("accuracy_transfer", other, s.strong, transfer_name(c), True)
    if s.strong and c.attackers():
        if not rand:
            apgd = f"APGD-CE and APGD-T of AutoAttack, {threat_name(linf)}"
            yield attacked("accuracy_apgd", AutoAttack(linf, APGD), s.strong, apgd, True)
        alone = f"Square alone on what is served, {s.queries} queries, {threat_name(linf)}"
        yield attacked("accuracy_square", Square(linf, s.queries), s.strong, alone, True)
    for threat, n in ((linf, s.autoattack), (half, s.autoattack_other), (l2, s.autoattack_other)):
        if n and c.attackers():
            metric = "accuracy_autoattack" + ("_l2" if threat.norm == "l2" else "")
            protocol = f"official {'rand' if rand else 'standard'} AutoAttack, {threat_name(threat)}"
            yield attacked(metric, AutoAttack(threat, rand=rand), n, protocol, threat == linf)
    yield worst_case(c, standing)
    for protocol, times, n in warned:
        yield number("autoattack_warnings", times, n, c.where, f"times that the package warned: {protocol}", c.subject.weights)


def pgd_name(c: Context, objective: str, threat: Threat, starts: int = 1) -> str:
    """Return PGD-20 in words."""
    begun = f"{starts} random start{'s' if starts > 1 else ''}"
    counted = "each iterate counts"
    if c.eot > 1:
        counted = f"the last iterate counts, gradients averaged over {c.eot} passes, answers the mean of {ANSWERS}"
    return f"PGD-20 on {OBJECTIVE[objective]}, {threat_name(threat)}, step eps/4, {begun}, {counted}"


def surrogate_of(c: Context) -> Transfer | None:
    """Return the transferred attack, or None, said, where there is no surrogate for the data."""
    if c.surrogate is None:
        takes = "python training/evaluate.py BUNDLE --surrogate WEIGHTS takes the trainer's"
        c.say(f"transfer: not measured, there is no surrogate for {c.data.name}: {takes}")
        return None
    return Transfer(c.ball.threats()[0], str(c.surrogate), c.surrogate_sha256)


def transfer_name(c: Context) -> str:
    """Return the transferred attack in words."""
    assert c.surrogate is not None
    made = f"PGD-20 on the surrogate {c.surrogate.parent.name} ({c.surrogate_sha256[:8]})"
    return f"{made}, {threat_name(c.ball.threats()[0])}, last iterate"


def worst_case(c: Context, standing: dict[str, NDArray[np.bool_]]) -> Row:
    """Return the share of images that every l-inf attack left standing, on the images that all were run on."""
    n = min(map(len, standing.values()))
    names = ", ".join(name.removeprefix("accuracy_") for name in standing)
    whole = np.logical_and.reduce([found[:n] for found in standing.values()])
    protocol = f"left by every one of {names}; {threat_name(c.ball.threats()[0])}"
    return c.share("accuracy_worst_case", whole, c.where, protocol, c.subject.weights)


def masking_rows(c: Context) -> Iterator[Row]:
    """Yield the checks that tell an honest defence from a masked gradient (arXiv 1802.00420, 1902.06705): 1 passed, 0 failed.

    A failed check does not say that the model is weak: it says that its robust accuracies cannot be believed.
    """
    linf, _, _ = c.ball.threats()
    of = c.subject.weights
    eps = [linf.eps * factor for factor in CURVE]
    (trace,) = c.run("loss against steps", Trace(linf), n=c.suite.checked)
    curve = c.run("accuracy against eps", *(Pgd(Threat("linf", value), eot=c.eot) for value in eps), n=c.suite.checked)
    shares, n = [found["standing"] for found in curve], len(trace["zero"])
    for value, found in zip(eps, shares, strict=True):
        yield c.share("accuracy_at_eps", found, c.where, pgd_name(c, "ce", Threat("linf", value)), of)
    for column, steps in enumerate(Trace(linf).steps):
        yield number(
            "loss_at_steps", float(trace["loss"][:, column].mean()), n, c.where, f"mean cross-entropy after {steps} steps of PGD", of
        )
    checks = {name: (passed, said, n) for name, (passed, said) in white_box_checks(trace, shares, eps_name(eps[-1]))}
    checks.update(black_box_checks(c))
    for name, (passed, protocol, count) in checks.items():
        yield number(f"check_{name}", float(passed), count, c.where, protocol, of)
    # a model that answers at random is attacked by averaged gradients, which is no masking by itself
    failed = [name for name, (passed, _, _) in checks.items() if not passed and name != "deterministic"]
    yield number("masking_suspected", float(bool(failed)), n, c.where, "1 when any check but determinism failed", of)
    if failed:
        c.say(f"the robust accuracies of {c.subject.name} cannot be believed: {', '.join(failed)} failed; gradients are probably masked")
        if c.attackers():
            (asked,) = c.run("unmasking", Square(linf, 5000), n=min(50, c.suite.checked))
            protocol = f"because masking is suspected: Square of 5000 queries, {threat_name(linf)}; an upper bound"
            yield c.share("accuracy_unmasked", asked["standing"], c.where, protocol, of)


def white_box_checks(trace: Arrays, shares: Sequence[NDArray[np.bool_]], widest: str) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Yield (name, (passed, protocol)) of what gradients alone tell."""
    loss, zero, varied = trace["loss"].astype(np.float64), trace["zero"], trace["varied"]
    standing, left, noisy = float(shares[0].mean()), float(shares[-1].mean()), float(trace["noisy"].mean())
    yield "falls_to_zero", (left <= ZERO, f"accuracy under PGD-20 at l-inf {widest} is {left:.3f}, at most {ZERO}")
    mean, change = loss.mean(axis=0), np.diff(loss, axis=1)
    tolerated = (
        0.01 * np.abs(mean[:-1]).clip(0.1) + 3.5 * change.std(axis=0) / len(loss) ** 0.5
    )  # the last for models that answer at random
    rises = bool(np.isfinite(mean).all() and mean[-1] > mean[0] and (change.mean(axis=0) > -tolerated).all())
    yield "loss_rises_with_steps", (rises, f"mean cross-entropy from 1 to 50 steps: {mean[0]:.3g} to {mean[-1]:.3g}, never falling")
    yield "gradients_exist", (zero.mean() <= 0.01, f"no usable gradient at {zero.mean():.3f} of the images, at most 0.01")
    yield (
        "deterministic",
        (not varied.any(), f"two answers differ on {varied.mean():.3f} of the images; if they do, gradients are averaged"),
    )
    yield (
        "noise_is_weaker",
        (noisy >= standing, f"accuracy under uniform noise in the ball {noisy:.3f}, no lower than {standing:.3f} under PGD"),
    )


def black_box_checks(c: Context) -> Iterator[tuple[str, tuple[bool, str, int]]]:
    """Yield (name, (passed, protocol, n)) of what a black box breaks that the gradient does not, on the same images."""
    linf, _, _ = c.ball.threats()
    n = min(c.suite.strong, c.suite.checked) or c.suite.checked
    white = np.logical_and.reduce(
        [found["standing"] for found in c.run("white box", *(Pgd(linf, objective=name, eot=c.eot) for name in OBJECTIVE), n=n)]
    )
    boxes: dict[str, Task] = {}
    if (other := surrogate_of(c)) is not None:
        boxes["transfer"] = other
    if c.attackers():
        boxes["square"] = Square(linf, c.suite.queries)
    for name, work in boxes.items():
        (found,) = c.run(f"black box {name}", work, n=n)
        alone, left = float((white & ~found["standing"]).mean()), float(found["standing"].mean())
        said = f"{name} breaks {alone:.3f} of the images that PGD-20 on both objectives leaves, at most {SLACK}; {name} {left:.3f}"
        yield f"white_box_beats_{name}", (alone <= SLACK, f"{said}, white box {white.mean():.3f}", len(white))


def released_rows(c: Context) -> Iterator[Row]:
    """Yield what the published EB-JDAT code computes and calls 8/255: half of it, and a weakened list (docs/evaluation.md)."""
    half, of = c.ball.threats()[1], c.subject.weights
    pgd = Pgd(half, steps=20, step_over_eps=0.125, leave=False)
    (found,) = c.run("released PGD-20", pgd, n=c.suite.attacked)
    protocol = f"released-code: PGD-20, 8/255 of [-1,1] = {threat_name(half)}, step eps/8, last iterate"
    yield c.share("accuracy_pgd20_released_code", found["standing"], c.where, protocol, of)
    if not c.attackers():
        return
    n = c.suite.autoattack or c.suite.strong
    (found,) = c.run("released AutoAttack", ReleasedAutoAttack(half.eps), n=n)
    c.tell(found, "released-code")
    listed = "APGD-CE 20, untargeted APGD-DLR 20, FAB-T 20 clamped to the wrong box, Square 5,000"
    protocol = f"released-code: {listed}, 8/255 of [-1,1] = {threat_name(half)}"
    yield c.share("accuracy_autoattack_released_code", found["standing"], c.where, protocol, of)
