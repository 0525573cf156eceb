"""The evaluated model: a bundle or any torch module, with its network for gradients and its served function for all else."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays_of
from safetensors.torch import load_file
from torch import Tensor, nn

from ebjdat_serve.bundle import Bundle, sha256
from ebjdat_serve.energy import score
from ebjdat_serve.engines import Floats, Labels, Outputs, load_engine
from ebjdat_serve.engines.eager import Walk, exact, load_model
from ebjdat_serve.errors import OF_NETWORKS, EbjdatError, EngineError, first_line
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.networks import CONSTANT, Network, PythonArchitecture, Wrapped, architecture_of, network_of
from ebjdat_serve.rows import SUM
from ebjdat_serve.selftest import relative_error
from ebjdat_serve.sgld import Chains
from ebjdat_serve.views import Combination, Seen
from training.errors import DataError, TrainingError
from training.evaluation.scores import ood_score_of
from training.evaluation.view_scores import SeenTensors, SumOfViews, sum_of_views

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class ServedViews:
    """The views of a calibrated bundle: ``outputs`` is served; ``features``, ``head`` and ``total`` are the same for gradients."""

    combination: Combination
    outputs: Callable[[Floats], Outputs]
    features: Callable[[Tensor], Tensor]  # (N, 3, H, W) -> (N, F)
    head: Callable[[Tensor], Tensor]  # (N, F) -> (N, K)
    total: SumOfViews

    def look(self, image: Floats) -> Arrays:
        """Return the served logits (N, K) and terms (N, V) of images (N, 3, H, W)."""
        found = self.outputs(image)
        return {"logits": found.logits, "terms": self.combination.terms(Seen(image, found.features, found.logits))}

    def scored(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, K) and the sum of the views (N,), differentiable."""
        features = self.features(image)
        logits = self.head(features)
        return logits, self.total(SeenTensors(image, features, logits))


