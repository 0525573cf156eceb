"""The checkpoint of a training stage: weights, EMA, optimiser, the method's state, random state, position."""

import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ebjdat_serve.atomic import replacing
from ebjdat_serve.errors import first_line
from ebjdat_serve.networks import Network
from training.distributed import Noise
from training.errors import TrainingError
from training.methods import MethodState


@dataclass
class State:
    """Everything that changes during a stage; ``save`` and ``restore`` make a restart bit-identical on a CPU."""

    model: Network
    ema: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    method_state: MethodState
    noise: Noise
    step: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    lr_scale: float = 1.0
    fell_back: bool = False  # since the last save of its own

    def __post_init__(self) -> None:
        pairs = [(self.ema[name], value) for name, value in self.model.state_dict().items()]  # the same memory throughout the stage
        self._floating = [pair for pair in pairs if pair[1].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[1].is_floating_point()]

    def update_ema(self, decay: float) -> None:
        """Update the moving average, in a call for all; its decay starts low and rises to ``decay``."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_([mean for mean, _ in self._floating], [value for _, value in self._floating], 1 - decay)
        if self._counts:
            torch._foreach_copy_([mean for mean, _ in self._counts], [value for _, value in self._counts])

    def save(self, path: Path, *, keep: bool = True) -> None:
        """Replace the state, so that a kill at any moment leaves a whole file; every rank calls, the first writes.

        The previous state is kept as a second file, unless ``keep`` is false, when this one replaces a bad state.
        """
        self.fell_back = self.fell_back and not keep
        payload = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimiser": self.optimiser.state_dict(),
            "method_state": self.method_state.state_dict(),
            "generator": self.noise.generator.get_state(),
            "position": [self.step, self.seconds, self.rollbacks, self.lr_scale],
        }
        if self.noise.ranks.rank == 0:
            with writing(path) as temporary:
                torch.save(payload, temporary)
                if keep and path.is_file():
                    with replacing(previous(path)) as spare:
                        try:
                            os.link(path, spare)
                        except OSError:  # a file system without hard links
                            shutil.copyfile(path, spare)

    def restore(self, path: Path) -> None:
        """Restore everything from ``path``; raise TrainingError when it is damaged."""
        payload = read_state(path)
        self.model.load_state_dict(payload["model"])
        for name, value in payload["ema"].items():
            self.ema[name].copy_(value)
        self.optimiser.load_state_dict(payload["optimiser"])
        self.method_state.load_state_dict(payload["method_state"])
        self.noise.generator.set_state(payload["generator"])
        step, self.seconds, rollbacks, self.lr_scale = payload["position"]
        self.step, self.rollbacks = int(step), int(rollbacks)


def previous(path: Path) -> Path:
    """Return the path of the checkpoint before the last one."""
    return path.with_suffix(".previous.pt")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path``; raise TrainingError naming it for what torch and safetensors say of a full disk."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except (RuntimeError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be written ({first_line(error)}): is the disk full? Free space, then resume the run") from error


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a state file; raise TrainingError naming the file when it cannot be read."""
    try:
        payload: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        _, _, _, _ = payload["position"]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{path} is damaged ({type(error).__name__}): put {previous(path).name} in its place", options=("--run NAME",)
        ) from error
    return payload


@dataclass(frozen=True)
class Position:
    """The progress of a stage."""

    step: int
    seconds: float
    rollbacks: int


def load_position(path: Path) -> Position:
    """Return the position in a checkpoint; step 0 when there is none."""
    if not path.is_file():
        return Position(0, 0.0, 0)
    step, seconds, rollbacks, _ = read_state(path)["position"]
    return Position(int(step), float(seconds), int(rollbacks))


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write parameters and batch-norm statistics as safetensors, atomically; step counters are left out."""
    kept = {name: value.detach().float().contiguous() for name, value in weights.items() if value.is_floating_point()}
    with writing(path) as temporary:
        save_file(kept, temporary)


def check_weights(folder: Path) -> None:
    """Write a finished stage's weights again, from its state, if they are missing; raise TrainingError when they are damaged."""
    file, state = folder / "weights.safetensors", folder / "state.pt"
    if not file.is_file() and load_position(state).step:
        save_weights(read_state(state)["ema"], file)
    read_weights(file)


def mean_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the mean of the weights of several runs from one start, in float32 (arXiv 2203.05482).

    Raises TrainingError for a file that is damaged, or that is not of the first one's network.
    """
    every = []
    for file in files:
        every.append(read_weights(file))
        if {name: value.shape for name, value in every[-1].items()} != {name: value.shape for name, value in every[0].items()}:
            raise TrainingError(f"{file} is of another network than {files[0]}: they have no mean")
    return {name: torch.stack([weights[name] for weights in every]).mean(dim=0) for name in every[0]}


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a run's own weights as float32; raise TrainingError that says how the run mends them."""
    if not file.is_file():
        raise TrainingError(f"{file} is missing")
    try:
        return load_weights(file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{file} is damaged ({error}): delete it, and the run writes it again when it is resumed") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of ``path`` as float32."""
    return {name: value.float() for name, value in load_file(path).items()}
