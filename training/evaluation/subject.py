"""What is evaluated: a bundle or any torch module, its network for attacks, and what it serves for everything else."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ebjdat_serve.bundle import Bundle, sha256
from ebjdat_serve.engines import Floats
from ebjdat_serve.engines.eager import Walk, load_model
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.folding import folded
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.sgld import Chains
from ebjdat_serve.wideresnet import WideResNet, build
from training.errors import DataError


@dataclass(frozen=True)
class Subject:
    """A classifier of images in [0,1]; ``network`` gives gradients, ``logits`` is what is served: a bundle's graph, else the network."""

    name: str
    network: Callable[[Tensor], Tensor]  # in eval mode, parameters without gradient
    logits: Callable[[Floats], Floats]  # (N, 3, H, W) -> (N, K)
    weights: str  # sha256 of the parameters
    graph: str  # sha256 of what ``logits`` runs
    device: torch.device
    advance: Callable[[Chains, int], Chains]  # Langevin steps


Spec = Callable[[], Subject]
"""Opens a subject; it is sent to worker processes, so it must be picklable to have any."""


def open_bundle(path: Path) -> Subject:
    """Return the subject of a bundle: torch for gradients, the fp32 graph through ONNX Runtime for all else."""
    bundle = Bundle.draft(path)
    engine = OnnxEngine(bundle, "cpu", 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(bundle).to(device)
    files = bundle.manifest.files

    def logits(image: Floats) -> Floats:
        return np.concatenate([f for f, _ in classify_in_chunks(engine, np.ascontiguousarray(image))])

    with torch.no_grad():
        network = folded(model)  # the same function to rounding, in four fifths of the time
    return Subject(
        bundle.manifest.name, network, logits, files["weights.safetensors"].sha256, files["classify.onnx"].sha256, device, engine.advance
    )


def bundle_spec(path: Path) -> Spec:
    """Return how to open a bundle."""
    return partial(open_bundle, path)


def open_module(name: str, module: nn.Module, digest: str) -> Subject:
    """Return the subject of a module: it is put in eval mode, and its parameters take no gradient."""
    module.eval().requires_grad_(False)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def logits(image: Floats) -> Floats:
        with torch.no_grad():
            parts = [module(part.to(device)).float().cpu() for part in torch.split(torch.from_numpy(np.ascontiguousarray(image)), 250)]
        return torch.cat(parts).numpy()

    def advance(chains: Chains, steps: int) -> Chains:
        walk = Walk(module, chains, device)
        for _ in range(steps):
            walk.step()
        return chains.moved(walk.image.cpu().numpy(), steps)

    return Subject(name, module, logits, digest, digest, device, advance)


def module_spec(module: nn.Module, name: str) -> Spec:
    """Return how to open a module; its sha256 is of its class, parameters and buffers."""
    return partial(open_module, name, module, module_sha256(module))


def module_sha256(module: nn.Module) -> str:
    """Return the sha256 of a module: what it is made of, in its own words, and its state."""
    buffer = io.BytesIO()
    for name, value in sorted(module.state_dict().items()):
        buffer.write(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        buffer.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashlib.sha256(f"{type(module).__qualname__} {module}".encode() + buffer.getvalue()).hexdigest()


def weights_spec(file: Path) -> Spec:
    """Return how to open weights that the trainer wrote, a WideResNet whose shape its tensors tell."""
    if not file.is_file():
        raise DataError(f"{file} is not there: name a safetensors file that the trainer wrote, or a bundle")
    return partial(open_weights, file)


def open_weights(file: Path) -> Subject:
    """Return the subject of a weights file; fp16 weights are computed with in fp32."""
    return open_module(file.parent.name, load_weights(file), sha256(file))


def load_weights(file: Path) -> WideResNet:
    """Return the WideResNet of a weights file in eval mode; raise DataError when it is not one."""
    state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(file).items()}
    try:
        blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        width = state["blocks.0.conv1.weight"].shape[0] // 16
        return build(2 * blocks + 4, width, state["head.weight"].shape[0], state)
    except (KeyError, RuntimeError, IndexError) as error:
        raise DataError(f"{file} holds no WideResNet of this project: {error}") from error
