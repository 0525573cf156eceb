"""Compare a bundle's graphs with torch: the gate of every export.

Logits, energies and the score must agree to 1e-4 of the largest value at batches 1, 3 and 32, on the self-test's real images and on
chain samples drawn from them.
"""

import numpy as np
import torch
from safetensors.numpy import load_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Engine, Floats
from ebjdat_serve.engines.eager import TorchEngine
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.selftest import TOLERANCE, compare, outputs
from ebjdat_serve.sgld import Chains, Prior

BATCHES = (1, 3, 32)


def check(bundle: Bundle, real: Floats | None = None) -> dict[str, float]:
    """Return the relative error by output, batch and kind of image; raise EbjdatError when one is beyond 1e-4."""
    torch_engine, onnx_engine = TorchEngine(bundle, "cpu", torch.get_num_threads()), OnnxEngine(bundle, "cpu")
    if real is None:
        real = load_file(bundle.path / "selftest.safetensors")["image"]
    found: dict[str, float] = {}
    for kind, images in (("real", real), ("chain", chains(bundle, torch_engine, max(BATCHES)))):
        for batch in BATCHES:
            image = np.resize(images, (batch, *images.shape[1:]))
            label = (np.arange(batch, dtype=np.int64) % (len(bundle.manifest.labels) + 1)) - 1
            for name, value in compare(onnx_engine, image, label, outputs(torch_engine, image, label)).items():
                found[f"{name} batch {batch} {kind}"] = value
    bad = {name: value for name, value in found.items() if not value <= TOLERANCE}
    if bad:
        raise EbjdatError(f"{bundle.path}: graphs differ from torch beyond {TOLERANCE:.0e}: {bad}")
    return found


def chains(bundle: Bundle, engine: Engine, n: int) -> Floats:
    """Return n chain samples (n, 3, H, W) drawn with the bundle's own sampler."""
    prior, sampler = Prior.load(bundle.path / "prior.safetensors"), bundle.manifest.sampler
    return engine.advance(Chains.start(prior, sampler, np.resize(prior.labels, n), seed=0), sampler.steps).image
