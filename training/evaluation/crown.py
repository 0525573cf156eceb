"""Two public robust CIFAR-10 networks (Verified-Intelligence/alpha-beta-CROWN, BSD-3), adversarially trained at l-inf 2/255.

Their known figures check our attacks; and ``resnet4b``, of other authors' code, architecture and training, judges samples: an
undefended judge would be fooled by transfer. The files are read from the data folder, without unpickling code.
"""

import hashlib
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.datasets import data_root
from training.errors import DataError

FILES = {"resnet2b": "abcrown_resnet2b.pth", "resnet4b": "abcrown_resnet4b.pth"}
SHA256 = {
    "resnet2b": "ef824b47175668e924d7fd409b5ef7e239012b8f0c31fefa66c643efda1eb05b",
    "resnet4b": "6158f9668935890e832d4e0fdc3b6cece2386ec826319eac36f329490b7729e7",
}


class Block(nn.Module):
    """relu(conv(relu(conv(x))) + shortcut(x)), all biased, no norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride)) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class CrownResNet(nn.Module):
    """Images (N, 3, 32, 32) in [0,1] -> logits (N, 10); ``resnet4b`` has twice the width and a second pair of blocks."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8 if name == "resnet2b" else 16, 3, 2, 1)
        if name == "resnet2b":
            self.layer1 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
            self.layer2 = nn.Sequential()
        else:
            self.layer1 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1))
            self.layer2 = nn.Sequential(Block(32, 32, 2), Block(32, 32, 1))
        self.linear1 = nn.Linear(1024 if name == "resnet2b" else 512, 100)
        self.linear2 = nn.Linear(100, 10)

    def features(self, image: Tensor) -> Tensor:
        """Return the last hidden layer (N, 100)."""
        mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))
        x = self.layer2(self.layer1(F.relu(self.conv1((image - mean) / std))))
        return F.relu(self.linear1(x.flatten(1)))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.linear2(self.features(image))
        return logits


@lru_cache(maxsize=2)
def load_crown(name: str) -> CrownResNet | None:
    """Return a network in eval mode, or None when its file is not in the data folder; raise DataError for a file with another sha256."""
    file = data_root() / FILES[name]
    if not file.is_file():
        return None
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256[name]:
        raise DataError(f"{file} has sha256 {found[:16]}…, the original has {SHA256[name][:16]}…: copy it again")
    state = torch.load(file, weights_only=True, map_location="cpu")
    model = CrownResNet(name)
    model.load_state_dict(state.get("state_dict", state))
    return model.eval().requires_grad_(False)
