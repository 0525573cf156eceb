"""A method is one loss step; this is what every one of them takes and returns."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ebjdat_serve.wideresnet import WideResNet


@dataclass(frozen=True)
class Batch:
    """The labelled stream, augmented, and the p(x) stream, not augmented; images (N, 3, H, W) float32 in [0,1]."""

    image: Tensor
    label: Tensor
    plain: Tensor


@dataclass(frozen=True)
class Terms:
    """The loss, a scalar with a graph, and detached scalars for the log."""

    loss: Tensor
    log: dict[str, Tensor]


class Method(Protocol):
    """What train.py asks of a method."""

    def terms(self, model: WideResNet, batch: Batch, generator: torch.Generator, progress: float) -> Terms:
        """Return the loss of one step; ``progress`` runs from 0 to 1."""

    def state(self) -> dict[str, Tensor]:
        """Return what must survive a restart."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
