"""The graphs of a network: classify, and score and step where its gradient exports."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from ebjdat_serve.bundle import graph_name, sha256
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.exporting.onnx_files import chained, constants, converted, finish
from ebjdat_serve.exporting.tracing import Classify, Move, Score, program, traced
from ebjdat_serve.manifest import YES
from ebjdat_serve.networks import Network

INPUTS = {
    "classify": ["image"],
    "score": ["image", "label"],
    "step": ["image", "label", "key", "step", "step_size", "grad_clip", "noise_std"],
}
OUTPUTS = {
    "classify": ["logits", "energy", "features"],
    "score": ["score", "energy"],
    "step": ["next_image", "energy", "next_step"],
}
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Exported:
    """The files that were written, and what they cannot do: "yes", or the reason why not."""

    files: list[str]
    features: str
    gradient: str


class Graphs:
    """The ONNX models of a network in eval mode, for images of a height and a width; step is score and a move, so the gradient is once."""

    def __init__(self, model: Network, height: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        n = 2
        self._model, self._dtype = model, dtype
        self._example = {
            "image": torch.rand(n, 3, height, width),
            "score": torch.rand(n, 3, height, width),
            "label": torch.tensor([0, -1]),
            "key": torch.zeros(n, 4, 4, dtype=torch.int64),
            "step": torch.zeros(n, dtype=torch.int64),
        }

    def __call__(self, function: str) -> onnx.ModelProto:
        """Return the model of one function."""
        match function:
            case "classify":
                outputs = OUTPUTS[function] if not self._model.no_features else OUTPUTS[function][:-1]
                return self._converted(Classify(self._model, self._dtype), INPUTS[function], outputs)
            case "score":
                return self._score
        inputs = [name if name != "label" else "score" for name in INPUTS["step"]]
        move = self._converted(Move(), inputs, ["next_image", "next_step"])
        return chained(self._score, move, "score", INPUTS["step"], OUTPUTS["step"])

    @cached_property
    def _score(self) -> onnx.ModelProto:
        gradient = traced(Score(self._model, self._dtype), self._arguments(INPUTS["score"]))
        return self._converted(gradient, INPUTS["score"], OUTPUTS["score"])

    def _converted(self, module: nn.Module, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
        return converted(program(module, self._arguments(inputs)), inputs, outputs)

    def _arguments(self, names: list[str]) -> tuple[Tensor, ...]:
        return tuple(self._example.get(name, torch.ones(2)) for name in names)


def export_network(
    model: Network, folder: Path, height: int, width: int, about: dict[str, str], say: Callable[[str], None] = print
) -> Exported:
    """Write weights.safetensors and the graphs of any network into ``folder``; ``about`` is their metadata beside the weights' sha256.

    One copy of the weights: what the exporter computed of them lies beside them under names of its own. Raises EbjdatError where not
    even classify exports; where the gradient does not, the reason is returned.
    """
    model = model.eval().requires_grad_(False)
    models: dict[str, onnx.ModelProto] = {}
    graph = Graphs(model, height, width)
    gradient = YES
    for function in INPUTS:
        began = time.monotonic()
        try:
            models[function] = graph(function)
        except Exception as error:
            why = reason(error)
            if function == "classify":
                raise EbjdatError(f"the network cannot be exported: {why}") from error
            gradient = f"the gradient cannot be exported: {why}"
            models = {"classify": models["classify"]}
            say(f"{function}: {gradient}")
            break
        say(f"{function}: {len(models[function].graph.node)} operators, {time.monotonic() - began:.0f} s")
    write_weights(model, models, folder / WEIGHTS)
    about = {**about, "weights": sha256(folder / WEIGHTS), "precision": "fp32"}
    for function, written in models.items():
        finish(written, folder / graph_name(function, "fp32"), about)
    return Exported([WEIGHTS, *(graph_name(function, "fp32") for function in models)], model.no_features or YES, gradient)


def write_weights(model: Network, models: dict[str, onnx.ModelProto], file: Path) -> None:
    """Write the network's tensors, and the constants of its graphs that are none of them, as safetensors."""
    # each with memory of its own: tied weights share theirs
    tensors = {name: tensor.detach().cpu().numpy().copy(order="C") for name, tensor in model.state_dict().items()}
    save_file({**tensors, **constants(models.values(), {tensor.tobytes() for tensor in tensors.values()})}, file)
    file.chmod(0o644)  # safetensors writes files that only their owner may read


def reason(error: BaseException) -> str:
    """Return the deepest cause of an exporter's error, in one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
