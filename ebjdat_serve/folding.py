"""A network with frozen norms as samplers, attacks and graphs see it: the same function in fewer passes over memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebjdat_serve.wideresnet import Block, WideResNet, activation


def folded(model: WideResNet, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """Return x -> f(x) of ``model`` in eval mode, blocks in ``dtype`` (its autocast by default): norms after convolutions join them.

    A norm before an activation stays as scale and shift, whose input gradient is one product where batch norm's is four sums. On a
    CPU an input gradient takes about a tenth less time (benchmarks/train_step.py). Weights are read once: parameters must not change
    meanwhile, and take no gradient.
    """
    dtype = dtype or model.autocast or torch.float32

    def weight(conv: nn.Conv2d, scale: Tensor | None = None) -> Tensor:
        w = conv.weight if scale is None else conv.weight * scale.reshape(-1, 1, 1, 1)
        return w.to(dtype).contiguous(memory_format=torch.channels_last)

    blocks = []
    for block in model.blocks:
        assert isinstance(block, Block)
        scale, shift = affine(block.norm1, dtype)
        after, bias = statistics(block.norm2)
        skip = None if block.shortcut is None else weight(block.shortcut)
        conv1, conv2 = weight(block.conv1, after), weight(block.conv2)
        blocks.append((scale, shift, conv1, bias.to(dtype), conv2, skip, block.conv1.stride[0]))
    scale_out, shift_out = affine(model.norm, dtype)
    stem, head = weight(model.stem), model.head

    def forward(image: Tensor) -> Tensor:
        x = (4.0 * image - 2.0).to(dtype).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, stem, padding=1)
        for scale, shift, conv1, bias, conv2, skip, stride in blocks:
            pre = activation(torch.addcmul(shift, x, scale))
            residual = F.conv2d(activation(F.conv2d(pre, conv1, bias, stride, 1)), conv2, None, 1, 1)
            x = (x if skip is None else F.conv2d(pre, skip, None, stride)) + residual
        logits: Tensor = head(activation(torch.addcmul(shift_out, x, scale_out)).float().mean(dim=(2, 3)))
        return logits

    return forward


def statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a frozen norm, (C,) each."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def affine(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and shift in ``dtype``, (C, 1, 1) each."""
    scale, shift = statistics(norm)
    return scale.to(dtype).reshape(-1, 1, 1), shift.to(dtype).reshape(-1, 1, 1)
