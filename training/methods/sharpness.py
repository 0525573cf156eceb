"""Steps whose gradient is taken at perturbed weights: ASAM (Kwon et al., arXiv 2102.11600) and AWP (Wu et al., arXiv 2004.05884).

Both climb the step's own loss in the weights, w -> w + v, for the same x_adv and x_neg; both restore w exactly. They differ in v,
and in which of the two forwards the running statistics of batch norm follow: the one at w.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Asam:
    """v = rho w^2 g / || |w| g ||_2 over all parameters: SADA-JEM uses rho = 2."""

    rho: float = 2.0
    after: float = 0.0  # fraction of the run before the first perturbation

    def perturbation(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return v, one tensor a parameter, from the gradients that they hold."""
        gradient = gradients(parameters)
        length = torch.stack([(w.abs() * g).norm() for w, g in zip(parameters, gradient, strict=True)]).norm()
        return [self.rho * w.square() * g / (length + 1e-12) for w, g in zip(parameters, gradient, strict=True)]


@dataclass(frozen=True)
class Awp:
    """v = gamma ||w|| g / ||g|| for each weight of two or more dimensions, zero for biases and norms.

    The released code takes an SGD step of a copy and scales it to this length, which cancels the step's rate. It lets weight decay
    act on w + v; here it acts on w.
    """

    gamma: float = 0.01
    after: float = 0.0

    def perturbation(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return v, one tensor a parameter, from the gradients that they hold."""
        return [
            self.gamma * w.norm() * g / (g.norm() + 1e-20) if w.ndim > 1 else torch.zeros_like(w)
            for w, g in zip(parameters, gradients(parameters), strict=True)
        ]


Sharpness = Asam | Awp


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradients, zero where there is none."""
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in parameters]


@contextmanager
def perturbed(model: nn.Module, climb: Callable[[], None], sharpness: Sharpness) -> Iterator[None]:
    """Hold the weights at w + v, with no gradients, and put w back bit for bit on exit; ``climb`` leaves gradients at w behind."""
    parameters = [w for w in model.parameters() if w.requires_grad]
    for w in parameters:
        w.grad = None
    climb()
    before = [w.detach().clone() for w in parameters]
    with torch.no_grad():
        for w, v in zip(parameters, sharpness.perturbation(parameters), strict=True):
            w.add_(v)
            w.grad = None
    try:
        with still_statistics(model):
            yield
    finally:
        with torch.no_grad():
            for w, kept in zip(parameters, before, strict=True):
                w.copy_(kept)


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Keep batch norm in its mode but its running statistics where they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
