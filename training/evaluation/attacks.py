"""Tasks of the result cache: predictions, PGD, transferred attacks, and diagnostics of gradients.

Every ``robust_mask`` (N,) marks images that the served model classifies correctly, clean and at the attack's final point: the first
that fooled the network, or its last iterate.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ebjdat_serve.energy import energy
from ebjdat_serve.engines import Floats, Labels
from training.distributed import Noise
from training.evaluation.evaluated_model import EvaluatedModel, load_weights, open_module
from training.evaluation.result_cache import Arrays
from training.evaluation.rows import SEED
from training.evaluation.scores import margin
from training.methods.adversary import Classifier, Objective, Threat, ascent, begin, cross_entropy, norm, project

OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin}


@dataclass(frozen=True)
class Predict:
    """What is served of the images, and the norm of dE/dx, JEM's approximate mass (arXiv 1912.03263)."""

    gradient: bool = False

    @property
    def cost(self) -> float:
        return 4.0 if self.gradient else 1.0

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return logits (N, K), of a calibrated bundle terms (N, V), and gradient (N,)."""
        result = subject.look(image)
        if self.gradient and not subject.no_network:
            result["gradient"] = gradient_norm(subject, torch.from_numpy(image))
        return result


@dataclass(frozen=True)
class Pgd:
    """Projected gradient ascent with random restarts; ``leave``: a fooled image stops moving, else all take every step."""

    threat: Threat
    steps: int = 20
    step_over_eps: float = 0.25
    objective: str = "ce"
    restarts: int = 1
    leave: bool = True
    eot: int = 1  # gradients averaged, for models with random outputs (arXiv 1802.00420)

    @property
    def cost(self) -> float:
        return 3.0 * self.steps * self.restarts * self.eot * (0.7 if self.leave else 1.0)

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return robust_mask (N,), and without ``leave`` logits (N, K), terms (N, V) and gradient (N,) of the last iterates."""
        x, y = tensors(subject, image, label)
        noise, x_adv = Noise.seeded(SEED), x.clone()
        robust_mask = classes(subject, x) == y
        for _ in range(self.restarts):
            start = begin(x.cpu(), self.threat, "uniform", noise).to(x.device)
            moved = self.search(subject, x, y, start)
            x_adv = torch.where(robust_mask[:, None, None, None], moved, x_adv) if self.leave else moved
            robust_mask = robust_mask & (classes(subject, x_adv) == y)
        result: Arrays = {"robust_mask": robust_mask.cpu().numpy()}
        if not self.leave:
            result |= {**subject.look(x_adv.cpu().numpy()), "gradient": gradient_norm(subject, x_adv)}
        return result

    def points(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Tensor:
        """Return where the first restart ends, (N, 3, H, W)."""
        x, y = tensors(subject, image, label)
        return self.search(subject, x, y, begin(x.cpu(), self.threat, "uniform", Noise.seeded(SEED)).to(x.device))

    def search(self, subject: EvaluatedModel, image: Tensor, label: Tensor, x_adv: Tensor) -> Tensor:
        """Return the first iterate that fools the network, or the last iterate."""
        found, going = x_adv.clone(), torch.arange(len(label), device=image.device)
        for _ in range(self.steps):
            gradient, logits = input_gradient(subject.network, x_adv, label[going], OBJECTIVES[self.objective], self.eot)
            if self.leave and self.eot == 1:
                right = logits.argmax(dim=1) == label[going]
                found[going] = x_adv
                going, x_adv, gradient = going[right], x_adv[right], gradient[right]
                if not len(going):
                    return found
            x_adv = project(x_adv + self.step_over_eps * self.threat.eps * ascent(gradient, self.threat.norm), image[going], self.threat)
        found[going] = x_adv
        return found


@dataclass(frozen=True)
class Trace:
    """Diagnostics of masked gradients: the loss of PGD against its steps, and images without a gradient."""

    threat: Threat
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50)

    @property
    def cost(self) -> float:
        return 3.0 * self.steps[-1] + 3.0

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return loss (N, steps), zero (N,): no gradient at the image, varied (N,): two outputs differ, noisy (N,): right under noise."""
        x, y = tensors(subject, image, label)
        noise = Noise.seeded(SEED)
        x_adv = begin(x.cpu(), self.threat, "uniform", noise).to(x.device)
        noisy = classes(subject, x_adv) == y
        at_image, logits = input_gradient(subject.network, x, y, cross_entropy)
        with torch.no_grad():
            varied = (subject.network(x).float() - logits).abs().amax(dim=1) > 1e-4 * logits.abs().amax(dim=1)
        losses = []
        for step in range(1, self.steps[-1] + 1):
            gradient, _ = input_gradient(subject.network, x_adv, y, cross_entropy)
            x_adv = project(x_adv + self.threat.eps / 4 * ascent(gradient, self.threat.norm), x, self.threat)
            if step in self.steps:
                with torch.no_grad():
                    losses.append(cross_entropy(subject.network(x_adv).float(), y))
        bad = ~torch.isfinite(at_image).flatten(1).all(dim=1) | (at_image.flatten(1).abs().amax(dim=1) < 1e-12)
        arrays = {"loss": torch.stack(losses, dim=1), "zero": bad, "varied": varied, "noisy": noisy}
        return {name: value.cpu().numpy() for name, value in arrays.items()}


@dataclass(frozen=True)
class Transfer:
    """Transfer: the model on the last iterates of PGD-20 on a surrogate network."""

    threat: Threat
    surrogate: str = field(repr=False)  # a weights file of the trainer; its path is not part of the key
    sha256: str

    @property
    def cost(self) -> float:
        return 61.0

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return robust_mask (N,), and logits (N, K), terms (N, V) and gradient (N,) of the transferred images."""
        x_adv = self.points(subject, image, label)
        found = subject.look(x_adv.cpu().numpy())
        robust_mask = (subject.logits(image).argmax(axis=1) == label) & (found["logits"].argmax(axis=1) == label)
        return {"robust_mask": robust_mask, **found, "gradient": gradient_norm(subject, x_adv)}

    def points(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Tensor:
        """Return the last iterates on the surrogate, (N, 3, H, W)."""
        other = surrogate(self.surrogate, subject.device)
        x, y = tensors(subject, image, label)
        x_adv = begin(x.cpu(), self.threat, "uniform", Noise.seeded(SEED)).to(x.device)
        for _ in range(20):
            gradient, _ = input_gradient(other, x_adv, y, cross_entropy)
            x_adv = project(x_adv + self.threat.eps / 4 * ascent(gradient, self.threat.norm), x, self.threat)
        return x_adv


@lru_cache(maxsize=2)
def surrogate(file: str, device: torch.device) -> Classifier:
    """Return the surrogate's network on a device, loaded once per process."""
    network: Classifier = load_weights(Path(file)).requires_grad_(False).to(device)
    return network


def tensors(subject: EvaluatedModel, image: Floats, label: Labels) -> tuple[Tensor, Tensor]:
    """Return images and labels on the subject's device, contiguous: the attack package reshapes gradients in place."""
    return torch.from_numpy(np.ascontiguousarray(image)).to(subject.device), torch.from_numpy(label).to(subject.device)


def input_gradient(network: Classifier, x: Tensor, label: Tensor, objective: Objective, times: int = 1) -> tuple[Tensor, Tensor]:
    """Return the objective's gradient (N, 3, H, W), averaged over ``times`` passes, and the last logits (N, K).

    Where the model has none, through no_grad or NumPy, or one that is not finite, it is 0: a masked gradient is a finding, not an
    error.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        total = torch.zeros_like(x)
        for _ in range(times):
            logits = network(x).float()
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(objective(logits, label).sum(), x, allow_unused=True)
                total = total if gradient is None else total + torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
    return total / times, logits.detach()


def gradient_norm(subject: EvaluatedModel, x: Tensor) -> Floats:
    """Return ||dE(x)/dx||_2, shape (N,)."""
    x = x.to(subject.device)
    gradient, _ = input_gradient(subject.network, x, torch.zeros(len(x), dtype=torch.int64), lambda logits, label: energy(logits))
    length: Floats = norm(gradient).flatten().cpu().numpy()
    return length


def classes(subject: EvaluatedModel, x: Tensor) -> Tensor:
    """Return the served class of each image (N,)."""
    return torch.from_numpy(subject.logits(x.cpu().numpy()).argmax(axis=1)).to(x.device)


def survivors(model: nn.Module, image: Tensor, label: Tensor, threat: Threat, steps: int = 20) -> int:
    """Return the number of images that no iterate of one PGD run on cross-entropy fools; puts the model in eval mode."""
    subject = open_module("model", model, "")
    parts = zip(torch.split(image, 500), torch.split(label, 500), strict=True)
    return sum(int(Pgd(threat, steps).run(subject, x.cpu().numpy(), y.cpu().numpy())["robust_mask"].sum()) for x, y in parts)
