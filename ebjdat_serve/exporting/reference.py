"""Write a bundle's self-test: torch's outputs on eight images."""

import numpy as np
import torch
from safetensors.numpy import save_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Floats
from ebjdat_serve.engines.eager import TorchEngine
from ebjdat_serve.selftest import outputs


def write_selftest(bundle: Bundle, image: Floats) -> None:
    """Write selftest.safetensors: images (8, 3, H, W), labels including the marginal's, and torch's fp32 outputs."""
    engine = TorchEngine(bundle, "cpu", torch.get_num_threads())
    label = np.arange(-1, len(image) - 1, dtype=np.int64)
    expected = {"image": image, "label": label, **outputs(engine, image, label)}
    save_file({name: np.ascontiguousarray(value) for name, value in expected.items()}, bundle.path / "selftest.safetensors")
