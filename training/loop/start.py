"""The state before a stage's first step: network, optimiser and method state from a preset, weights from a file."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ebjdat_serve.networks import Network
from training.config import Preset
from training.data.datasets import Dataset
from training.distributed import Noise, Ranks
from training.errors import DataError, TrainingError
from training.loop.state import State, load_weights
from training.methods import RunContext


def new_state(preset: Preset, data: Dataset, init: Path | None, device: torch.device, ranks: Ranks = Ranks()) -> State:
    """Return a fresh state: seeded weights, or those of ``init``, a new optimiser, and the method's first state."""
    torch.manual_seed(preset.seed)
    model = preset.architecture.build(len(data.names))
    if init is not None:
        load_init(model, init)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.autocast = precision(preset, device)
    if model.autocast is None:
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    noise = Noise.seeded(preset.seed, device, ranks)
    method_state = preset.method.begin(RunContext(data, preset.threat, noise, device, preset.prior_rank))
    return State(model, ema, new_optimiser(preset, model), method_state, noise)


def check_images(preset: Preset, data: Dataset) -> None:
    """Raise DataError when the preset's network cannot take images of the data's size."""
    try:
        preset.architecture.check_images(*data.size)
    except ValueError as error:
        raise DataError(f"{preset.dataset}: {error}", options=("--set size=32",)) from error


def load_init(model: Network, init: Path) -> None:
    """Load ``init`` into ``model``; raise TrainingError when it is not weights of this network."""
    try:
        problems = model.load_state_dict(load_weights(init), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainingError(f"{init} cannot start this network: {error}") from error
    missing = [name for name in problems.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or problems.unexpected_keys:
        raise TrainingError(f"{init} is not of this network: missing {missing[:3]}, unexpected {problems.unexpected_keys[:3]}")


def new_optimiser(preset: Preset, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or Adam; norms and biases do not decay."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": preset.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if preset.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=preset.lr, momentum=preset.momentum, nesterov=preset.momentum > 0, foreach=True)
    return torch.optim.Adam(groups, lr=preset.lr, foreach=True)


def precision(preset: Preset, device: torch.device) -> torch.dtype | None:
    """Return the dtype of the blocks: bf16 where the machine computes in it, else None for fp32."""
    if preset.precision == "fp32":
        return None
    if preset.precision == "bf16":
        return torch.bfloat16
    fast = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.bfloat16 if fast else None
