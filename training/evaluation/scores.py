"""Outlier scores of a model, high is suspicious: in torch for whoever attacks them; the served ones are in ebjdat_serve/detection.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from ebjdat_serve.energy import energy

Score = Callable[[Tensor], Tensor]
"""Logits (N, K) -> one value per image (N,), which rises with suspicion."""


def entropy(logits: Tensor) -> Tensor:
    """Return H(p(.|x)) = -sum_y p log p, shape (N,), nats."""
    log_p = torch.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def max_softmax(logits: Tensor) -> Tensor:
    """Return -max_y log p(y|x), shape (N,), nats: the same order as 1 - max p, and a gradient where p is near 1."""
    return -torch.log_softmax(logits, dim=1).max(dim=1).values


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """Return max_{k != y} f_k - f_y, shape (N,): above 0 is wrong. Its gradient does not vanish with confidence."""
    own = logits.gather(1, label[:, None]).squeeze(1)
    others = logits.scatter(1, label[:, None], float("-inf"))
    return others.max(dim=1).values - own


SCORES: dict[str, Callable[[float], Score]] = {
    "energy": lambda weight: energy,
    "max_softmax": lambda weight: max_softmax,
    "energy_entropy": lambda weight: lambda logits: energy(logits) + weight * entropy(logits),
}
"""Scores that are functions of the logits; ``weight`` is the entropy's in energy_entropy and nothing in the others."""
