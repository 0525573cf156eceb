"""Adaptive attacks on the flag: OOD images made to look normal, clean images made to look OOD, and unflagged adversarial images."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebjdat_serve.engines import Floats, Labels
from training.evaluation.attacks import tensors
from training.evaluation.autoattack import square
from training.evaluation.evaluated_model import EvaluatedModel
from training.evaluation.flags import score_of
from training.evaluation.result_cache import Arrays
from training.evaluation.scores import margin
from training.methods.adversary import Threat, ascent, norm, project

VARIANTS = ("joint", "selective", "orthogonal")


@dataclass(frozen=True)
class ScoreAttack:
    """PGD on an OOD score, from the image and from a random start, then Square on the served score; keeps the best point.

    ``up`` raises the score (looks OOD), otherwise it is lowered. Square needs no gradient, so a masked gradient does not stop it.
    """

    threat: Threat
    score: str
    weight: float
    up: bool
    queries: int = 0
    steps: int = 40

    @property
    def cost(self) -> float:
        return 6.0 * self.steps + self.queries

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return logits (N, K) and terms (N, V) of the best point, and square (N,): whether Square found a better one than PGD."""
        x, _ = tensors(subject, image, label)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        starts = [x, project(x + self.threat.eps * (2 * noise - 1), x, self.threat)]
        best, value = image.copy(), self.value(subject, image)
        by_square = np.zeros(len(image), bool)
        made = [self.climb(subject, x, start).cpu().numpy() for start in starts]
        if self.queries:
            made.append(self.ask(subject, image))
        for i, points in enumerate(made):
            reached = self.value(subject, points)
            better = reached > value
            best[better], value[better] = points[better], reached[better]
            by_square = by_square | better if i == len(starts) else by_square & ~better
        return {**subject.look(best), "square": by_square}

    def value(self, subject: EvaluatedModel, image: Floats) -> np.ndarray:
        """Return the served score, negated unless ``up``, (N,)."""
        score = served(subject, self, image)[1]
        return score if self.up else -score

    def climb(self, subject: EvaluatedModel, x: Tensor, x_adv: Tensor) -> Tensor:
        """Return the best iterate of PGD by the network's own score."""
        sign = 1.0 if self.up else -1.0
        best, kept = torch.full((len(x),), -torch.inf, device=x.device), x.clone()
        for step in range(self.steps + 1):
            x_adv = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                value = sign * subject.scored(self.score, self.weight, x_adv)[1]
                gradient = gradient_of(value, x_adv)
            x_adv, value = x_adv.detach(), value.detach()
            better = value > best
            best, kept[better] = torch.maximum(value, best), x_adv[better]
            rate = 0.25 if step < self.steps // 2 else 0.05
            x_adv = project(x_adv + rate * self.threat.eps * ascent(gradient, self.threat.norm), x, self.threat)
        return kept

    def ask(self, subject: EvaluatedModel, image: Floats) -> Floats:
        """Return the final points of Square on the loss 1000 - value, which never counts as a success."""

        def margins(z: Tensor) -> Tensor:
            value = torch.from_numpy(self.value(subject, z.numpy()))
            return torch.stack([1000.0 - value, torch.zeros_like(value)], dim=1)

        x, attack = torch.from_numpy(image), square(margins, self.threat, self.queries)
        attack.init_hyperparam(x)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(attack.seed)
            _, points = attack.attack_single_run(x, torch.zeros(len(x), dtype=torch.int64))  # perturb returns only successes
        result: Floats = points.numpy()
        return result


