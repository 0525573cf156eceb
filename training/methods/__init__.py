"""A method is an inner problem and a loss; this is what every one of them takes and returns.

The two are apart because a step may need the loss more than once for the same x_adv and x_neg: sharpness-aware minimisation and
adversarial weight perturbation do.
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
    """The labelled stream, the p(x) stream and, once the inner problem is solved, what it found; (N, 3, H, W) float32 in [0,1]."""

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
    """What a method is given when a run begins."""

    data: Dataset
    threat: Threat
    noise: Noise
    device: torch.device
    prior_rank: int


@dataclass(frozen=True)
class StepContext:
    """What a step may use beside model and batch; ``progress`` runs from 0 to 1."""

    threat: Threat
    noise: Noise
    progress: float

    @property
    def ranks(self) -> Ranks:
        """This process's place among the run's."""
        return self.noise.ranks


class MethodState(Protocol):
    """What a method keeps between steps, and what must survive a restart."""

    def state(self) -> dict[str, Tensor]:
        """Return it as tensors, the same on every rank."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""


class NoState:
    """The memory of a method that keeps none."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back nothing."""


M = TypeVar("M", bound=MethodState)


class Method(ABC, Generic[M]):
    """The numbers of one method, as a frozen dataclass, and its step."""

    @abstractmethod
    def begin(self, setting: RunContext) -> M:
        """Return the memory that a run of this method begins with."""

    def solve(self, model: nn.Module, batch: Batch, memory: M, now: StepContext) -> Batch:
        """Return ``batch`` with x_adv and x_neg found; parameters, batch-norm statistics and ``.grad`` are left alone."""
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, memory: M, now: StepContext) -> Terms:
        """Return the loss of one step, given what ``solve`` found."""


class Stateless(Method[NoState]):
    """A method whose steps are independent of each other."""

    def begin(self, setting: RunContext) -> NoState:
        """Return nothing."""
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
