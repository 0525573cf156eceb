"""Images to try a classifier on where there are no photographs: smooth fields of colour with fine noise, the same ones each time."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebjdat_serve.pixels import Pixels

TRIED = 8
"""Images of a self-test."""


def made(height: int, width: int, n: int = TRIED) -> Pixels:
    """Return ``n`` images (n, height, width, 3) uint8."""
    random = np.random.default_rng(0)
    return np.stack([_one(random, height, width, cells=2 + i % 6) for i in range(n)])


def sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return (height, width) of images to compare pipelines on: the network's own, smaller, larger, of odd sides and long ones."""
    return [
        (height, width),
        (height // 2 + 3, width // 2 + 1),
        (height + 1, width + 7),
        (2 * height + 5, 3 * width),
        (3 * height, width + 2),
    ]


def _one(random: np.random.Generator, height: int, width: int, cells: int) -> Pixels:
    coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noisy: NDArray[np.float32] = smooth + random.normal(0, 12, smooth.shape).astype(np.float32)
    return noisy.clip(0, 255).astype(np.uint8)
