"""Write a bundle's self-test: torch's outputs on eight images."""

import copy
import logging
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.energy import MARGINAL, score
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.engines.eager import TorchEngine
from ebjdat_serve.errors import OF_NETWORKS, first_line
from ebjdat_serve.manifest import YES
from ebjdat_serve.networks import Network
from ebjdat_serve.selftest import FUNCTIONS, ROUNDING, TOLERANCE, outputs, relative_error

log = logging.getLogger("ebjdat_serve")


def write_selftest(bundle: Bundle, image: Floats, model: Network | None = None) -> None:
    """Write selftest.safetensors: images (8, 3, H, W), labels including the marginal's, and torch's fp32 outputs, as far as it has them.

    ``model`` is the network itself where the bundle's own description cannot build it.
    """
    engine = TorchEngine(bundle, "cpu", torch.get_num_threads(), model=model)
    label = np.arange(-1, len(image) - 1, dtype=np.int64) % len(bundle.manifest.labels)
    label[0] = MARGINAL
    functions = FUNCTIONS if bundle.manifest.capabilities.gradient == YES else ("classify",)
    # one at a time where the network is somebody's own: its gradient keeps what it computes, of any size
    expected: dict[str, Any] = {
        "image": image,
        "label": label,
        **outputs(engine, image, label, functions, len(image) if model is None else 1),
    }
    if "score" in expected and model is not None:
        expected[ROUNDING] = np.float32(rounding(model, image, label, expected["score"])).reshape(1)
    file = bundle.path / "selftest.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in expected.items()}, file)
    file.chmod(0o644)  # safetensors writes files that only their owner may read


def rounding(model: Network, image: Floats, label: Labels, single: Floats) -> float:
    """Return how far torch's fp32 score is from its own in double precision, relative to the largest: the kinks of ReLU and pooling.

    Where a value is within rounding of a kink, engines that add in another order take the other slope; no fp32 engine is closer.
    0 for a network that cannot be told to compute in double precision.
    """
    try:
        double = copy.deepcopy(model).double()
        images, labels = torch.from_numpy(image).double(), torch.from_numpy(label)
        exact = torch.cat([score(double, images[i : i + 1], labels[i : i + 1])[0] for i in range(len(images))])
    except OF_NETWORKS as error:  # a constant of its own in fp32, say
        log.warning("scores must agree to %.0e: the network does not compute in double precision: %s", TOLERANCE, first_line(error))
        return 0.0
    return relative_error(single, exact.numpy())
