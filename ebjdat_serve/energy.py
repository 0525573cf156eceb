"""The energies of a classifier and their gradient: the only place where these equations are written in torch.

A classifier with logits f(x) in R^K is read as an energy-based model (Grathwohl et al., arXiv 1912.03263):

    E(x, y) = -f(x)[y]              joint_energy, nats
    E(x)    = -log sum_y exp f(x)[y]  energy, nats; lower = likelier
    p(y|x)  = exp(E(x) - E(x, y))     = softmax f(x)[y]
"""

from collections.abc import Callable

import torch
from torch import Tensor

MARGINAL = -1
"""The label that asks for the marginal E(x) where a joint E(x, y) could stand."""


def energy(logits: Tensor) -> Tensor:
    """Return E(x) = -logsumexp_y f(x)[y], shape (N,), nats, from logits (N, K)."""
    return -torch.logsumexp(logits, dim=1)


def joint_energy(logits: Tensor, label: Tensor) -> Tensor:
    """Return E(x, y) = -f(x)[y], shape (N,), nats, from logits (N, K) and labels (N,)."""
    return -logits.gather(1, label[:, None]).squeeze(1)


def energy_of(logits: Tensor, label: Tensor) -> Tensor:
    """Return E(x, y) where ``label`` is a class and E(x) where it is ``MARGINAL``, shape (N,), nats."""
    joint = -(logits * one_hot(label, logits)).sum(dim=1)
    return torch.where(label >= 0, joint, energy(logits))


def logit_weights(logits: Tensor, label: Tensor) -> Tensor:
    """Return w (N, K) with score = d(w . f)/dx, w held constant: one-hot(y), or softmax f(x) for ``MARGINAL``."""
    return torch.where((label >= 0)[:, None], one_hot(label, logits), torch.softmax(logits, dim=1))


def one_hot(label: Tensor, logits: Tensor) -> Tensor:
    """Return the (N, K) indicator of ``label``; the row of ``MARGINAL`` is zero. It holds no gather, so it exports."""
    classes = torch.arange(logits.shape[1], device=label.device)
    return (label[:, None] == classes).to(logits.dtype)


def score(model: Callable[[Tensor], Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return (score, energy): -dE(x,y)/dx of shape (N, 3, H, W) and E(x,y) (N,), or the marginal's for ``MARGINAL``.

    Parameters receive no gradient, and the model's mode is the caller's business.
    """
    with torch.enable_grad():
        x = image.detach().requires_grad_()
        logits = model(x)
        (gradient,) = torch.autograd.grad(logits, x, grad_outputs=logit_weights(logits.detach(), label))
    return gradient, energy_of(logits.detach(), label)
