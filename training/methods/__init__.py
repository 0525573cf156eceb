"""The interface of a training method: an inner problem, which finds x_adv and x_neg, and a loss.

They are two functions because sharpness-aware minimisation and adversarial weight perturbation evaluate the loss twice on the same
x_adv and x_neg.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from training.data.datasets import Dataset
from training.distributed import Noise, Ranks
from training.methods.adversary import Threat


@dataclass(frozen=True)
class Batch:
    """The labelled stream, the p(x) stream and, once solved, the solutions of the inner problem; (N, 3, H, W) float32 in [0,1]."""

    image: Tensor
    label: Tensor
    plain: Tensor
    plain_label: Tensor
    x_adv: Tensor = field(default_factory=lambda: torch.empty(0))
    x_neg: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Terms:
    """The loss, a scalar with a graph, and detached scalars for the log."""

    loss: Tensor
    log: dict[str, Tensor]


@dataclass(frozen=True)
class RunContext:
    """Per-run context passed to a method when a stage begins."""

    data: Dataset
    threat: Threat
    noise: Noise
    device: torch.device
    prior_rank: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (3, H, W)."""
        return (3, *self.data.size)


@dataclass(frozen=True)
class StepContext:
    """Per-step context passed to a method; ``progress`` runs from 0 to 1."""

    threat: Threat
    noise: Noise
    progress: float

    @property
    def ranks(self) -> Ranks:
        """This process's rank, and the number of processes."""
        return self.noise.ranks


class MethodState(Protocol):
    """A method's state between steps."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint, the same on every rank."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from ``state_dict``."""


class NoState:
    """The state of a method that keeps none."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


S = TypeVar("S", bound=MethodState)


class Method(ABC, Generic[S]):
    """A training method: a frozen dataclass of its hyperparameters, with an inner problem and a loss."""

    @abstractmethod
    def begin(self, context: RunContext) -> S:
        """Return the state before the first step."""

    def solve(self, model: nn.Module, batch: Batch, state: S, context: StepContext) -> Batch:
        """Return ``batch`` with x_adv and x_neg; parameters, batch-norm statistics and ``.grad`` are not touched."""
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, state: S, context: StepContext) -> Terms:
        """Return the loss of a batch that ``solve`` returned."""


class Stateless(Method[NoState]):
    """A method that keeps nothing between steps."""

    def begin(self, context: RunContext) -> NoState:
        return NoState()


def forward(model: nn.Module, *images: Tensor) -> tuple[Tensor, ...]:
    """Return the logits of each batch of images from one concatenated forward, so that batch norm sees them together."""
    logits: Tensor = model(torch.cat(images))
    return torch.split(logits, [len(image) for image in images])


def accuracy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the share of images whose largest logit is the label's."""
    return (logits.argmax(dim=1) == label).float().mean()


def detached(loss: Tensor, **log: Tensor) -> Terms:
    """Return the terms with the log cut from the graph."""
    return Terms(loss, {name: value.detach() for name, value in log.items()})
