"""The PyTorch engine: the fp32 reference that exported graphs are compared with; captured as CUDA graphs on a GPU."""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.energy import energy, score
from ebjdat_serve.engines import Device, Floats, Labels, Outputs, Precision, one_like, output_names
from ebjdat_serve.errors import EngineError, first_line
from ebjdat_serve.networks import Network, architecture_of, build
from ebjdat_serve.noise import normal
from ebjdat_serve.sgld import Chains, Sampler, langevin_step

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST = 256
"""The most chains that one CUDA graph moves."""
DEVICE_LOCK = threading.RLock()
"""Held while the GPU is used: a refresh loads, verifies and captures in another thread than the one that answers requests, and a
process can capture one graph at a time."""
log = logging.getLogger("ebjdat_serve")


def load_model(bundle: Bundle) -> Network:
    """Return the bundle's network in eval mode on the CPU; its parameters require no gradient."""
    m = bundle.manifest
    model = build(architecture_of(m.architecture), len(m.labels), load_file(bundle.path / "weights.safetensors"))
    return model.requires_grad_(False)


class TorchEngine:
    """The Engine protocol on PyTorch: blocks in fp32 or bf16; logits, energies and the state of chains always fp32."""

    name = "torch"

    def __init__(
        self, bundle: Bundle, device: Device = "auto", threads: int = 1, precision: Precision = "fp32", *, model: Network | None = None
    ) -> None:
        if device == "tensorrt":
            fit = ("--engine onnx --device tensorrt --precision fp32", "--engine onnx --device tensorrt --precision fp16")
            raise EngineError("TensorRT runs through ONNX Runtime", options=fit)
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError("CUDA was requested but torch sees no GPU: check the driver", options=("--device cpu",))
        if precision not in DTYPES:
            raise EngineError(f"{precision} needs ONNX Runtime", options=("--engine onnx", "--precision bf16"))
        torch.set_num_threads(threads)
        exact()
        self._device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        self.precision: Precision = precision
        self.provider = f"torch {torch.__version__} {self._device.type}"
        with self._lock():
            model = (model or load_model(bundle)).to(self._device)
            folded = model.folded_features(DTYPES[precision])
            self._fast, self._head = model.folded(DTYPES[precision], folded), model.head
            # on a CPU fp32 stays unfolded: it is the reference of every other engine
            exactly = precision == "fp32" and self._device.type == "cpu"
            self._model: Callable[[Tensor], Tensor] = model if exactly else self._fast
            self._features: Callable[[Tensor], Tensor] = model.features if exactly else folded
        if (m := bundle.manifest).output != "logits":
            raise EngineError(f"{bundle.path} gives {m.output}, which only its graph computes", options=("--engine onnx",))
        self._given = output_names(m)
        self._walks: dict[tuple[int, ...], Walk] = {}
        self._looks: dict[tuple[int, ...], Look] = {}
        self._pool: Any = None  # memory that all graphs share: one runs at a time, and its results are copied at once

    def sizes(self, most: int) -> list[int]:
        """Return the batch sizes that batches of 1 to ``most`` are computed in: on a GPU powers of two, each with a graph of its own."""
        largest = len(padding(min(most, LARGEST)))
        return [1] if self._device.type == "cpu" else [1 << i for i in range(largest.bit_length())]

    def classify(self, image: Floats) -> Outputs:
        """Return logits, energy and features; on a GPU by a captured graph of the next power of two."""
        if not len(image):
            return self.classify(one_like(image)).first(0)
        with self._lock(), torch.inference_mode():
            if self._device.type == "cpu":
                found = self._answer(torch.from_numpy(image))
                return Outputs.of({name: found[name].numpy() for name in self._given})
            return Outputs.join([self._looked(image[i : i + LARGEST]) for i in range(0, len(image), LARGEST)])

    def _answer(self, image: Tensor) -> dict[str, Tensor]:
        features = self._features(image)
        logits = self._head(features)
        return {"logits": logits, "energy": energy(logits), "features": features}

    def _looked(self, image: Floats) -> Outputs:
        n = len(image)
        padded = image[padding(n)]
        if padded.shape not in self._looks:
            look = Look(self._answer, padded, self._device)
            look.capture(self._memory())
            self._looks[padded.shape] = look
        look = self._looks[padded.shape]
        look.image.copy_(torch.from_numpy(padded))
        look.run()
        return Outputs.of({name: look.found[name][:n].cpu().numpy() for name in self._given})

    def _memory(self) -> Any:
        """Return the pool of the graphs' memory."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,); label -1 is the marginal E(x)."""
        if not len(image):
            gradient, energies = self.score(one_like(image), one_like(label))
            return gradient[:0], energies[:0]
        with self._lock():
            found = score(self._model, torch.from_numpy(image).to(self._device), torch.from_numpy(label).to(self._device))
        return found[0].cpu().numpy(), found[1].cpu().numpy()

    def advance(self, chains: Chains, steps: int) -> Chains:
        """Return ``chains`` after ``steps`` Langevin steps; on a GPU each is one launch of a captured graph of the next power of two."""
        if not len(chains.label):
            return chains.moved(chains.image, steps)
        if self._device.type == "cpu":
            return self._moved(Walk(self._fast, chains, self._device), chains, steps)
        parts = [chains.rows(slice(i, i + LARGEST)) for i in range(0, len(chains.label), LARGEST)]
        with self._lock():
            return Chains.join([self._captured(part, steps) for part in parts])

    def _lock(self) -> AbstractContextManager[object]:
        return nullcontext() if self._device.type == "cpu" else DEVICE_LOCK

    def _captured(self, chains: Chains, steps: int) -> Chains:
        padded = chains.rows(padding(len(chains.label)))
        shape = padded.image.shape
        if shape not in self._walks:
            walk = Walk(self._fast, padded, self._device)
            walk.capture(self._memory())
            self._walks[shape] = walk
        return self._moved(self._walks[shape], chains, steps, padded)

    def _moved(self, walk: "Walk", chains: Chains, steps: int, padded: Chains | None = None) -> Chains:
        walk.load(padded or chains)
        for _ in range(steps):
            walk.step()
        return chains.moved(walk.image[: len(chains.label)].cpu().numpy(), steps)


