"""Accuracy under attack, and whether the attack can be believed: an honest defence fails where a masked one seems to hold."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from training.adversary import Threat
from training.errors import TrainingError
from training.evaluation.attacks import Look, Pgd, Trace, Transfer
from training.evaluation.autoattack import APGD, AutoAttack, ReleasedAutoAttack, Square, package, tally
from training.evaluation.context import Context
from training.evaluation.ledger import Arrays, Work
from training.evaluation.rows import Row, eps_name, number, threat_name

EOT = 16
CURVE = (1, 2, 4, 8)  # multiples of eps; on pixels of 8/255 the last is 64/255
ZERO = 0.02  # of what an honest net keeps at 64/255
SLACK = 0.02  # of the images, that a black box may break alone by chance
PGD = "PGD-20 on {}, {}, step eps/4, 1 random start, each iterate counts"
OBJECTIVE = {"ce": "cross-entropy", "margin": "the margin"}


def robust_rows(c: Context) -> Iterator[Row]:
    """Yield accuracies under PGD-20, APGD, AutoAttack, Square and transferred attacks, and the worst of all on the same images."""
    linf, half, l2 = c.ball.threats()
    s, of = c.suite, c.subject.weights
    eot = eot_of(c)
    also = f", gradients averaged over {eot} passes, the class a majority of 10" if eot > 1 else ""
    rand = eot > 1
    standing: dict[str, NDArray[np.bool_]] = {}

    def attacked(metric: str, work: Work, n: int, protocol: str, worst: bool = False) -> Iterator[Row]:
        (found,) = c.run(f"{metric} {protocol.split(',')[0]}", work, n=n)
        if worst:
            standing[metric] = found["standing"]
        for line in tally(found.get("notes", np.empty(0, np.str_))):
            c.say(f"{protocol}: {line}")
        yield c.share(metric, found["standing"], c.where, protocol + (also if isinstance(work, Pgd) else ""), of)

    for threat, metric in ((linf, "accuracy_pgd20"), (half, "accuracy_pgd20"), (l2, "accuracy_pgd20_l2")):
        yield from attacked(metric, Pgd(threat, eot=eot), s.attacked, PGD.format(OBJECTIVE["ce"], threat_name(threat)), threat == linf)
    margin = PGD.format(OBJECTIVE["margin"], threat_name(linf))
    yield from attacked("accuracy_pgd20_margin", Pgd(linf, objective="margin", eot=eot), s.attacked, margin, True)
    if s.strong:
        restarts = f"PGD-20 on the margin, {threat_name(linf)}, step eps/4, 5 random starts, each iterate counts"
        yield from attacked("accuracy_pgd20_restarts", Pgd(linf, objective="margin", restarts=5, eot=eot), s.strong, restarts, True)
        yield from transferred(c, attacked)
        try:
            package()
        except TrainingError as error:
            c.say(f"not measured: {error}")
            yield from worst_case(c, standing)
            return
        if not rand:
            apgd = f"APGD-CE and APGD-T of AutoAttack, {threat_name(linf)}"
            yield from attacked("accuracy_apgd", AutoAttack(linf, APGD), s.strong, apgd, True)
        alone = f"Square alone on what is served, {s.queries} queries, {threat_name(linf)}"
        yield from attacked("accuracy_square", Square(linf, s.queries), s.strong, alone, True)
    yield from worst_case(c, standing)
    if s.autoattack:
        for threat in (linf, half, l2):
            metric = "accuracy_autoattack" + ("_l2" if threat.norm == "l2" else "")
            protocol = f"official {'rand' if rand else 'standard'} AutoAttack, {threat_name(threat)}"
            yield from attacked(metric, AutoAttack(threat, rand=rand), s.autoattack, protocol, threat == linf)
        yield from worst_case(c, standing)


def transferred(c: Context, attacked: Callable[..., Iterator[Row]]) -> Iterator[Row]:
    """Yield the accuracy on images made on the surrogate, where there is one."""
    linf, _, _ = c.ball.threats()
    if c.surrogate is None:
        c.say(f"not measured: transfer, for there is no surrogate for {c.data.name}: name weights of the trainer with --surrogate")
        return
    work = Transfer(linf, str(c.surrogate), c.surrogate_sha256)
    protocol = f"PGD-20 on the surrogate {c.surrogate.parent.name} ({c.surrogate_sha256[:8]}), {threat_name(linf)}, last iterate"
    yield from attacked("accuracy_transfer", work, c.suite.strong, protocol, True)


def worst_case(c: Context, standing: dict[str, NDArray[np.bool_]]) -> Iterator[Row]:
    """Yield the share of images that every l-inf attack so far left standing, on the images that all were run on."""
    n = min(map(len, standing.values()))
    names = ", ".join(name.removeprefix("accuracy_") for name in standing)
    whole = np.logical_and.reduce([found[:n] for found in standing.values()])
    yield c.share(
        "accuracy_worst_case", whole, c.where, f"left by every one of {names}; {threat_name(c.ball.threats()[0])}", c.subject.weights
    )


def eot_of(c: Context) -> int:
    """Return how many passes a gradient is averaged over: more than one where 20 images, asked twice, are answered differently."""
    image, label = c.test(20)
    first, second = (Look().run(c.subject, image, label)["logits"] for _ in range(2))
    return EOT if np.abs(first - second).max() > 1e-4 * np.abs(first).max() else 1


def masking_rows(c: Context) -> Iterator[Row]:
    """Yield the checks that tell an honest defence from a masked gradient (arXiv 1802.00420, 1902.06705): 1 passed, 0 failed.

    A failed check does not say that the model is weak: it says that its robust accuracies cannot be believed.
    """
    linf, _, _ = c.ball.threats()
    n, of = c.suite.checked, c.subject.weights
    eps = [linf.eps * factor for factor in CURVE]
    (trace,) = c.run("loss against steps", Trace(linf), n=n)
    eot = eot_of(c)
    curve = c.run("accuracy against eps", *(Pgd(Threat("linf", value), eot=eot) for value in eps), n=n)
    shares = [found["standing"] for found in curve]
    for value, found in zip(eps, shares, strict=True):
        yield c.share("accuracy_at_eps", found, c.where, PGD.format(OBJECTIVE["ce"], f"l-inf {eps_name(value)}"), of)
    for column, steps in enumerate(Trace(linf).steps):
        yield number(
            "loss_at_steps", float(trace["loss"][:, column].mean()), n, c.where, f"mean cross-entropy after {steps} steps of PGD", of
        )
    checks = dict(white_box_checks(trace, shares, eps_name(eps[-1])))
    checks.update(black_box_checks(c))
    for name, (passed, protocol) in checks.items():
        yield number(f"check_{name}", float(passed), n, c.where, protocol, of)
    # a model that answers at random is attacked by averaged gradients, which is no masking by itself
    failed = [name for name, (passed, _) in checks.items() if not passed and name != "deterministic"]
    if failed:
        c.say(f"the robust accuracies of {c.subject.name} cannot be believed: {', '.join(failed)} failed; gradients are probably masked")
    yield number("masking_suspected", float(bool(failed)), n, c.where, "1 when any check but determinism failed", of)


def white_box_checks(trace: Arrays, shares: Sequence[NDArray[np.bool_]], widest: str) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Yield (name, (passed, protocol)) of what gradients alone tell."""
    loss, zero, varied = trace["loss"].astype(np.float64), trace["zero"], trace["varied"]
    standing, left, noisy = float(shares[0].mean()), float(shares[-1].mean()), float(trace["noisy"].mean())
    yield "falls_to_zero", (left <= ZERO, f"accuracy under PGD-20 at l-inf {widest} is {left:.3f}, at most {ZERO}")
    mean, change = loss.mean(axis=0), np.diff(loss, axis=1)
    tolerated = 0.01 * np.abs(mean[:-1]).clip(0.1) + 2 * change.std(axis=0) / len(loss) ** 0.5  # the last for models that answer at random
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


