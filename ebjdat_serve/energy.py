"""The energies of a classifier and their gradient in torch; no other module repeats these equations.

A classifier with logits f(x) in R^K is read as an energy-based model (Grathwohl et al., arXiv 1912.03263):

    E(x, y) = -f(x)[y]              joint_energy, nats
    E(x)    = -log sum_y exp f(x)[y]  energy, nats; lower = likelier
    p(y|x)  = exp(E(x) - E(x, y))     = softmax f(x)[y]
"""

from collections.abc import Callable

import torch
from torch import Tensor

MARGINAL = -1
"""The label that selects the marginal E(x) instead of the joint E(x, y)."""


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
    """Return the (N, K) indicator of ``label``; the row of ``MARGINAL`` is zero. It uses no gather, so it exports."""
    classes = torch.arange(logits.shape[1], device=label.device)
    return (label[:, None] == classes).to(logits.dtype)


def score(model: Callable[[Tensor], Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return (score, energy): -dE(x,y)/dx of shape (N, 3, H, W) and E(x,y) (N,), or the marginal's for ``MARGINAL``.

    Parameters receive no gradient; the caller sets the model's mode.
    """
    with torch.enable_grad():
        x = image.detach().requires_grad_()
        logits = model(x)
        (gradient,) = torch.autograd.grad(logits, x, grad_outputs=logit_weights(logits.detach(), label))
    return gradient, energy_of(logits.detach(), label)
