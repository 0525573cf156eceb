"""An independent CIFAR-10 ResNet-20 (He et al., arXiv 1512.03385; weights of akamaster/pytorch_resnet_cifar10).

Its 64 pooled features are the space of ``frechet_resnet20``, which is not FID, as it is not Inception. The
file, ``resnet20-12fca82f.th`` in the data folder, is read without unpickling code.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.datasets import data_root
from training.errors import DataError

FILE = "resnet20-12fca82f.th"


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a parameter-free shortcut that subsamples and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + skip)


class ResNet20(nn.Module):
    """Images (N, 3, 32, 32) in [0,1] -> pooled features (N, 64) and logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor([0.485, 0.456, 0.406], device=image.device).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225], device=image.device).view(1, 3, 1, 1)
        x = F.relu(self.bn1(self.conv1((image - mean) / std)))
        features = self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))
        return features, self.linear(features)


@lru_cache(maxsize=1)
def load_extractor() -> ResNet20 | None:
    """Return the network in eval mode, or None when its file is not in the data folder."""
    file: Path = data_root() / FILE
    if not file.is_file():
        return None
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if not found.startswith(FILE[9:17]):
        raise DataError(f"{file} has sha256 {found[:16]}…, that of the original begins {FILE[9:17]}: fetch it again")
    state = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval().requires_grad_(False)
