"""Write a bundle's self-test: torch's outputs on eight images."""

import numpy as np
import torch
from safetensors.numpy import save_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.energy import MARGINAL
from ebjdat_serve.engines import Floats
from ebjdat_serve.engines.eager import TorchEngine
from ebjdat_serve.manifest import YES
from ebjdat_serve.networks import Network
from ebjdat_serve.selftest import FUNCTIONS, outputs


def write_selftest(bundle: Bundle, image: Floats, model: Network | None = None) -> None:
    """Write selftest.safetensors: images (8, 3, H, W), labels including the marginal's, and torch's fp32 outputs, as far as it has them.

    ``model`` is the network itself where the bundle's own description cannot build it.
    """
    engine = TorchEngine(bundle, "cpu", torch.get_num_threads(), model=model)
    label = np.arange(-1, len(image) - 1, dtype=np.int64) % len(bundle.manifest.labels)
    label[0] = MARGINAL
    functions = FUNCTIONS if bundle.manifest.capabilities.gradient == YES else ("classify",)
    expected = {"image": image, "label": label, **outputs(engine, image, label, functions)}
    file = bundle.path / "selftest.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in expected.items()}, file)
    file.chmod(0o644)  # safetensors writes files that only their owner may read
