"""The configuration of a training stage; training/presets.py holds the named presets."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ebjdat_serve.networks import Architecture
from ebjdat_serve.sgld import Sampler
from training.methods import Method
from training.methods.adversary import Threat
from training.methods.sharpness import Sharpness

CHOICES = {
    "augment": ("none", "crop", "strong"),
    "plain_augment": ("none", "crop", "strong"),
    "optimiser": ("sgd", "adam"),
    "schedule": ("linear", "cosine", "constant"),
    "precision": ("auto", "fp32", "bf16"),
}
FROM_ZERO = (
    "lr",
    "ema",
    "momentum",
    "weight_decay",
    "gradient_clip",
    "epochs",
    "padding",
    "plain_batch",
    "size",
    "save_seconds",
    "rollbacks",
)
"""Fields that are finite numbers from 0 up."""


@dataclass(frozen=True)
class Preset:
    """One training stage; lengths in pixels of [0,1], energies in nats, epochs of the labelled stream."""

    name: str
    dataset: str  # a name of training/data/sources.py, or the path of a folder of class sub-folders
    method: Method[Any]
    architecture: Architecture
    epochs: float
    seed: int = 0
    warm_start: "Preset | None" = None  # the stage whose weights this one starts from
    averaged_with: "Preset | None" = None  # a stage from the same start; what is published is the mean of both weights
    threat: Threat = Threat("linf", 8 / 255)

    # data
    size: int = 0  # side that a folder's images are resized to, 0: their own
    batch_size: int = 128
    plain_batch: int = 64  # of the p(x) stream
    augment: str = "crop"  # none | crop | strong: of the labelled stream
    plain_augment: str = "none"  # of the p(x) stream
    padding: int = 4  # pixels of the random crop
    flip: bool = True  # mirror images, where the data set allows
    extra: str = ""  # extra labelled images: an .npz or a folder
    extra_fraction: float = 0.7  # their share of the labelled batch

    # optimiser; the rate rises linearly up to lr_peak of the run, then follows the schedule
    optimiser: str = "sgd"  # sgd (Nesterov) | adam
    lr: float = 0.2
    schedule: str = "linear"  # linear | cosine, to zero, or constant
    lr_peak: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gradient_clip: float = 0.0  # global norm, 0: none
    sharpness: Sharpness | None = None
    frozen_norm: bool = False  # batch norm keeps the warm start's statistics
    ema: float = 0.995
    precision: str = "auto"  # auto (bf16 where the machine has it) | fp32 | bf16

    # the bundle's default sampler, and the rank of the prior
    sample: Sampler = Sampler(steps=40, step_size=0.25, grad_clip=2.0, noise_std=0.005)
    prior_rank: int = 48

    # checkpoint interval; limits beyond which the run has diverged; maximum number of rollbacks
    save_seconds: float = 45.0
    energy_gap_limit: float = 50.0  # nats between data and chains
    saturation_limit: float = 0.5  # share of chain pixels at 0 or 1, beyond the data's
    rollbacks: int = 3

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in FROM_ZERO:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number from 0 up, not {getattr(self, name)}")
        for name in ("batch_size", "prior_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.lr_peak < 1 or not math.isfinite(self.threat.eps):
            raise ValueError("lr_peak must be from 0 to below 1, and eps finite")
        if self.size:
            self.architecture.check_images(self.size, self.size)
        if self.averaged_with is not None and (self.averaged_with.averaged_with or self.averaged_with.warm_start):
            raise ValueError("averaged_with starts where this stage does, and two runs are averaged: it has no warm_start or averaged_with")
        names = [stage.name for stage in stages(self)]
        if len(set(names)) < len(names):  # a run has a folder for each
            raise ValueError(f"the stages of a recipe need different names, not {', '.join(names)}")


SHARED = ("seed", "dataset", "size", "flip", "architecture", "threat", "prior_rank", "sample", "precision", "extra", "extra_fraction")
"""Fields that the other stages of a recipe take from its last one."""


def alike(stage: Preset, other: Preset) -> Preset:
    """Return ``other`` on the data, network and ball of ``stage``."""
    changes: dict[str, Any] = {name: getattr(stage, name) for name in SHARED}
    return replace(other, **changes)


def stages(stage: Preset) -> list[Preset]:
    """Return the stages in order: its warm start with all before it, the stage that it is averaged with, the stage itself."""
    before = [] if stage.warm_start is None else stages(alike(stage, stage.warm_start))
    return [*before, *continuing(stage)]


def continuing(stage: Preset) -> list[Preset]:
    """Return the stages that continue one start: the stage, after the one that it is averaged with, if any."""
    if stage.averaged_with is None:
        return [stage]
    return [replace(alike(stage, stage.averaged_with), warm_start=stage.warm_start), stage]


def together(todo: Sequence[Preset], i: int) -> range:
    """Return which of the stages ``todo`` stage i belongs with: itself, or the two that are averaged. The one before is their start."""
    if todo[i].averaged_with is not None:
        return range(i - 1, i + 1)
    return range(i, i + 2) if i + 1 < len(todo) and todo[i + 1].averaged_with is not None else range(i, i + 1)


def work(stage: Preset) -> float:
    """Return what a step takes, roughly: the forwards and backwards of attack, chains and update, times their images."""
    attack, chains = getattr(stage.method, "attack", None), getattr(stage.method, "chains", None)
    walked = 0 if chains is None else (chains.steps + 1) * chains.batch
    return float((1 if attack is None else attack.steps + 1) * stage.batch_size + walked)


def describe(stage: Preset) -> dict[str, Any]:
    """Return the preset as JSON: methods and sharpness with their kind, the network with its family, the warm start as its name.

    ``averaged_with`` is there only where there is such a stage, with its settings.
    """
    described = asdict(replace(stage, warm_start=None, averaged_with=None))
    described.pop("averaged_with")
    if stage.averaged_with is not None:
        described["averaged_with"] = describe(continuing(stage)[0])
    for name in ("method", "sharpness"):
        if described[name] is not None:
            described[name] = {"kind": type(getattr(stage, name)).__name__, **described[name]}
    described["architecture"] = stage.architecture.described()
    return {**described, "warm_start": stage.warm_start.name if stage.warm_start else None}
