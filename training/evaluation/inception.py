"""Inception-v3 for FID (arXiv 1512.00567, the weights of the TensorFlow graph of 2015-12-05), read from a local file.

Nothing is downloaded. The file is pytorch-fid's port, ``pt_inception-2015-12-05-6726825d.pth``; its name ends in the first digits of
its sha256. Only figures made with it may be called FID and IS.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.errors import DataError

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # its first eight digits, as in torch.hub's file names


class Conv(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def pooled(x: Tensor) -> Tensor:
    """Return the 3 x 3 average pool that excludes padding, as TensorFlow's does."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    """Mixed_5b, 5c, 5d: 1 x 1, 5 x 5, two 3 x 3 and a pool."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(pooled(x))], dim=1)


class B(nn.Module):
    """Mixed_6a: halves the grid."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], dim=1)


class C(nn.Module):
    """Mixed_6b to 6e: 7 x 7 in two directions."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(inputs, width, 1), Conv(width, width, row, padding=(0, 3))
        self.branch7x7_3 = Conv(width, 192, column, padding=(3, 0))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(inputs, width, 1), Conv(width, width, column, padding=(3, 0))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, row, padding=(0, 3)), Conv(width, width, column, padding=(3, 0))
        self.branch7x7dbl_5 = Conv(width, 192, row, padding=(0, 3))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(pooled(x))], dim=1)


class D(nn.Module):
    """Mixed_7a: halves the grid."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(inputs, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(inputs, 192, 1), Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1), padding=(3, 0)), Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], dim=1)


class E(nn.Module):
    """Mixed_7b and 7c; the last one uses max pooling, as in the graph of 2015."""

    def __init__(self, inputs: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, (1, 3), padding=(0, 1)), Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, (1, 3), padding=(0, 1)), Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pool = self.branch_pool(F.max_pool2d(x, 3, 1, 1) if self.last else pooled(x))
        parts = [self.branch3x3_2a(three), self.branch3x3_2b(three), self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *parts, pool], dim=1)


class Inception(nn.Module):
    """Images (N, 3, H, W) in [0,1] -> pooled features (N, 2048) and logits of 1,008 classes (N, 1008)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(768, 128), C(768, 160), C(768, 160), C(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = D(768), E(1280, False), E(2048, True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits without bias, as IS uses; images are resized to 299 bilinearly and scaled to [-1,1]."""
        x = 2 * F.interpolate(image, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        return features, F.linear(features, self.fc.weight)


def check_inception(file: Path, sha256: str = SHA256) -> None:
    """Raise DataError when ``file`` is not the standard file."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if not found.startswith(sha256):
        raise DataError(
            f"{file} has sha256 {found[:16]}…, that of the standard weights begins {sha256}: figures of another file are not FID"
        )


def load_inception(file: Path, sha256: str = SHA256) -> Inception:
    """Return the network with the weights of ``file``; raise DataError when it is not the standard file."""
    check_inception(file, sha256)
    model = Inception()
    state = torch.load(file, weights_only=True, map_location="cpu")
    missing = model.load_state_dict({name: value for name, value in state.items() if not name.startswith("AuxLogits")}, strict=False)
    lacking = [name for name in missing.missing_keys if not name.endswith("num_batches_tracked")]
    if lacking or missing.unexpected_keys:
        raise DataError(f"{file} is another network: lacks {lacking[:3]}, has {missing.unexpected_keys[:3]}")
    return model.eval().requires_grad_(False)
