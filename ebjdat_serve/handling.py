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
    image.save(buffer, kind, **({"compress_level": 1} if kind == "PNG" else {}), **options)  # the same pixels, in a third of the time
    return buffer.getvalue()


def resized(image: Image.Image, factor: float, how: Image.Resampling) -> Image.Image:
    """Return an image enlarged or shrunk by ``factor``."""
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), how)


UNTOUCHED = 0.5
"""The share of images that ``handled`` leaves as they are."""
CALIBRATION = 2
"""The seed by which the calibration split is handled."""


def brightened(image: Image.Image, factor: float) -> bytes:
    """Return the image with its pixels scaled by ``factor`` and clipped."""
    return encoded(image.point(lambda value: min(255, round(value * factor))), "PNG")


def scaled_and_back(image: Image.Image, factor: float, how: Image.Resampling) -> bytes:
    """Return the image enlarged by ``factor``; or reduced by it by area and enlarged to its own size."""
    if factor >= 1:
        return encoded(resized(image, factor, how), "PNG")
    return encoded(resized(image, factor, Image.Resampling.BOX).resize(image.size, how), "PNG")


HANDLINGS: tuple[Callable[[Image.Image, np.random.Generator], bytes], ...] = (
    lambda image, noise: encoded(image, "JPEG", quality=int(noise.integers(60, 96))),
    lambda image, noise: encoded(image, "WEBP", quality=int(noise.integers(60, 96))),
    lambda image, noise: scaled_and_back(image, noise.uniform(1, 8), Image.Resampling.BICUBIC),
    lambda image, noise: scaled_and_back(image, noise.uniform(1, 3), Image.Resampling.BILINEAR),
    lambda image, noise: scaled_and_back(image, noise.uniform(0.7, 1), Image.Resampling.BICUBIC),
    lambda image, noise: brightened(image, noise.uniform(0.85, 1.2)),
    lambda image, noise: encoded(image.convert("L"), "PNG"),
)
"""What may have happened to an image on its way: JPEG and WebP of quality 60 to 95, enlarged up to 8 times (bicubic) or 3 times (bilinear),
reduced to .7 or more and enlarged again, brightness .85 to 1.2, grey."""


def handled(image: Pixels, seed: int, untouched: float = UNTOUCHED, place: Sequence[int] = ()) -> Pixels:
    """Return images (N, H, W, 3), each left alone with probability ``untouched``, else handled in one of the ways, through the decoder.

    All are drawn from one stream of ``seed`` and ``place``: with the place of an image in a folder, it is handled alike in any chunk.
    """
    size = Input(*image.shape[1:3])
    noise = np.random.default_rng([SEED, seed, *place])
    found = image.copy()
    for i in np.flatnonzero(noise.random(len(image)) >= untouched):
        found[i] = decode(HANDLINGS[noise.integers(len(HANDLINGS))](Image.fromarray(image[i]), noise), size)
    return found


def mixture(image: Pixels, untouched: float = UNTOUCHED) -> Pixels:
    """Return images (N, H, W, 3) as the calibration split's are handled: what the flag's p-values speak of."""
    return handled(image, CALIBRATION, untouched)
