"""Our PGD against a public robust network whose figures are known (alpha-beta-CROWN's cifar resnet2b, BSD-3)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ebjdat_serve.pixels import to_unit
from training.adversary import Threat
from training.evaluation.attacks import survivors
from training.images import data_root, load

FILE = "abcrown_resnet2b.pth"
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not (data_root() / FILE).is_file(), reason=f"needs {FILE} in the data folder (EBJDAT_DATA)"),
]


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride)) if stride != 1 else nn.Sequential()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet2b(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.linear1 = nn.Linear(1024, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, image):
        mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
        std = torch.tensor([0.2471, 0.2435, 0.2616]).view(1, 3, 1, 1)
        x = self.layer1(F.relu(self.conv1((image - mean) / std)))
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


def test_pgd20_lands_on_the_known_figures():
    state = torch.load(data_root() / FILE, weights_only=True, map_location="cpu")
    model = ResNet2b()
    model.load_state_dict(state.get("state_dict", state))
    model.eval().requires_grad_(False)
    test = load("cifar10").test
    image, label = torch.from_numpy(to_unit(test.image)), torch.from_numpy(test.label)
    clean = float((model(image).argmax(dim=1) == label).float().mean())
    assert clean == pytest.approx(0.6925, abs=0.002)
    # known, last iterate of PGD-20 with step eps/4 from one start: .5663 at 2/255 and .1927 at 8/255; ours counts every iterate
    at2, at8 = (survivors(model, image, label, Threat("linf", eps / 255)) / len(label) for eps in (2, 8))
    print(f"resnet2b: clean {clean:.4f}, PGD-20 {at2:.4f} at 2/255, {at8:.4f} at 8/255")
    assert 0.555 <= at2 <= 0.5675
    assert 0.180 <= at8 <= 0.1940
