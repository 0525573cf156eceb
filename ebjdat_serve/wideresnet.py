"""WideResNet (Zagoruyko & Komodakis, arXiv 1605.07146) that takes images in [0,1] and normalises them inside."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class WideResNet(nn.Module):
    """WRN-depth-width: images (N, 3, H, W) in [0,1] to logits (N, classes), any H and W that are multiples of 4.

    With ``autocast`` set to a dtype the blocks run in it, channels_last; logits, and so energies, are always fp32.
    """

    autocast: torch.dtype | None = None

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"WideResNet depth must be 6n + 4 (10, 16, 22, 28, 34), not {depth}")
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

    def forward(self, image: Tensor) -> Tensor:
        if self.autocast is None:
            features = self.features(image)
        else:
            with torch.autocast(image.device.type, self.autocast):
                features = self.features(image.contiguous(memory_format=torch.channels_last)).float()
        logits: Tensor = self.head(features)
        return logits

    def features(self, image: Tensor) -> Tensor:
        """Return the pooled features, (N, 64 width)."""
        # 4x - 2 is about zero mean and unit variance for natural images, and keeps eps a pixel quantity outside.
        x = self.blocks(self.stem(4.0 * image - 2.0))
        return activation(self.norm(x)).mean(dim=(2, 3))


def activation(x: Tensor) -> Tensor:
    """SiLU: smooth, so that dE/dx is continuous, which samplers, attacks and parity between engines all want.

    Measured at equal cost to the lineage's LeakyReLU(0.2), whose kinks made single pixels of the score differ by 5e-3
    between engines. (SiLU for adversarial training: Gowal et al., arXiv 2010.03593.)
    """
    return F.silu(x)


def build(depth: int, width: int, classes: int, state: dict[str, Tensor] | None = None) -> WideResNet:
    """Return a WideResNet in eval mode, with ``state`` loaded strictly when given."""
    model = WideResNet(depth, width, classes)
    if state is not None:
        model.load_state_dict(state)
    return model.eval()
