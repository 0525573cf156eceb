"""Projected gradient ascent of any objective: the training attack, FGSM-RS and PGD-20 alike (arXiv 1706.06083)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebjdat_serve.energy import energy, joint_energy

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), label (N,)) -> one value per image (N,), which the adversary raises."""


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return E(x, y) - E(x) = -log p(y|x), shape (N,)."""
    return F.cross_entropy(logits, label, reduction="none")


INNER: dict[str, Objective] = {
    "ce": cross_entropy,
    "energy": lambda logits, label: energy(logits),
    "joint_energy": joint_energy,
}
"""What the inner maximum of EB-JDAT climbs: see docs/decisions/0001."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in eval mode with parameters that take no gradient, and restore both on exit.

    Batch-norm statistics are read and never written, and no ``.grad`` is touched.
    """
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def project(x_adv: Tensor, image: Tensor, eps: float) -> Tensor:
    """Return the point of the l-infinity ball of radius ``eps`` around ``image``, within [0,1], nearest to ``x_adv``."""
    return x_adv.clamp(image - eps, image + eps).clamp(0.0, 1.0)


def random_start(image: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Return image + U(-eps, eps), clipped to [0,1]."""
    noise = torch.rand(image.shape, generator=generator, device=image.device)
    return (image + eps * (2.0 * noise - 1.0)).clamp(0.0, 1.0)


def pgd(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    *,
    objective: Objective,
    eps: float,
    step_size: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return x_adv: ``steps`` sign-gradient ascents of ``objective`` from a random start in the ball, each projected.

        x <- project(x + step_size * sign d objective / dx)

    Image (N, 3, H, W) in [0,1]; ``eps`` and ``step_size`` in pixel units of [0,1]. The model is frozen meanwhile.
    """
    with frozen(model):
        x_adv = random_start(image, eps, generator)
        for _ in range(steps):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(model(x_adv).float(), label).sum(), x_adv)
            x_adv = project(x_adv.detach() + step_size * gradient.sign(), image, eps)
    return x_adv
