"""Gradients of operators in operators that ONNX has: torch's own decompositions where it has them, else these."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def gradients() -> dict[Any, Callable[..., Any]]:
    """Return the decompositions that tracing a gradient needs; what else torch's own table has is decomposed by the exporter."""
    table: dict[Any, Callable[..., Any]] = get_decompositions([aten.detach])
    return {
        **table,
        aten.native_batch_norm.default: frozen_norm,
        aten.cudnn_batch_norm.default: frozen_norm,
        aten.native_batch_norm_backward.default: frozen_norm_backward,
        aten.silu_backward.default: silu_backward,
        aten.convolution_backward.default: convolution_backward,
        aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
        aten.avg_pool2d_backward.default: avg_pool2d_backward,
        aten.upsample_nearest2d_backward.default: resized_by(aten.upsample_nearest2d.default, corners=False),
        aten.upsample_bilinear2d_backward.default: resized_by(aten.upsample_bilinear2d.default, corners=True),
        aten.upsample_bicubic2d_backward.default: resized_by(aten.upsample_bicubic2d.default, corners=True),
        aten._upsample_bilinear2d_aa_backward.default: resized_by(aten._upsample_bilinear2d_aa.default, corners=True),
        aten._upsample_bicubic2d_aa_backward.default: resized_by(aten._upsample_bicubic2d_aa.default, corners=True),
    }


class MeanPooling(TorchFunctionMode):
    """Pooling to one cell as a mean: torch's own restrides its result in place, whose gradient is of the memory and not of the values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ONE_CELL and len(args) == 2 and not kwargs:
            axes = ONE_CELL[func]
            if args[1] in (1, (1,) * axes, [1] * axes):
                return args[0].mean(dim=tuple(range(-axes, 0)), keepdim=True)
        return func(*args, **(kwargs or {}))


ONE_CELL: dict[Any, int] = {
    torch.adaptive_avg_pool1d: 1,
    F.adaptive_avg_pool1d: 1,
    F.adaptive_avg_pool2d: 2,
    torch._C._nn.adaptive_avg_pool2d: 2,
}


TRAINING = get_decompositions([aten.native_batch_norm, aten.native_batch_norm_backward])
"""torch's own, of batch norm over the images at hand."""


def frozen_scale(x: Tensor, weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """Return by what batch norm multiplies in eval mode, of a shape that broadcasts over (N, C, ...)."""
    scale = 1.0 / torch.sqrt(variance + eps)
    return (scale if weight is None else weight * scale).reshape(-1, *[1] * (x.dim() - 2))


def frozen_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return batch norm in eval mode as one product and one sum; torch's decomposition takes five times as many operators."""
    if training or mean is None or variance is None:  # instance norm, too, is batch norm over a batch of one
        found: tuple[Tensor, Tensor, Tensor] = TRAINING[aten.native_batch_norm.default](
            x, weight, bias, mean, variance, training, momentum, eps
        )
        return found
    scale = frozen_scale(x, weight, variance, eps)
    shift = -mean.reshape(scale.shape) * scale
    if bias is not None:
        shift = bias.reshape(scale.shape) + shift
    return x * scale + shift, x.new_empty(0), x.new_empty(0)


def frozen_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    save_mean: Any,
    save_invstd: Any,
    train: bool,
    eps: float,
    mask: Any,
) -> tuple[Tensor, None, None]:
    """Return the gradient of batch norm in eval mode in its input."""
    if train or variance is None:
        args = (gradient, x, weight, mean, variance, save_mean, save_invstd, train, eps, mask)
        return TRAINING[aten.native_batch_norm_backward.default](*args)[0], None, None
    return gradient * frozen_scale(x, weight, variance, eps), None, None


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

    A convolution with the flipped kernel is the same sum, and engines run it faster. That of a transposed convolution is a convolution.
    """
    size, axes, none = weight.shape[2:], range(2, weight.dim()), [0] * (weight.dim() - 2)
    if transposed:
        return aten.convolution.default(gradient, weight, None, stride, padding, dilation, False, none, groups), None, None
    if all(step == 1 for step in stride) and all(2 * pad == k - 1 for pad, k in zip(padding, size, strict=True)) and groups == 1:
        flipped = weight.transpose(0, 1).flip(*axes)
        return aten.convolution.default(gradient, flipped, None, stride, padding, dilation, False, none, 1), None, None
    missing = [
        int(inputs.shape[2 + i]) - ((int(gradient.shape[2 + i]) - 1) * stride[i] - 2 * padding[i] + dilation[i] * (size[i] - 1) + 1)
        for i in range(len(none))
    ]
    return aten.convolution.default(gradient, weight, None, stride, padding, dilation, True, missing, groups), None, None


def adaptive_avg_pool2d_backward(gradient: Tensor, inputs: Tensor) -> Tensor:
    """Return the gradient of adaptive average pooling in its input: the pooling is a matrix by rows and one by columns."""

    def shares(size: int, cells: int) -> Tensor:
        cell = torch.arange(cells, device=gradient.device)
        first, last = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
        return covered(size, first, last, last - first, gradient)

    (rows, columns), (high, wide) = inputs.shape[-2:], gradient.shape[-2:]
    return shares(rows, high).T @ gradient @ shares(columns, wide)


def avg_pool2d_backward(
    gradient: Tensor,
    inputs: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Return the gradient of average pooling in its input, by the same two matrices."""

    def shares(axis: int) -> Tensor:
        size, cells = inputs.shape[axis - 2], gradient.shape[axis - 2]
        k, pad = (values[axis % len(values)] for values in (kernel, padding))
        step = stride[axis % len(stride)] if stride else k
        first = torch.arange(cells, device=gradient.device) * step - pad
        last = (first + k).clip(max=size + pad)
        count = last - first if count_include_pad else last.clip(max=size) - first.clip(min=0)
        return covered(size, first, last, torch.ones_like(count) if divisor_override else count, gradient)

    found = shares(0).T @ gradient @ shares(1)
    return found / divisor_override if divisor_override else found


def covered(size: int, first: Tensor, last: Tensor, count: Tensor, like: Tensor) -> Tensor:
    """Return the matrix (cells, size) of averages over first <= place < last, each divided by its ``count``."""
    place = torch.arange(size, device=like.device)
    inside = (place >= first[:, None]) & (place < last[:, None])
    return inside.to(like.dtype) / count[:, None].to(like.dtype)


def resized_by(forward: Callable[..., Tensor], *, corners: bool) -> Callable[..., Tensor]:
    """Return the gradient of a separable resize in its input: of each axis the matrix is the resized identity."""

    def backward(gradient: Tensor, output_size: list[int], input_size: list[int], *rest: Any) -> Tensor:
        align, scales = ([rest[0]], rest[1:]) if corners else ([], rest)

        def matrix(axis: int) -> Tensor:
            size = input_size[2 + axis]
            eye = torch.eye(size, device=gradient.device, dtype=gradient.dtype)[None, None]
            return forward(eye, [size, output_size[axis]], *align, None, scales[axis] if scales else None)[0, 0]

        return matrix(0) @ gradient @ matrix(1).T

    return backward
