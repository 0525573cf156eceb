"""Differentiable OOD scores, for attacks on the flag, and the classification margin."""

from collections.abc import Callable

import torch
from torch import Tensor

from ebjdat_serve.energy import energy
from ebjdat_serve.scores import score_named

Score = Callable[[Tensor], Tensor]
"""Logits (N, K) -> one value per image (N,); higher is more suspicious."""


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """Return max_{k != y} f_k - f_y, shape (N,): above 0 is wrong. Its gradient does not vanish with confidence."""
    own = logits.gather(1, label[:, None]).squeeze(1)
    others = logits.scatter(1, label[:, None], float("-inf"))
    return others.max(dim=1).values - own


def ood_score_of(name: str, weight: float) -> Score:
    """Return the score with its weight as a differentiable function. Raises EbjdatError for an unknown score."""
    function = score_named(name).function
    return lambda logits: function(energy(logits), torch.log_softmax(logits, dim=1), weight, torch)