def black_box_checks(c: Context) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Yield (name, (passed, protocol)) of what a black box breaks that the gradient does not, on the same images."""
    linf, _, _ = c.ball.threats()
    n = min(c.suite.strong, c.suite.checked) or c.suite.checked
    white = np.logical_and.reduce(
        [found["standing"] for found in c.run("white box", *(Pgd(linf, objective=name, eot=eot_of(c)) for name in OBJECTIVE), n=n)]
    )
    boxes: dict[str, Work] = {}
    if c.surrogate is not None:
        boxes["transfer"] = Transfer(linf, str(c.surrogate), c.surrogate_sha256)
    try:
        package()
        boxes["square"] = Square(linf, c.suite.queries)
    except TrainingError as error:
        c.say(f"not measured: {error}")
    for name, work in boxes.items():
        (found,) = c.run(f"black box {name}", work, n=n)
        alone = float((white & ~found["standing"]).mean())
        left = float(found["standing"].mean())
        said = f"{name} breaks {alone:.3f} of {n} images that PGD-20 on both objectives leaves, at most {SLACK}; {name} {left:.3f}"
        yield f"white_box_beats_{name}", (alone <= SLACK, f"{said}, white box {white.mean():.3f}")


def released_rows(c: Context) -> Iterator[Row]:
    """Yield what the published EB-JDAT code computes and calls 8/255: half of it, and a weakened list (docs/evaluation.md)."""
    half, of = c.ball.threats()[1], c.subject.weights
    pgd = Pgd(half, steps=20, step_over_eps=0.125, leave=False)
    (found,) = c.run("released PGD-20", pgd, n=c.suite.attacked)
    protocol = f"released-code: PGD-20, 8/255 of [-1,1] = {threat_name(half)}, step eps/8, last iterate"
    yield c.share("accuracy_pgd20_released_code", found["standing"], c.where, protocol, of)
    n = c.suite.autoattack or c.suite.strong
    (found,) = c.run("released AutoAttack", ReleasedAutoAttack(half.eps), n=n)
    listed = "APGD-CE 20, untargeted APGD-DLR 20, FAB-T 20 clamped to the wrong box, Square 5,000"
    protocol = f"released-code: {listed}, 8/255 of [-1,1] = {threat_name(half)}"
    yield c.share("accuracy_autoattack_released_code", found["standing"], c.where, protocol, of)