@dataclass(frozen=True)
class EvaluatedModel:
    """A classifier of images in [0,1]; ``network`` is for gradients, ``logits`` is served: a bundle's graph, else the network."""

    name: str
    network: Callable[[Tensor], Tensor]  # in eval mode, parameters without gradient
    logits: Callable[[Floats], Floats]  # (N, 3, H, W) -> (N, K)
    weights: str  # sha256 of the parameters
    graph: str  # sha256 of the graph of ``logits``
    device: torch.device
    score: Callable[[Floats, Labels], tuple[Floats, Floats]]  # -dE(x,y)/dx and E(x,y), served
    advance: Callable[[Chains, int], Chains]  # Langevin steps
    key: str  # sha256 of everything its outputs depend on: the cache key of its results
    random: bool = False  # outputs differ from call to call; ``logits`` are then the mean of ten
    no_network: str = ""  # why there is no network for gradients, which ``network`` then raises; "" where there is
    views: ServedViews | None = None  # of a calibrated bundle

    def look(self, image: Floats) -> Arrays:
        """Return the served logits (N, K) and, of a calibrated bundle, each view's term (N, V): all that a score of COMPARED is of."""
        return self.views.look(image) if self.views else {"logits": self.logits(image)}

    def scored(self, score: str, weight: float, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, K) and the OOD score (N,) of the network, differentiable."""
        if score == SUM:
            assert self.views is not None, "the sum of views is of a calibrated bundle"
            return self.views.scored(image)
        logits = self.network(image).float()
        return logits, ood_score_of(score, weight)(logits)


ANSWERS = 10
Spec = Callable[[], EvaluatedModel]
"""Opens a subject; worker processes need it to be picklable."""


def open_bundle(path: Path, allow_code: bool = False) -> EvaluatedModel:
    """Return the subject of a bundle: torch for gradients; the fp32 graph on ONNX Runtime, if installed, for all else.

    If torch has a GPU that ONNX Runtime cannot use, torch does both: the graph would take hours on one CPU thread. An imported bundle may
    have no network for torch; ``allow_code``: one that is Python code is run.
    """
    bundle = Bundle.draft(path)
    device = best_device()
    exact()  # the network's gradients, too, where ONNX Runtime serves
    model, no_network = torch_network(bundle, allow_code=allow_code)
    kind, where = ("onnx" if runtime_has(device) else "torch"), device.type
    if bundle.manifest.imported and kind == "torch":  # its network may be none that torch has
        kind, where = "onnx", "cpu"
    engine = load_engine(bundle, kind, where, 1)  # type: ignore[arg-type]
    files = bundle.manifest.files

    def outputs(image: Floats) -> Outputs:
        return classify_in_chunks(engine, np.ascontiguousarray(image))

    def missing(x: Tensor) -> Tensor:
        raise TrainingError(no_network)

    features: Callable[[Tensor], Tensor] = missing
    head: Callable[[Tensor], Tensor] = missing
    if model is not None:
        with torch.no_grad():
            model = model.to(device)
            features, head = model.folded_features(torch.float32), model.head  # the same up to rounding, in four fifths of the time
    views = None
    if "calibration.json" in files:
        combination = bundle.combination()
        views = ServedViews(combination, outputs, features, head, sum_of_views(combination, device))
    every = ("weights.safetensors", "classify.onnx", "step.onnx", *(["views.safetensors"] if views else []))
    of = {name: files[name].sha256 for name in every if name in files}
    weights = of["weights.safetensors"]
    return EvaluatedModel(
        name=bundle.manifest.name,
        network=lambda image: head(features(image)),
        logits=lambda image: outputs(image).logits,
        weights=weights,
        graph=of["classify.onnx"] if engine.name == "onnx" else weights,  # without ONNX Runtime no graph was measured
        device=device,
        score=engine.score,
        advance=engine.advance,
        key=digest_of(*of.values(), engine.name, device.type, *(["without a network"] if no_network else [])),
        views=views,
        no_network=no_network,
    )


APART = 1e-3
"""The most, of the largest logit, by which a network that is built again may differ from the graph that was exported of it."""


def torch_network(bundle: Bundle, *, allow_code: bool = False) -> tuple[Network | None, str]:
    """Return a bundle's network for gradients, or None and the reason why an imported bundle has none here.

    A network that a package of another version builds may be another one: on the self-test's images it must answer as it did.
    """
    if not bundle.manifest.imported:
        return load_model(bundle), ""
    try:
        network = code_network(bundle, allow_code=allow_code) or load_model(bundle)
        expected = load_arrays_of(bundle.path / "selftest.safetensors")
        with torch.no_grad():
            found = network(torch.from_numpy(expected["image"])).numpy()
        off = relative_error(found, expected[bundle.manifest.output])
    except EbjdatError as error:
        return None, str(error)
    except OF_NETWORKS as error:
        return None, f"its network cannot be built here: {type(error).__name__}: {first_line(error)}"
    if not off <= APART:
        return None, f"the network that is built here is not the one that is served: its logits differ by {off:.1e} of the largest"
    return network, ""


def code_network(bundle: Bundle, *, allow_code: bool) -> Network | None:
    """Return the network of a bundle that is Python code; None for one of another family. Raises EbjdatError without ``allow_code``."""
    architecture = architecture_of(bundle.manifest.architecture)
    if not isinstance(architecture, PythonArchitecture):
        return None
    if not allow_code:
        raise EngineError(f"the network is Python code, {architecture.callable}: --allow-code runs it, with your rights")
    from ebjdat_serve.importing.python_code import made

    module = made(architecture.callable).float()
    network = Wrapped(module, len(bundle.manifest.labels), architecture.normalisation, architecture.head)
    weights = load_file(bundle.path / "weights.safetensors")
    network.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(CONSTANT)})
    return network.eval().requires_grad_(False)


def best_device() -> torch.device:
    """Return the GPU if torch has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def runtime_has(device: torch.device) -> bool:
    """Return whether ONNX Runtime is installed and computes on ``device``."""
    if not find_spec("onnxruntime"):
        return False
    from ebjdat_serve.engines import providers

    return device.type == "cpu" or providers.chosen("auto", "fp32") == providers.CUDA


def bundle_spec(path: Path, *, allow_code: bool = False) -> Spec:
    """Return the spec that opens a bundle."""
    return partial(open_bundle, path, allow_code)


