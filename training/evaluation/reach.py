"""How well margin, walk and search tell attacked images from clean ones, what they cost, and what an attacker who knows them reaches."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebjdat_serve import reach
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.scores import ood_score
from training.evaluation.adaptive import gradient_of
from training.evaluation.attacks import tensors
from training.evaluation.evaluated_model import EvaluatedModel
from training.evaluation.flags import score_of
from training.evaluation.metrics import Array
from training.evaluation.result_cache import Arrays
from training.evaluation.rows import SEED
from training.methods.adversary import Threat, ascent, project

BATCH = 50
"""Images of one call, so that a call of twice as many fits the caches."""


class Attack(Protocol):
    """An attack that says where it ends."""

    @property
    def cost(self) -> float:
        """Return the cost per image in forward passes."""

    def points(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Tensor:
        """Return the final points, (N, 3, H, W)."""


@dataclass(frozen=True)
class Points:
    """The images that an attack makes."""

    attack: Attack

    @property
    def cost(self) -> float:
        return self.attack.cost

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return image (N, 3, H, W), and the served logits (N, K) and terms (N, V) there."""
        made = self.attack.points(subject, image, label).cpu().numpy()
        return {"image": made, **subject.look(made)}


@dataclass(frozen=True)
class Served:
    """The part of an engine that walk and search use, of any evaluated model."""

    subject: EvaluatedModel

    def classify(self, image: Floats) -> tuple[Floats, Floats]:
        """Return logits (N, K) and energy E(x) (N,), nats."""
        logits = self.subject.logits(image)
        return logits, ood_score("energy", 0.0, logits)

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,)."""
        return self.subject.score(image, label)


@dataclass(frozen=True)
class Walk:
    """The walk towards the runner-up."""

    steps: int = reach.STEPS
    step_size: float = reach.STEP_SIZE

    @property
    def cost(self) -> float:
        return 6.0 * self.steps + 2.0

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return logits (N, K), terms (N, V) and leads (N, steps + 1): f_b - f_a along the walk."""
        engine, found = Served(subject), subject.look(image)
        batches = zip(batched(image), batched(found["logits"]), strict=True)
        return {**found, "leads": np.concatenate([reach.walk(engine, x, self.steps, self.step_size, f) for x, f in batches])}


@dataclass(frozen=True)
class Slope:
    """How steeply the margin falls at the image."""

    @property
    def cost(self) -> float:
        return 7.0

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return slope (N,): the l1 norm of d(f_b - f_a)/dx."""
        engine, slope = Served(subject), []
        for x in batched(image):
            a, b = reach.two_likeliest(subject.logits(x))
            slope.append(np.abs(reach.difference(engine, x, b, a)[0]).sum(axis=(1, 2, 3)))
        return {"slope": np.concatenate(slope)}


@dataclass(frozen=True)
class Searched:
    """Whether the search finds another label."""

    radius: float = reach.RADIUS
    steps: int = reach.STEPS

    @property
    def cost(self) -> float:
        return 7.0 * self.steps

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return stable (N,)."""
        engine = Served(subject)
        return {"stable": np.concatenate([reach.search(engine, x, self.radius, self.steps) for x in batched(image)])}


def batched(array: Floats) -> list[Floats]:
    """Return the images, or their logits, in batches; one empty batch of none."""
    return [array[i : i + BATCH] for i in range(0, max(len(array), 1), BATCH)]


# Rankings ------------------------------------------------------------------------------------------------------------


def rankings(found: Arrays, score: str, weight: float) -> dict[str, reach.Scores]:
    """Return the scores of the images (N,), high = suspicious, that can be computed of the arrays of Walk, Slope and Searched.

    ``score`` and ``weight`` are those of the served OOD score.
    """
    logits, margin = found["logits"], reach.margin(found["logits"])
    values: dict[str, Array] = {"reach_score": found["leads"].mean(axis=1), "walk_end": found["leads"][:, -1], "margin": -margin}
    if "slope" in found:
        values["margin_over_slope"] = -margin / np.maximum(found["slope"], 1e-12)
    if "stable" in found:
        values["unstable"] = (~found["stable"]).astype(np.float64)
    values["energy"] = ood_score("energy", 0.0, logits)
    values["ood_score"] = score_of(score, weight, found)
    values["max_softmax"] = -probabilities(logits, 1.0).max(axis=1).astype(np.float64)
    return {name: value.astype(np.float64) for name, value in values.items()}


def aurc(suspicion: Array, wrong: NDArray[np.bool_]) -> float:
    """Return the area under the risk-coverage curve: the mean error of the n least suspicious images, over n (arXiv 1705.08500).

    Images of equal suspicion are taken in a random order: each counts with the mean error of its group.
    """
    order = np.argsort(suspicion, kind="stable")
    value, group = np.unique(suspicion[order], return_inverse=True)
    shared = np.bincount(group, wrong[order]) / np.bincount(group)
    assert len(value) == len(shared)
    return float((np.cumsum(shared[group]) / np.arange(1, len(wrong) + 1)).mean())


