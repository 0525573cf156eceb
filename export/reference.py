"""What torch says of eight images: the self-test that a bundle carries, and that every engine is checked against."""

import numpy as np
import torch
from safetensors.numpy import save_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Floats
from ebjdat_serve.engines.eager import TorchEngine
from ebjdat_serve.selftest import answers


def write_selftest(bundle: Bundle, image: Floats) -> None:
    """Write images (8, 3, H, W), labels with the marginal among them, and the answers of torch in fp32."""
    engine = TorchEngine(bundle, "cpu", torch.get_num_threads())
    label = np.arange(-1, len(image) - 1, dtype=np.int64)
    expected = {"image": image, "label": label, **answers(engine, image, label)}
    save_file({name: np.ascontiguousarray(value) for name, value in expected.items()}, bundle.path / "selftest.safetensors")
