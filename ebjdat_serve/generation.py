"""Conditional generation: prior, Langevin steps along an engine's score, and the logits and energy of the delivered pixels."""

from dataclasses import dataclass

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.engines import Engine, Floats, Labels, Outputs, on_cpu
from ebjdat_serve.sgld import Chains, Prior, Sampler

CHUNK = 16
"""Chains per batch: on a CPU a step's time is linear in the batch, and memory stays bounded."""
CHUNK_PIXELS = 2**22
"""Pixels of one forward pass, whose memory is in proportion to them: 64 images of 256 x 256."""
CPU_CHUNK_PIXELS = 2**16
"""The same on a CPU, whose caches hold little more: EfficientNet-Lite0 takes a tenth longer for each of 8 images of 224 x 224."""


@dataclass(frozen=True)
class Samples:
    """Delivered pixels (N, H, W, 3) uint8, and the logits (N, K) of those pixels."""

    image: pixels.Pixels
    logits: Floats


def generate(engine: Engine, prior: Prior, sampler: Sampler, label: Labels, seed: int) -> Samples:
    """Return one sample per label by ``sampler.steps`` Langevin steps on E(x,y) from the prior.

    The start and noise of image i depend only on seed + i.
    """
    parts = [
        engine.advance(Chains.start(prior, sampler, label[i : i + CHUNK], seed + i), sampler.steps).image
        for i in range(0, len(label), CHUNK)
    ]
    image = pixels.to_bytes(np.concatenate(parts))
    found = classify_in_chunks(engine, pixels.to_unit(image))
    return Samples(image, found.logits)


def chunk_size(engine: Engine, height: int, width: int, most: int = 64) -> int:
    """Return how many images of ``height`` x ``width``, at most ``most``, to give an engine at once."""
    return max(1, min(most, (CPU_CHUNK_PIXELS if on_cpu(engine) else CHUNK_PIXELS) // (height * width)))


def classify_in_chunks(engine: Engine, image: Floats, size: int = 64) -> Outputs:
    """Return logits, energy and features of at least one image, computed ``size`` at a time, fewer where images are large."""
    size = chunk_size(engine, image.shape[2], image.shape[3], size)
    parts = [engine.classify(image[start : start + size]) for start in range(0, len(image), size)]
    return Outputs.join(parts)
