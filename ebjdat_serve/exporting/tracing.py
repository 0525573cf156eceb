"""Trace the model and its score into programs of forward operators only, which torch.onnx can export."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from ebjdat_serve.energy import energy, score
from ebjdat_serve.networks import Network
from ebjdat_serve.noise import normal
from ebjdat_serve.sgld import Sampler, langevin_step

aten = torch.ops.aten
BATCH = torch.export.Dim("batch", min=1, max=4096)


class Function(nn.Module):
    """The function of one graph; blocks in ``dtype``, the rest in fp32."""

    def __init__(self, model: Network, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype


class Classify(Function):
    """image -> f(x), E(x), features; in fp32 with unfolded norms, which engines fold and quantisation needs."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exact = self.dtype == torch.float32
        features = self.model.features(image) if exact else self.model.folded_features(self.dtype)(image)
        logits = self.model.head(features)
        return logits, energy(logits), features


class Score(Function):
    """image, label -> -dE(x,y)/dx, E(x,y); label -1 is the marginal."""

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return score(self.model.folded(self.dtype), image, label)


class Step(Function):
    """A chain -> the chain one Langevin step later, and E(x,y) before the step; sampler parameters are per chain."""

    def forward(
        self, image: Tensor, label: Tensor, key: Tensor, step: Tensor, step_size: Tensor, grad_clip: Tensor, noise_std: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient, energies = score(self.model.folded(self.dtype), image, label)
        each = [value.reshape(-1, 1, 1, 1) for value in (step_size, grad_clip, noise_std)]
        noise = normal(key, step, (3, int(image.shape[2]), int(image.shape[3])))
        moved = langevin_step(image, gradient, noise, Sampler(1, *each))  # type: ignore[arg-type]
        return moved, energies, step + 1


def program(module: Function, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return ``module`` as an exported program with a dynamic batch."""
    each: tuple[Any, ...] = tuple({0: BATCH} for _ in arguments)
    if isinstance(module, Classify):
        return torch.export.export(module, arguments, dynamic_shapes=each, strict=False)
    return torch.export.export(traced(module, arguments), arguments, dynamic_shapes=(each,), strict=False)


def traced(module: Function, arguments: tuple[Tensor, ...]) -> "Weighted":
    """Return ``module`` with its autograd traced into forward operators only.

    torch.export cannot trace autograd.grad, and ONNX has no convolution_backward: docs/decisions/0003. Parameters are arguments
    while tracing, so that values computed from them (folded norms, flipped kernels) become operators on the one copy.
    """
    names, values = zip(*{**dict(module.named_parameters()), **dict(module.named_buffers())}.items(), strict=True)
    values = tuple(value.detach() for value in values)

    def function(*everything: Tensor) -> tuple[Tensor, ...]:
        inputs, weights = everything[: len(arguments)], everything[len(arguments) :]
        result: tuple[Tensor, ...] = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), inputs)
        return result

    table: dict[Any, Callable[..., Any]] = get_decompositions(
        [aten.native_batch_norm_backward, aten.native_batch_norm, aten.cudnn_batch_norm, aten.detach]
    )
    table[aten.silu_backward.default] = silu_backward
    table[aten.convolution_backward.default] = convolution_backward
    trace: Callable[..., torch.fx.GraphModule] = make_fx(
        function, tracing_mode="symbolic", decomposition_table=table, _allow_non_fake_inputs=True
    )
    return Weighted(trace(*arguments, *values), values)


class Weighted(nn.Module):
    """A traced function with its weights in place."""

    def __init__(self, function: torch.fx.GraphModule, weights: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.function = function
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight{i}", weight)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.function(*inputs, *self.buffers())
        return result


def silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of y = x sigmoid(x) in x, in terms of y: sigmoid and y are reused from the forward."""
    sigmoid = torch.sigmoid(x)
    return gradient * (sigmoid + x * sigmoid * (1 - sigmoid))


def convolution_backward(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    mask: list[bool],
) -> tuple[Tensor, None, None]:
    """Return the gradient of a convolution in its input, as a convolution where the stride is one, else as a transposed one.

    A convolution with the flipped kernel is the same sum, and engines run it faster.
    """
    size = [int(weight.shape[2 + i]) for i in (0, 1)]
    if list(stride) == [1, 1] and all(2 * pad == k - 1 for pad, k in zip(padding, size, strict=True)) and groups == 1:
        return (
            aten.convolution.default(gradient, weight.transpose(0, 1).flip(2, 3), None, stride, padding, dilation, False, [0, 0], 1),
            None,
            None,
        )
    missing = [
        int(inputs.shape[2 + i]) - ((int(gradient.shape[2 + i]) - 1) * stride[i] - 2 * padding[i] + dilation[i] * (size[i] - 1) + 1)
        for i in (0, 1)
    ]
    return aten.convolution.default(gradient, weight, None, stride, padding, dilation, True, missing, groups), None, None