def open_module(name: str, module: nn.Module, digest: str, key: str = "", random: bool = False) -> EvaluatedModel:
    """Return the subject of a module: puts it in eval mode, its parameters without gradient."""
    module.eval().requires_grad_(False)
    exact()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def once(image: Floats) -> Floats:
        with torch.no_grad():
            parts = [module(part.to(device)).float().cpu() for part in torch.split(torch.from_numpy(np.ascontiguousarray(image)), 250)]
        return torch.cat(parts).numpy()

    def often(image: Floats) -> Floats:
        mean: Floats = np.mean([once(image) for _ in range(ANSWERS)], axis=0, dtype=np.float32)
        return mean

    def gradient(image: Floats, label: Labels) -> tuple[Floats, Floats]:
        towards, energies = score(module, torch.from_numpy(image).to(device), torch.from_numpy(label).to(device))
        return towards.cpu().numpy(), energies.cpu().numpy()

    def advance(chains: Chains, steps: int) -> Chains:
        walk = Walk(module, chains, device)
        for _ in range(steps):
            walk.step()
        return chains.moved(walk.image.cpu().numpy(), steps)

    logits = often if random else once
    return EvaluatedModel(name, module, logits, digest, digest, device, gradient, advance, key or digest, random)


def module_spec(module: nn.Module, name: str, probe: Floats | None = None) -> Spec:
    """Return the spec that opens a module; its sha256 is of its class, attributes, parameters and buffers.

    Its output on ``probe`` is part of the key of its results, which covers any other state it computes with. A model whose output or
    gradient differs between calls is treated as random: its output is then the mean of ten.
    """
    digest = module_sha256(module)
    if probe is None:
        return partial(open_module, name, module, digest)
    subject = open_module(name, module, digest)
    first, second = (subject.logits(probe) for _ in range(2))
    random = bool(np.abs(first - second).max() > 1e-4 * np.abs(first).max()) or gradient_varies(subject, probe)
    output = "at random" if random else hashlib.sha256(np.round(first, 3).tobytes()).hexdigest()
    return partial(open_module, name, module, digest, digest_of(digest, output), random)


def gradient_varies(subject: EvaluatedModel, probe: Floats) -> bool:
    """Return whether two passes with autograd differ: a model may be random only with autograd on."""
    answers = []
    for _ in range(2):
        x = torch.from_numpy(probe).to(subject.device).requires_grad_()
        with torch.enable_grad():
            answers.append(subject.network(x).detach().float())
    return bool((answers[0] - answers[1]).abs().max() > 1e-4 * answers[0].abs().max())


def digest_of(*parts: str) -> str:
    """Return the sha256 of several texts."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def module_sha256(module: nn.Module) -> str:
    """Return the sha256 of a module: its classes' sources, plain attributes, parameters and buffers."""
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        simple = bool | int | float | str
        plain = {name: value for name, value in vars(part).items() if isinstance(value, simple) and name != "training"}
        digest.update(f"{path} {type(part).__module__}.{type(part).__qualname__} {source(type(part))} {plain}".encode())
    for name, value in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source(kind: type) -> str:
    """Return the source of a class, or an empty string if it cannot be read."""
    if kind.__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def weights_spec(file: Path, device: torch.device) -> Spec:
    """Return the spec that opens weights of the trainer, whose network is inferred from their names and shapes."""
    return partial(open_weights, file, device)


def open_weights(file: Path, device: torch.device) -> EvaluatedModel:
    """Return the subject of a weights file on a device; fp16 weights are converted to fp32."""
    return open_module(file.parent.name, load_weights(file).to(device), sha256(file))


def load_weights(file: Path) -> Network:
    """Return the network of a weights file in eval mode; raise DataError when no family matches."""
    if not file.is_file():
        raise DataError(f"{file} does not exist: name a safetensors file of the trainer, or a bundle")
    try:
        state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(file).items()}
        return network_of(state)
    except (KeyError, RuntimeError, ValueError, IndexError, OSError, SafetensorError) as error:
        raise DataError(f"{file} holds no network of this project: {error}") from error
