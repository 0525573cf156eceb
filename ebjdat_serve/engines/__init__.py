"""Engines run a bundle's functions: f(x) with E(x), the score, and Langevin steps; ``load_engine`` chooses engine, device and precision."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.errors import EngineError
from ebjdat_serve.install import install, pip
from ebjdat_serve.manifest import YES, Manifest
from ebjdat_serve.sgld import Chains

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
EngineKind = Literal["auto", "onnx", "torch"]
Device = Literal["auto", "cpu", "cuda", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
TINY = np.float32(np.finfo(np.float32).tiny)
"""What a probability of 0 counts as, so that it has a logarithm."""


class Outputs(NamedTuple):
    """Logits f(x) (N, K), energy E(x) (N,), nats, and the features (N, F) that the last layer takes; None where the bundle has none.

    Of a model that gives probabilities the logits are their logs: softmax of them is what it gave, and its energy would be 0.
    """

    logits: Floats
    energy: Floats | None
    features: Floats | None

    @staticmethod
    def of(named: Mapping[str, Floats]) -> "Outputs":
        """Return the outputs of a classify graph, given by their names."""
        logits = named["logits"] if "logits" in named else np.log(np.maximum(named["probabilities"], TINY))
        return Outputs(logits, named.get("energy"), named.get("features"))

    def first(self, n: int) -> "Outputs":
        """Return the outputs of the first ``n`` images."""
        return Outputs(*(None if column is None else column[:n] for column in self))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: Sequence["Outputs"]) -> "Outputs":
        """Return the outputs of all images of ``parts``, in order."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*parts, strict=True)
        return Outputs(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


def one_like(rows: NDArray[Any]) -> NDArray[Any]:
    """Return one row of zeros: an empty batch is answered with none of the rows of such a one, since not every engine computes it."""
    return np.zeros((1, *rows.shape[1:]), rows.dtype)


def given(values: Floats | None, what: str) -> Floats:
    """Return an output that a caller cannot do without; raise EngineError where the model gives none."""
    if values is None:
        raise EngineError(f"this takes the {what}, which the model does not give: `ebjdat-serve inspect` says why")
    return values


def output_names(manifest: Manifest) -> list[str]:
    """Return the names of the outputs that a bundle's classify graph must have."""
    can = manifest.capabilities
    return [manifest.output, *(["energy"] if can.energy == YES else []), *(["features"] if can.features == YES else [])]


class Differentiable(Protocol):
    """The part of an engine that searches in image space use."""

    def classify(self, image: Floats) -> tuple[Floats, *tuple[Any, ...]]:
        """Return logits (N, K) first."""

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,)."""


class Engine(Protocol):
    """The interface of a model for server, calibration and evaluation; images (N, 3, H, W) float32 in [0,1], of which N may be 0."""

    name: str
    provider: str
    precision: Precision

    def sizes(self, most: int) -> list[int]:
        """Return the batch sizes that batches of 1 to ``most`` are computed in, each of which the first time prepares for."""

    def classify(self, image: Floats) -> Outputs:
        """Return logits, energy and features."""

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,); label -1 is the marginal E(x)."""

    def advance(self, chains: Chains, steps: int) -> Chains:
        """Return ``chains`` after ``steps`` Langevin steps; nothing is copied to or from the host between steps."""


def on_cpu(engine: Engine) -> bool:
    """Return whether an engine computes on a CPU."""
    return engine.provider == "CPUExecutionProvider" or engine.provider.endswith(" cpu")


def load_engine(
    bundle: Bundle, kind: EngineKind = "auto", device: Device = "auto", threads: int = 1, precision: Precision = "fp32"
) -> Engine:
    """Return the requested engine; ``auto`` selects ONNX Runtime, torch for bf16, and the GPU if it runs there.

    Raises EngineError when a choice made by name cannot run here, BundleError when the bundle has no such precision.
    """
    if kind == "torch" or (kind == "auto" and precision == "bf16"):
        if find_spec("torch") is None:
            raise EngineError(
                f"the torch engine, which bf16 uses, needs PyTorch: {pip('install', 'torch==2.13.0')}",
                options=("--engine onnx --precision fp32",),
            )
        from ebjdat_serve.engines.eager import TorchEngine

        return TorchEngine(bundle, device, threads, precision)
    check_onnxruntime()
    from ebjdat_serve.engines.ort import OnnxEngine

    return OnnxEngine(bundle, device, threads, precision)


def check_onnxruntime() -> None:
    """Raise EngineError unless exactly one of onnxruntime and onnxruntime-gpu is installed."""
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if not found or find_spec("onnxruntime") is None:
        raise EngineError(f"ONNX Runtime is not installed: {install('cpu')}, or [gpu] on a machine with an NVIDIA GPU")
    if len(found) == 2:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            f"{pip('uninstall', 'onnxruntime', 'onnxruntime-gpu')}, then {install('cpu')}, or [gpu]"
        )


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
