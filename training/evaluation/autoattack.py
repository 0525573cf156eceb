"""AutoAttack (arXiv 2003.01690) from the package pyautoattack, with its warnings; and the released EB-JDAT code's version of it."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.install import install
from training.errors import TrainingError
from training.evaluation.attacks import tensors
from training.evaluation.evaluated_model import EvaluatedModel
from training.evaluation.result_cache import Arrays, notes
from training.evaluation.rows import SEED
from training.methods.adversary import Threat

NORMS = {"linf": "Linf", "l2": "L2"}
APGD = ("apgd-ce", "apgd-t")


@dataclass(frozen=True)
class AutoAttack:
    """The standard version with the official settings, or some of its ``attacks``; ``rand``: the version for models with random outputs."""

    threat: Threat
    attacks: tuple[str, ...] = ()
    rand: bool = False

    @property
    def cost(self) -> float:
        """Return the forward passes per image, assuming that half of the images skip the later attacks."""
        return 1500.0 if self.attacks else 6000.0

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return robust_mask (N,), logits (N, K) and terms (N, V) of its images, and notes: warnings, and the images each attack left."""
        x_adv, said = self.attacked(subject, image, label)
        found = subject.look(x_adv.cpu().numpy())
        right = (subject.logits(image).argmax(axis=1) == label) & (found["logits"].argmax(axis=1) == label)
        return {"robust_mask": right, **found, "notes": notes(said)}

    def points(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Tensor:
        """Return the points that fool the model, and the images that no attack fooled, (N, 3, H, W)."""
        return self.attacked(subject, image, label)[0]

    def attacked(self, subject: EvaluatedModel, image: Floats, label: Labels) -> tuple[Tensor, list[str]]:
        """Return the points (N, 3, H, W) and the notes."""
        x, y = tensors(subject, image, label)
        count = subject.logits(image[:1]).shape[1]
        named = list(self.attacks) or ["apgd-ce", "apgd-t", "fab-t", "square"]
        chosen = [name for name in named if name not in ("apgd-t", "apgd-dlr") or count > 3]  # the DLR losses use three and four logits
        version: dict[str, Any] = {"version": "rand"} if self.rand and count > 2 else {"version": "custom", "attacks": chosen}
        if not self.attacks and not self.rand and chosen == named:
            version = {"version": "standard"}
        attack = package().AutoAttack(
            Logits(subject), norm=NORMS[self.threat.norm], eps=self.threat.eps, seed=SEED, device=x.device, **version
        )
        attack.apgd.n_restarts = attack.fab.n_restarts = 1  # as in the standard version; the class's default is 5
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(9, count - 1)
        with captured_log() as lines:
            x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        check_ball(x_adv, x, self.threat)
        left_out = [f"{name} is not run: it needs four classes" for name in named if name not in chosen]
        return x_adv, [*summary(lines, len(label)), *left_out]


@dataclass(frozen=True)
class Square:
    """Square (arXiv 1912.00049), the black-box check, on the served model."""

    threat: Threat
    queries: int = 5000

    @property
    def cost(self) -> float:
        """Return the forward passes per image, assuming that half of the images take all queries."""
        return self.queries / 2

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return robust_mask (N,), and logits (N, K) and terms (N, V) of its images."""
        found = subject.look(self.points(subject, image, label).numpy())
        right = (subject.logits(image).argmax(axis=1) == label) & (found["logits"].argmax(axis=1) == label)
        return {"robust_mask": right, **found}

    def points(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Tensor:
        """Return the points that fool the served model, and the images that were wrong before or that it did not fool, (N, 3, H, W)."""
        x, y = torch.from_numpy(image), torch.from_numpy(label)
        right = torch.from_numpy(subject.logits(image).argmax(axis=1) == label)
        if not right.any():
            return x
        attack = square(lambda z: torch.from_numpy(subject.logits(z.numpy()).copy()), self.threat, self.queries)
        return x.masked_scatter(right[:, None, None, None].expand_as(x), attack.perturb(x[right], y[right]))


@dataclass(frozen=True)
class ReleasedAutoAttack:
    """The attacks that the published EB-JDAT code calls AutoAttack, including its errors (reference: docs/evaluation.md).

    Images in [-1,1] with eps 8/255, which is 4/255 here; APGD-CE and untargeted APGD-DLR of 20 iterations, FAB-T of 20 that
    clamps to [0,1] images in [-1,1], Square of 5,000 queries; no targeted APGD.
    """

    eps: float = 4 / 255
    iterations: int = 20
    queries: int = 5000

    @property
    def cost(self) -> float:
        return 2500.0

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return robust_mask (N,)."""
        package()
        from pyautoattack.autopgd_base import APGDAttack
        from pyautoattack.fab_pt import FABAttack_PT

        x, y = tensors(subject, image, label)
        model, common = Logits(subject), {"norm": "Linf", "n_restarts": 1, "seed": SEED, "device": x.device}
        threat = Threat("linf", self.eps)
        log = logging.getLogger("auto-attack")
        count = subject.logits(image[:1]).shape[1]
        losses = ("ce", "dlr") if count > 2 else ("ce",)
        apgd = [APGDAttack(model, n_iter=self.iterations, eps=self.eps, loss=loss, logger=log, **common) for loss in losses]
        fab = FABAttack_PT(
            lambda z: model((z + 1) / 2),
            n_iter=self.iterations,
            eps=2 * self.eps,
            targeted=True,
            n_target_classes=min(9, count - 1),
            **common,
        )
        makers = [attack.perturb for attack in apgd]
        makers.append(lambda x, y: (fab.perturb(2 * x - 1, y) + 1) / 2)
        makers.append(square(model, threat, self.queries, x.device).perturb)
        robust_mask = torch.from_numpy(subject.logits(image).argmax(axis=1) == label).to(x.device)
        with captured_log() as lines:
            for perturb in makers:
                left = robust_mask.nonzero().flatten()
                if not len(left):
                    break
                x_adv = perturb(x[left].clone(), y[left].clone()).detach()
                inside = (x_adv - x[left]).abs().flatten(1).amax(dim=1) <= self.eps + 1e-5
                fooled = torch.from_numpy(subject.logits(x_adv.cpu().numpy()).argmax(axis=1)).to(x.device) != y[left]
                robust_mask[left] = ~(fooled & inside)
        return {"robust_mask": robust_mask.cpu().numpy(), "notes": notes(summary(lines, len(label)))}


class Logits(nn.Module):
    """The network for the package, with contiguous input gradients, which the package reshapes."""

    def __init__(self, subject: EvaluatedModel) -> None:
        super().__init__()
        self.network = subject.network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(Contiguous.apply(x)).float()  # type: ignore[no-untyped-call]
        # the package needs a gradient even where the model has none: zero, which it warns about
        return logits if logits.requires_grad or not x.requires_grad else logits + 0.0 * x.sum()


class Contiguous(torch.autograd.Function):
    """The identity, with a contiguous, finite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient, contiguous, 0 where it is not a number, which l2 steps would spread over the image."""
        return torch.nan_to_num(gradient, 0.0, 0.0, 0.0).contiguous()


def package() -> Any:
    """Return pyautoattack; raise TrainingError naming the extra when it is not installed."""
    try:
        import pyautoattack
    except ImportError as error:
        raise TrainingError(f"AutoAttack and Square need the package pyautoattack: {install('evaluate')}") from error
    return pyautoattack


def square(model: Any, threat: Threat, queries: int, device: torch.device | str = "cpu") -> Any:
    """Return the package's Square with AutoAttack's parameters; ``device`` is that of its images."""
    package()
    from pyautoattack.square import SquareAttack

    return SquareAttack(
        model, NORMS[threat.norm], queries, threat.eps, p_init=0.8, n_restarts=1, seed=SEED, resc_schedule=False, device=device
    )


def check_ball(x_adv: Tensor, x: Tensor, threat: Threat) -> None:
    """Raise TrainingError when an attack left its ball or the box, which makes its figure invalid."""
    moved = (x_adv - x).flatten(1)
    worst = float((moved.abs().amax(dim=1) if threat.norm == "linf" else moved.norm(dim=1)).max())
    if (
        not bool(torch.isfinite(x_adv).all())
        or worst > threat.eps + 1e-4 * max(1.0, threat.eps)
        or float(x_adv.min()) < -1e-6
        or float(x_adv.max()) > 1 + 1e-6
    ):
        raise TrainingError(f"AutoAttack left its ball or is not finite: {worst} for {threat.eps}")


@contextmanager
def captured_log() -> Iterator[list[tuple[int, str]]]:
    """Collect the package's log records as (level, message), and keep them off the terminal."""
    lines: list[tuple[int, str]] = []
    log = logging.getLogger("auto-attack")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    counted = package().checks.funcs  # call counts that the package never resets, and mistakes for a dynamic defence
    counted.update(dict.fromkeys(counted, 0))
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def summary(lines: list[tuple[int, str]], n: int) -> list[str]:
    """Return each distinct warning with its count, and the number of images that each attack left."""
    warned = Counter(re.sub(r"\s*See flags_doc.md for details.", "", text) for level, text in lines if level >= logging.WARNING)
    left = [re.search(r"robust accuracy after (\S+): ([\d.]+)%", text) for _, text in lines]
    stages = [f"{found[1].lower()} left {round(float(found[2]) / 100 * n)}" for found in left if found]
    return [f"warning ({count} times): {text}" for text, count in warned.items()] + stages


def tally(stages: np.ndarray) -> tuple[list[str], int]:
    """Return the notes of all chunks in total, warnings by kind and the images each attack left, and the number of warnings."""
    warned: Counter[str] = Counter()
    left: Counter[str] = Counter()  # a chunk with no image left has no note of the later attacks, which adds 0
    for line in stages.tolist():
        if found := re.match(r"(\S+) left (\d+)$", line):
            left[found[1]] += int(found[2])
        elif line.endswith("four classes"):
            warned[line] += 1
        elif found := re.match(r"warning \((\d+) times\): (.*)$", line):
            warned[re.sub(r"\d+(\.\d+)?", "#", found[2])] += int(found[1])
    warnings = [f"AutoAttack warned {count} times: {text}" for text, count in warned.items()]
    return warnings + [f"{name} left {kept}" for name, kept in left.items()], warned.total()
