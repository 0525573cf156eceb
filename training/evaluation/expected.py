"""What an evaluation will cost, said before it begins: images, gradients of each, and seconds as one gradient takes here."""

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from training.evaluation.adaptive import VARIANTS, Evade, EvadeBySquare, ScoreAttack
from training.evaluation.attacks import OBJECTIVES, Pgd, Predict, Trace, Transfer, input_gradient
from training.evaluation.autoattack import APGD, AutoAttack, Square
from training.evaluation.context import Context
from training.evaluation.explanation import SEARCHES, Explain
from training.evaluation.hostile import QUERIES
from training.evaluation.ood import FACTORS
from training.evaluation.result_cache import Task
from training.evaluation.robustness import CURVE, UNMASKING
from training.loop.clock import duration
from training.methods.adversary import cross_entropy

PASSES = 3.0
"""Forward passes that a gradient takes as long as: tasks state their costs in them."""
WARM = 2
"""Images of the timed gradients."""
Amount = tuple[Task, int]
"""A task, and the number of images it is run on."""


def robustness(c: Context) -> Iterable[Amount]:
    """Yield the attacks of the part ``robustness``."""
    s, (linf, half, l2), eot, rand = c.suite, c.ball.threats(), c.eot, c.subject.random
    yield from [(Pgd(linf, eot=eot), s.attacked), (Pgd(half, eot=eot), s.attacked_other), (Pgd(l2, eot=eot), s.attacked_other)]
    yield Pgd(linf, eot=eot), s.attacked_other  # of the margin
    yield Pgd(linf, restarts=5, eot=eot), s.strong
    if c.surrogate is not None:
        yield Transfer(linf, str(c.surrogate), c.surrogate_sha256), s.strong
    if not c.attackers():
        return
    if not rand:
        yield AutoAttack(linf, APGD), s.strong
    yield Square(linf, s.queries), s.strong
    for threat, n in ((linf, s.autoattack), (half, s.autoattack_other), (l2, s.autoattack_other)):
        yield AutoAttack(threat, rand=rand), n


def masking(c: Context) -> Iterable[Amount]:
    """Yield the work of the part ``masking``."""
    s, (linf, _, _) = c.suite, c.ball.threats()
    few = min(s.strong, s.checked) or s.checked
    yield Trace(linf), s.checked
    yield from [(Pgd(linf, eot=c.eot), s.checked)] * len(CURVE)
    yield from [(Pgd(linf, eot=c.eot), few)] * len(OBJECTIVES)
    if c.surrogate is not None:
        yield Transfer(linf, str(c.surrogate), c.surrogate_sha256), few
    if c.attackers():
        yield Square(linf, s.queries), few


def suspicion(c: Context) -> Iterable[Amount]:
    """Return the work of the part ``suspicion``: sets that are looked at with their gradients, and attacked ones."""
    s, (linf, _, _) = c.suite, c.ball.threats()
    yield Predict(gradient=True), 8 * s.test + len(c.data.calibration)
    yield from [(Pgd(linf, leave=False, eot=c.eot), s.looked)] * len(FACTORS)
    if c.surrogate is not None:
        yield Transfer(linf, str(c.surrogate), c.surrogate_sha256), s.looked
    if c.attackers():
        yield AutoAttack(linf, rand=c.subject.random), s.autoattack


def hostile(c: Context) -> Iterable[Amount]:
    """Return the work of the part ``hostile``, of the served score and max softmax."""
    s, (linf, half, _) = c.suite, c.ball.threats()
    queries, levels = min(s.queries, QUERIES), 2 if s.thorough else 1
    scores = 1 if c.subject.views is None else 2 + s.thorough
    for _ in range(scores):
        yield from [(ScoreAttack(linf, "energy", 0.0, True, queries), s.hostile)] * 2
        for _ in range(levels):
            yield from [(Evade(linf, "energy", 0.0, 0.0, 1.0, variant), s.hostile) for variant in VARIANTS]
            yield EvadeBySquare(linf, "energy", 0.0, 0.0, 1.0, queries), s.hostile
    yield AutoAttack(linf, APGD, rand=c.subject.random), s.hostile
    yield Pgd(half, restarts=2, eot=c.eot), s.hostile


def explanation(c: Context) -> Iterable[Amount]:
    """Return the searches of the part ``explanation``, towards two classes."""
    return [(Explain(norm, 0.0, least), c.suite.looked) for norm, least in SEARCHES] * 2


WORK = {"robustness": robustness, "masking": masking, "suspicion": suspicion, "hostile": hostile, "explanation": explanation}
"""The parts that take most of the time; the others predict, or draw samples."""


def gradients(c: Context, part: str) -> tuple[int, float]:
    """Return the images of a part, each time it is worked on, and the gradients of all; AutoAttack's by its usual course."""
    amounts = [(task, n) for task, n in WORK[part](c) if n]
    return sum(n for _, n in amounts), sum(task.cost / PASSES * n for task, n in amounts)


def seconds_each(c: Context) -> float:
    """Return the seconds that the gradient of one image takes here, in one process."""
    image, label = c.test(WARM)
    x, y = torch.from_numpy(np.ascontiguousarray(image)).to(c.subject.device), torch.from_numpy(label).to(c.subject.device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        input_gradient(c.subject.network, x, y, cross_entropy)[1].cpu()
        times.append(time.perf_counter() - began)
    return min(times) / len(image)


def expected(c: Context, parts: Sequence[str]) -> list[str]:
    """Return what the parts that attack will cost, in lines; of a model without a network why none is attacked."""
    if c.subject.no_network:
        return [f"no attack is measured: {c.subject.no_network}"]
    known = [part for part in parts if part in WORK]
    if not known:
        return []
    each = seconds_each(c)
    total = 0.0
    lines = [f"expected of the attacks, less what is kept of before; a gradient of one image takes {each:.3g} s here:"]
    for part in known:
        n, count = gradients(c, part)
        total += count * each / c.ledger.processes
        lines.append(f"  {part:12}{n:>8,} images, {count:>12,.0f} gradients, about {duration(count * each / c.ledger.processes)}")
    if "masking" in known:
        more = Square(c.ball.threats()[0], UNMASKING).cost / PASSES * min(50, c.suite.checked)
        lines.append(f"  {'':12}and {more:,.0f} gradients' time more should gradients look masked")
    others = [part for part in parts if part not in WORK]
    also = f", and {', '.join(others)}" if others else ""
    return [*lines, f"  about {duration(total)} in all{also}; --n and --amount NAME=N bound it"]
