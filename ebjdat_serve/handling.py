"""Light handling: what may have happened to an image on its way, such as a recompression or a resize; all of it is benign."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ebjdat_serve.contract import Input
from ebjdat_serve.pixels import Pixels, decode

SEED = 0


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def resized(image: Image.Image, factor: float, how: Image.Resampling) -> Image.Image:
    """Return an image enlarged or shrunk by ``factor``."""
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), how)


UNTOUCHED = 0.5
"""The share of images that ``handled`` leaves as they are."""
CALIBRATION = 2
"""The seed by which the calibration split is handled."""
ENLARGED = 1024
"""Pixels a side of an enlarged image at most: as many as are sent, and what 224 x 224 pixels eight times enlarged would cost is no use."""


def brightened(image: Image.Image, factor: float) -> Image.Image:
    """Return the image with its pixels scaled by ``factor`` and clipped."""
    return image.point(lambda value: min(255, round(value * factor)))


def scaled_and_back(image: Image.Image, factor: float, how: Image.Resampling) -> Image.Image:
    """Return the image enlarged by ``factor``; or reduced by it by area and enlarged to its own size."""
    factor = min(factor, max(1.0, ENLARGED / max(image.size)))
    if factor >= 1:
        return resized(image, factor, how)
    return resized(image, factor, Image.Resampling.BOX).resize(image.size, how)


HANDLINGS: tuple[Callable[[Image.Image, np.random.Generator], bytes | Image.Image], ...] = (
    lambda image, noise: encoded(image, "JPEG", quality=int(noise.integers(60, 96))),
    lambda image, noise: encoded(image, "WEBP", quality=int(noise.integers(60, 96))),
    lambda image, noise: scaled_and_back(image, noise.uniform(1, 8), Image.Resampling.BICUBIC),
    lambda image, noise: scaled_and_back(image, noise.uniform(1, 3), Image.Resampling.BILINEAR),
    lambda image, noise: scaled_and_back(image, noise.uniform(0.7, 1), Image.Resampling.BICUBIC),
    lambda image, noise: brightened(image, noise.uniform(0.85, 1.2)),
    lambda image, noise: image.convert("L"),
)
"""What may have happened to an image on its way: JPEG and WebP of quality 60 to 95, enlarged up to 8 times (bicubic) or 3 times (bilinear),
reduced to .7 or more and enlarged again, brightness .85 to 1.2, grey."""


def handled(image: Pixels, seed: int, untouched: float = UNTOUCHED, place: Sequence[int] = ()) -> Pixels:
    """Return images (N, H, W, 3), each left alone with probability ``untouched``, else handled in one of the ways and decoded.

    All are drawn from one stream of ``seed`` and ``place``: with the place of an image in a folder, it is handled alike in any chunk.
    """
    size = Input(*image.shape[1:3])
    noise = np.random.default_rng([SEED, seed, *place])
    found = image.copy()
    for i in np.flatnonzero(noise.random(len(image)) >= untouched):
        made = HANDLINGS[noise.integers(len(HANDLINGS))](Image.fromarray(image[i]), noise)
        found[i] = decode(made, size) if isinstance(made, bytes) else squashed(made, size.height, size.width)
    return found


def squashed(image: Image.Image, height: int, width: int) -> Pixels:
    """Return what ``decode`` makes of a PNG of the image, without making one."""
    return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BOX))


def mixture(image: Pixels, untouched: float = UNTOUCHED) -> Pixels:
    """Return images (N, H, W, 3) as the calibration split's are handled: what the flag's p-values speak of."""
    return handled(image, CALIBRATION, untouched)