class Walk:
    """Chains in fixed device memory, updated in place; a step is a function, or its captured graph."""

    def __init__(self, model: Callable[[Tensor], Tensor], chains: Chains, device: torch.device) -> None:
        self._model = model
        self._state = {name: torch.from_numpy(array).to(device, copy=True) for name, array in chains.arrays().items()}
        self.image = self._state["image"]
        self.step = self._step

    def load(self, chains: Chains) -> None:
        """Overwrite the chains with ``chains``."""
        for name, array in chains.arrays().items():
            self._state[name].copy_(torch.from_numpy(array))

    def _step(self) -> None:
        s = self._state
        gradient, _ = score(self._model, s["image"], s["label"])
        each = [s[name].reshape(-1, 1, 1, 1) for name in ("step_size", "grad_clip", "noise_std")]
        noise = normal(s["key"], s["step"], tuple(self.image.shape[1:]))
        self.image.copy_(langevin_step(self.image, gradient, noise, Sampler(1, *each)))  # type: ignore[arg-type]
        s["step"] += 1

    def capture(self, pool: Any) -> None:
        """Capture a step as one launch."""
        self.step = captured(self._step, pool)


class Look:
    """A classification in fixed device memory; ``found`` holds the outputs of the last run."""

    def __init__(self, answer: Callable[[Tensor], dict[str, Tensor]], image: Floats, device: torch.device) -> None:
        self._answer, self.image = answer, torch.from_numpy(image).to(device, copy=True)
        self.found: dict[str, Tensor] = {}
        self.run = self._run

    def _run(self) -> None:
        self.found = self._answer(self.image)

    def capture(self, pool: Any) -> None:
        """Capture a run as one launch, which writes to the ``found`` of its capture."""
        self.run = captured(self._run, pool)


def captured(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Return ``function`` as one launch: warmed up on a side stream, as CUDA graphs require, then recorded; its memory is of ``pool``.

    A network of somebody else may not record, where it waits for the device, say, and a GPU may not have the memory: then ``function``
    itself is returned, and what was taken is given back.
    """
    try:
        warmed(function)
        return recorded(function, pool)
    except RuntimeError as error:
        if not lacked_memory(error):
            raise
        log.warning("a CUDA graph does not fit into the GPU's memory, so its calls are launched one by one: %s", first_line(error))
    torch.cuda.empty_cache()  # after the handler: the error's traceback holds what was computed
    return function


def warmed(function: Callable[[], None]) -> None:
    """Call a function on a side stream, as often as CUDA graphs require it before they are recorded."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


def recorded(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Return ``function`` as one launch, or itself where it does not record; raise RuntimeError where memory lacks."""
    graph = torch.cuda.CUDAGraph()
    try:
        # the default mode forbids allocations by every thread of the process during capture
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
    except RuntimeError as error:
        if lacked_memory(error):
            raise
        log.warning("this network does not record as a CUDA graph, so its calls are launched one by one: %s", first_line(error))
        return function
    return graph.replay


def lacked_memory(error: RuntimeError) -> bool:
    """Return whether a GPU's memory was too small, also where the end of the recording failed after that."""
    return any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__context__))


def padding(n: int) -> list[int]:
    """Return the rows of the next power of two: each of ``n`` once, and the first again in what is left."""
    return [*range(n), *[0] * ((1 << (n - 1).bit_length()) - n)]


def exact() -> None:
    """Make cuDNN deterministic and use fp32, not TF32, so that a threshold calibrated on a CPU holds on the GPU.

    This is global and permanent: two threads that each restore the previous setting can leave TF32 on.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