@dataclass(frozen=True)
class Evade:
    """Search the ball for a misclassified, unflagged point (score at most ``threshold``), from the image and from a random start.

    ``joint`` ascends the smaller of margin and slack below the threshold; ``selective`` ascends the margin until the class is wrong, then
    lowers the score; ``orthogonal`` does the same with each gradient orthogonal to the other (arXiv 2106.15023).
    """

    threat: Threat
    score: str
    weight: float
    threshold: float
    spread: float  # of the clean scores, which scales margin and score alike
    variant: str
    steps: int = 50

    @property
    def cost(self) -> float:
        return 2.0 * self.steps * (5.0 if self.variant == "orthogonal" else 3.0)

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return holds (N,): no misclassified, unflagged point of the served model was found."""
        x, y = tensors(subject, image, label)
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        for start in (x, project(x + self.threat.eps * (2 * noise - 1), x, self.threat)):
            left = (~broken).nonzero().flatten()
            if not len(left):
                break
            found = self.search(subject, x[left], y[left], start[left])
            broken[left] = torch.from_numpy(evades(subject, found.cpu().numpy(), label[left.cpu().numpy()], self)).to(x.device)
        return {"holds": ~broken.cpu().numpy()}

    def search(self, subject: EvaluatedModel, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
        """Return the first misclassified, unflagged iterate, or the last iterate."""
        found, going = x_adv.clone(), torch.arange(len(y), device=x.device)
        for step in range(self.steps):
            direction, wrong, room = self.direction(subject, x_adv, y[going])
            done = wrong & (room > 0)
            found[going] = x_adv
            going, x_adv, direction = going[~done], x_adv[~done], direction[~done]
            if not len(going):
                return found
            rate = 0.25 if step < self.steps // 2 else 0.08
            x_adv = project(x_adv + rate * self.threat.eps * ascent(direction, self.threat.norm), x[going], self.threat)
        found[going] = x_adv
        return found

    def direction(self, subject: EvaluatedModel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ascent direction (N, 3, H, W), which images are wrong (N,), and the slack of each score below the threshold (N,)."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits, score = subject.scored(self.score, self.weight, x)
            wrongness, room = margin(logits, y), (self.threshold - score) / self.spread
            wrong = (wrongness > 0).detach()
            if self.variant == "joint":
                value = torch.minimum(wrongness / logits.detach().std(), room)
                return gradient_of(value, x), wrong, room.detach()
            if self.variant == "selective":
                value = torch.where(wrong, room, wrongness)
                return gradient_of(value, x), wrong, room.detach()
            to_wrong = gradient_of(wrongness, x, retain_graph=True)
            to_room = gradient_of(room, x)
        chosen = torch.where(wrong[:, None, None, None], without(to_room, to_wrong), without(to_wrong, to_room))
        return chosen, wrong, room.detach()


@dataclass(frozen=True)
class EvadeBySquare:
    """Square (arXiv 1912.00049) on the smaller of margin and slack of the served model: the same objective without gradients."""

    threat: Threat
    score: str
    weight: float
    threshold: float
    spread: float
    queries: int

    @property
    def cost(self) -> float:
        return self.queries / 2

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return holds (N,)."""
        holds = ~evades(subject, image, label, self)
        for y in np.unique(label):
            here = np.flatnonzero(holds & (label == y))
            if len(here):
                x = torch.from_numpy(image[here])
                made = square(self.objective(subject, int(y)), self.threat, self.queries).perturb(
                    x, torch.zeros(len(here), dtype=torch.int64)
                )
                holds[here] = ~evades(subject, made.numpy(), label[here], self)
        return {"holds": holds}

    def objective(self, subject: EvaluatedModel, y: int) -> object:
        """Return a function from images of class y to two "logits" whose margin is below 0 where an image is wrong and unflagged."""

        def ask(x: Tensor) -> Tensor:
            logits, score = served(subject, self, x.numpy())
            room = torch.from_numpy((self.threshold - score) / self.spread)
            value = torch.minimum(margin(torch.from_numpy(logits.copy()), torch.full((len(x),), y)), room)
            return torch.stack([-value, torch.zeros_like(value)], dim=1)

        return ask


def evades(subject: EvaluatedModel, image: Floats, label: Labels, attack: Evade | EvadeBySquare) -> np.ndarray:
    """Return which images the served model misclassifies and does not flag, (N,) bool."""
    if not len(label):
        return np.zeros(0, bool)
    logits, score = served(subject, attack, image)
    result: np.ndarray = (logits.argmax(axis=1) != label) & (score <= attack.threshold)
    return result


def served(subject: EvaluatedModel, attack: ScoreAttack | Evade | EvadeBySquare, image: Floats) -> tuple[Floats, Floats]:
    """Return the served logits (N, K) and OOD score (N,)."""
    found = subject.look(image)
    return found["logits"], score_of(attack.score, attack.weight, found)


def gradient_of(value: Tensor, x: Tensor, retain_graph: bool = False) -> Tensor:
    """Return the gradient of the sum of ``value``, 0 where it is missing or not finite."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=retain_graph, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else torch.nan_to_num(gradient, 0.0, 0.0, 0.0)


def without(gradient: Tensor, other: Tensor) -> Tensor:
    """Return ``gradient`` minus its component along ``other``, per image."""
    along = (gradient * other).flatten(1).sum(dim=1)[:, None, None, None] / norm(other).clamp_min(1e-12) ** 2
    return gradient - along * other