# Adaptive attack -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rejecter:
    """What accepts an image: margin and OOD score within the policy's thresholds, and the search, unless its radius is 0."""

    margin: float  # least margin
    score: str
    weight: float
    room: float  # largest OOD score
    spread: float  # of the clean OOD scores, over that of the clean margins
    radius: float
    steps: int = reach.STEPS

    def accepts(self, subject: EvaluatedModel, image: Floats) -> NDArray[np.bool_]:
        """Return which images (N,) the served model accepts; the search runs on those that pass the rest."""
        found = subject.look(image)
        near = score_of(self.score, self.weight, found) <= self.room
        passed: NDArray[np.bool_] = (reach.margin(found["logits"]) >= self.margin) & near
        if self.radius > 0 and passed.any():
            some = np.flatnonzero(passed)
            passed[some] = Searched(self.radius, self.steps).run(subject, image[some], np.zeros(len(some), np.int64))["stable"]
        return passed


@dataclass(frozen=True)
class EvadeReach:
    """Look in the ball for a wrong label that is accepted: PGD on the margin of a wrong class c where it stands and where the search goes.

    The terms are f_c - max_{k != c} f_k above the least margin, the same above 0 at x + delta, and the room below the OOD threshold.
    delta is what the search adds in ``inner`` steps, held constant in the gradient (BPDA, arXiv 1802.00420). ``objective``: worst, the
    smallest term; sum, of the terms that are not yet met; alone, the margin alone. c is the likeliest wrong class as it goes, or with
    ``target`` k the k-th likeliest at the image.
    """

    threat: Threat
    rejecter: Rejecter
    objective: str
    target: int = 0
    start: str = "uniform"
    steps: int = 30
    inner: int = 2

    @property
    def cost(self) -> float:
        return 3.0 * self.steps * (1.0 if self.objective == "alone" else 2.0 + self.inner)

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return holds (N,): neither the image, the last iterate nor the best by the terms is wrong and accepted; and image, the last."""
        x, y = tensors(subject, image, label)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(SEED)).to(x.device)
        x_adv = x if self.start == "image" else project(x + self.threat.eps * (2 * noise - 1), x, self.threat)
        best, value = x_adv.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        fixed = wrong_class(torch.from_numpy(subject.logits(image).copy()).to(x.device), y, self.target)
        for step in range(self.steps + 1):
            gradient, worst = self.direction(subject, x_adv, y, fixed if self.target else None)
            best[worst > value] = x_adv[worst > value]
            value = torch.maximum(value, worst)
            if step < self.steps:
                rate = 0.25 if step < self.steps // 2 else 0.08
                x_adv = project(x_adv + rate * self.threat.eps * ascent(gradient, self.threat.norm), x, self.threat)
        last = x_adv.cpu().numpy()
        holds = np.ones(len(image), bool)
        for points in (image, last, best.cpu().numpy()):
            holds[holds] = ~evades(subject, points[holds], label[holds], self.rejecter)
        return {"holds": holds, "image": last}

    def direction(self, subject: EvaluatedModel, x: Tensor, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the ascent direction (N, 3, H, W) and the smallest term (N,) at x."""
        r = self.rejecter
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits, score = subject.scored(r.score, r.weight, x)
            c = wrong_class(logits.detach(), y, 1) if c is None else c
            terms = [lead(logits, c) - r.margin, (r.room - score) / r.spread]
            if self.objective == "alone":
                return gradient_of(terms[0], x), torch.stack(terms).amin(dim=0).detach()
            if r.radius > 0:
                shifted = search_from(subject, x.detach(), c, r.radius, self.inner)
                terms.append(lead(subject.network(x + (shifted - x.detach())).float(), c))
            every = torch.stack(terms)
            value = every.amin(dim=0) if self.objective == "worst" else every.clamp(max=0.5).sum(dim=0)
            return gradient_of(value, x), every.amin(dim=0).detach()


def search_from(subject: EvaluatedModel, x: Tensor, c: Tensor, radius: float, steps: int) -> Tensor:
    """Return where the search for a label other than c ends, (N, 3, H, W)."""
    threat, at = Threat("linf", radius), x
    for _ in range(steps):
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            gradient = gradient_of(-lead(subject.network(at).float(), c), at)
        at = project(at.detach() + reach.STEP_OVER_RADIUS * radius / steps * gradient.sign(), x, threat)
    return at.detach()


def lead(logits: Tensor, c: Tensor) -> Tensor:
    """Return f_c - max_{k != c} f_k, (N,)."""
    others = logits.scatter(1, c[:, None], float("-inf"))
    return logits.gather(1, c[:, None]).squeeze(1) - others.amax(dim=1)


def wrong_class(logits: Tensor, y: Tensor, rank: int) -> Tensor:
    """Return the likeliest class other than y, or the ``rank``-th likeliest, (N,)."""
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.topk(max(rank, 1), dim=1).indices[:, -1]


def evades(subject: EvaluatedModel, image: Floats, label: Labels, rejecter: Rejecter) -> NDArray[np.bool_]:
    """Return which images (N,) the served model takes for a wrong class and accepts."""
    wrong: NDArray[np.bool_] = subject.logits(image).argmax(axis=1) != label if len(label) else np.zeros(0, bool)
    if wrong.any():
        some = np.flatnonzero(wrong)
        wrong[some] = rejecter.accepts(subject, image[some])
    return wrong
