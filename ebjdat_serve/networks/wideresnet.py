"""WideResNet (Zagoruyko & Komodakis, arXiv 1605.07146) that takes images in [0,1] and normalises them inside."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebjdat_serve.networks.network import Architecture, Network


@dataclass(frozen=True)
class WideResNetArchitecture(Architecture):
    """WRN-depth-width."""

    family = "wideresnet"

    depth: int = 16
    width: int = 2

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6 or self.width < 1:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 34) and width 1 or more, not {self.depth} and {self.width}")

    def build(self, classes: int) -> "WideResNet":
        return WideResNet(self.depth, self.width, classes)

    def check_images(self, height: int, width: int) -> None:
        if height % 4 or width % 4 or min(height, width) < 8:
            raise ValueError(f"{width} x {height} pixels; the network halves twice, so give a multiple of 4 from 8 up")

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> "tuple[WideResNetArchitecture, int] | None":
        if not {"blocks.0.conv1.weight", "head.weight"} <= set(weights):
            return None
        blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        return cls(2 * blocks + 4, weights["blocks.0.conv1.weight"].shape[0] // 16), len(weights["head.weight"])


class Block(nn.Module):
    """Pre-activation residual block: x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if (inputs, stride) == (outputs, 1) else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pre = activation(self.norm1(x))
        residual = self.conv2(activation(self.norm2(self.conv1(pre))))
        skip = x if self.shortcut is None else self.shortcut(pre)
        out: Tensor = skip + residual
        return out


class WideResNet(Network):
    """WRN-depth-width of SiLU blocks; any H and W that are multiples of 4."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__(classes)
        blocks = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        layers: list[nn.Module] = []
        for group, (inputs, outputs) in enumerate(pairwise(widths)):
            for block in range(blocks):
                first = block == 0
                layers.append(Block(inputs if first else outputs, outputs, 2 if first and group else 1))
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, image: Tensor) -> Tensor:
        """Return the pooled features, (N, 64 width)."""
        # 4x - 2 is about zero mean and unit variance for natural images, and keeps eps a pixel quantity outside.
        x = self.blocks(self.stem(4.0 * image - 2.0))
        return activation(self.norm(x)).mean(dim=(2, 3))

    def folded_features(self, dtype: torch.dtype) -> "Folded":
        """Return x -> features in eval mode, blocks in ``dtype``, in fewer passes over memory: norms after convolutions are folded in.

        A norm before an activation stays as scale and shift, whose input gradient is one product where batch norm's is four sums. On a
        CPU an input gradient takes about a tenth less time (benchmarks/train_step.py).
        """
        return Folded(self, dtype)


class Folded:
    """A network's features (N, F) with its norms folded, in memory of its own, which ``refold`` brings up to date in place."""

    def __init__(self, network: WideResNet, dtype: torch.dtype) -> None:
        self._parts, self._dtype = (network.stem, network.blocks, network.norm), dtype  # not the network, which may hold this: no cycle
        self._stem, self._blocks, self._out = self._fold()
        self._strides: list[int] = [block.conv1.stride[0] for block in network.blocks if isinstance(block, Block)]

    def _fold(self) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]], tuple[Tensor, Tensor]]:
        dtype, (stem, body, norm) = self._dtype, self._parts

        def weight(conv: nn.Conv2d, scale: Tensor | None = None) -> Tensor:
            w = conv.weight if scale is None else conv.weight * scale.reshape(-1, 1, 1, 1)
            return w.to(dtype).contiguous(memory_format=torch.channels_last)

        blocks = []
        for block in body:
            assert isinstance(block, Block)
            scale, shift = affine(block.norm1, dtype)
            after, bias = statistics(block.norm2)
            skip = None if block.shortcut is None else weight(block.shortcut)
            conv1, conv2 = weight(block.conv1, after), weight(block.conv2)
            blocks.append((scale, shift, conv1, bias.to(dtype), conv2, skip))
        return weight(stem), blocks, affine(norm, dtype)

    def refold(self) -> None:
        """Fold the network's norms as they now are, into the same memory."""
        stem, blocks, out = self._fold()
        new, old = (
            [kept for part in (one, *many, last) for kept in (part if isinstance(part, tuple) else (part,)) if kept is not None]
            for one, many, last in ((stem, blocks, out), (self._stem, self._blocks, self._out))
        )
        torch._foreach_copy_(old, new)

    def __call__(self, image: Tensor) -> Tensor:
        x = (4.0 * image - 2.0).to(self._dtype).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, self._stem, padding=1)
        for (scale, shift, conv1, bias, conv2, skip), stride in zip(self._blocks, self._strides, strict=True):
            pre = activation(torch.addcmul(shift, x, scale))
            residual = F.conv2d(activation(F.conv2d(pre, conv1, bias, stride, 1)), conv2, None, 1, 1)
            x = (x if skip is None else F.conv2d(pre, skip, None, stride)) + residual
        scale, shift = self._out
        return activation(torch.addcmul(shift, x, scale)).float().mean(dim=(2, 3))


def activation(x: Tensor) -> Tensor:
    """SiLU: smooth, so that dE/dx is continuous, as samplers, attacks and parity between engines require.

    Measured at equal cost to the lineage's LeakyReLU(0.2), whose kinks made single pixels of the score differ by 5e-3
    between engines. (SiLU for adversarial training: Gowal et al., arXiv 2010.03593.)
    """
    return F.silu(x)


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
