"""Trace the model and its score into programs of forward operators only, which torch.onnx can export."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebjdat_serve.energy import energy, score
from ebjdat_serve.exporting.gradients import MeanPooling, gradients
from ebjdat_serve.networks import Network
from ebjdat_serve.noise import normal
from ebjdat_serve.sgld import Sampler, langevin_step

BATCH = torch.export.Dim("batch", min=1, max=4096)


class Classify(nn.Module):
    """image -> f(x), E(x), and features where the network has them.

    Blocks in ``dtype``, the rest in fp32; in fp32 with unfolded norms, which engines fold and quantisation needs.
    """

    def __init__(self, model: Network, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        exact = self.dtype == torch.float32
        features = self.model.features(image) if exact else self.model.folded_features(self.dtype)(image)
        logits = self.model.head(features)
        return (logits, energy(logits)) if self.model.no_features else (logits, energy(logits), features)


class Score(nn.Module):
    """image, label -> -dE(x,y)/dx, E(x,y); label -1 is the marginal. Blocks in ``dtype``, the rest in fp32."""

    def __init__(self, model: Network, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return score(self.model.folded(self.dtype), image, label)


class Move(nn.Module):
    """A chain and its score -> the chain one Langevin step later; sampler parameters are per chain."""

    def forward(
        self, image: Tensor, score: Tensor, key: Tensor, step: Tensor, step_size: Tensor, grad_clip: Tensor, noise_std: Tensor
    ) -> tuple[Tensor, Tensor]:
        each = [value.reshape(-1, 1, 1, 1) for value in (step_size, grad_clip, noise_std)]
        noise = normal(key, step, (3, int(image.shape[2]), int(image.shape[3])))
        return langevin_step(image, score, noise, Sampler(1, *each)), step + 1  # type: ignore[arg-type]


def program(module: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return ``module`` as an exported program with a dynamic batch."""
    each: tuple[Any, ...] = tuple({0: BATCH} for _ in arguments)
    # attention in plain products: its fused kernels have backward operators of their own, which ONNX has not
    with sdpa_kernel(SDPBackend.MATH):
        return torch.export.export(module, arguments, dynamic_shapes=(each,) if isinstance(module, Weighted) else each, strict=False)


def traced(module: Score, arguments: tuple[Tensor, ...]) -> "Weighted":
    """Return ``module`` with its autograd traced into forward operators only.

    torch.export cannot trace autograd.grad, and ONNX has no convolution_backward: docs/decisions/0003. Parameters are arguments
    while tracing, so that values computed from them (folded norms, flipped kernels) become operators on the one copy. Only the batch is
    symbolic: reasoning about the sizes of every weight took most of the time.
    """
    names, values = zip(*{**dict(module.named_parameters()), **dict(module.named_buffers())}.items(), strict=True)
    values = tuple(value.detach() for value in values)

    def function(*everything: Tensor) -> tuple[Tensor, ...]:
        inputs, weights = everything[: len(arguments)], everything[len(arguments) :]
        result: tuple[Tensor, ...] = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), inputs)
        return result

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(value, symbolic_context=batched(value), source=ConstantSource(f"input{i}")) for i, value in enumerate(arguments)
    ]
    fakes += [mode.from_tensor(value, static_shapes=True) for value in values]
    with mode, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH), MeanPooling():
        trace: Callable[..., torch.fx.GraphModule] = make_fx(function, decomposition_table=gradients())
        return Weighted(trace(*fakes), values)


def batched(value: Tensor) -> StatelessSymbolicContext[Any, Any]:
    """Return that the first size of an input varies, and no other."""
    return StatelessSymbolicContext([DimDynamic.DYNAMIC, *(value.dim() - 1) * [DimDynamic.STATIC]])


class Weighted(nn.Module):
    """A traced function with its weights in place."""

    def __init__(self, function: torch.fx.GraphModule, weights: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.function, self._names = function, [f"weight{i}" for i in range(len(weights))]
        for name, weight in zip(self._names, weights, strict=True):
            self.register_buffer(name, weight)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.function(*inputs, *(getattr(self, name) for name in self._names))
        return result
