"""Benign shifts, such as recompression and resizing, through the server's decoder; and image corruptions."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from ebjdat_serve.contract import Input
from ebjdat_serve.pixels import Pixels, decode

Shift = Callable[[Image.Image], bytes]
SEED = 0


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def resized(image: Image.Image, factor: float, how: Image.Resampling) -> Image.Image:
    """Return an image enlarged or shrunk by ``factor``."""
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), how)


def screenshot(image: Image.Image) -> bytes:
    """Return the image enlarged three times, as on a screen, and saved as JPEG at quality 90."""
    return encoded(resized(image, 3, Image.Resampling.BICUBIC), "JPEG", quality=90)


def sixteen_bit(image: Image.Image) -> bytes:
    """Return the image's grey values as a 16-bit PNG."""
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


SHIFTS: dict[str, Shift] = {
    **{f"JPEG q{q}": lambda p, q=q: encoded(p, "JPEG", quality=q) for q in (95, 85, 75, 50)},  # type: ignore[misc]
    **{f"WebP q{q}": lambda p, q=q: encoded(p, "WEBP", quality=q) for q in (90, 75)},  # type: ignore[misc]
    "resized up x2": lambda p: encoded(resized(p, 2, Image.Resampling.BILINEAR), "PNG"),
    "resized up x7": lambda p: encoded(resized(p, 7, Image.Resampling.BICUBIC), "PNG"),
    "resized down x0.75 and up": lambda p: encoded(resized(resized(p, 0.75, Image.Resampling.BOX), 4 / 3, Image.Resampling.BICUBIC), "PNG"),
    "screenshot x3, JPEG q90": screenshot,
    "grey": lambda p: encoded(p.convert("L"), "PNG"),
    "grey, 16 bit": sixteen_bit,
    "brightness x1.15": lambda p: brightened(p, 1.15),
}


def shifted(image: Pixels, shift: Shift) -> Pixels:
    """Return images (N, H, W, 3) after a shift, decoded by the server's decoder."""
    size = Input(*image.shape[1:3])
    return np.stack([decode(shift(Image.fromarray(one)), size) for one in image])


# Light handling ------------------------------------------------------------------------------------------------------

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


def handled(image: Pixels, seed: int, untouched: float = UNTOUCHED) -> Pixels:
    """Return images (N, H, W, 3), each left alone with probability ``untouched``, else handled in one of the ways, through the decoder."""
    size, noise = Input(*image.shape[1:3]), np.random.default_rng([SEED, seed])
    found = image.copy()
    for i in np.flatnonzero(noise.random(len(image)) >= untouched):
        found[i] = decode(HANDLINGS[noise.integers(len(HANDLINGS))](Image.fromarray(image[i]), noise), size)
    return found


def mixture(image: Pixels, untouched: float = UNTOUCHED) -> Pixels:
    """Return images (N, H, W, 3) as the calibration split's are handled: what the flag's p-values speak of."""
    return handled(image, CALIBRATION, untouched)


# Corruptions ---------------------------------------------------------------------------------------------------------

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""Images (N, H, W, 3) in [0,1], severity 1 to 5 and noise -> images, not yet clipped."""


def level(values: tuple[float, ...], severity: int) -> float:
    """Return the parameter of a severity."""
    return values[severity - 1]


def blurred(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return images convolved with one kernel over height and width."""
    result: np.ndarray = ndimage.convolve(x, kernel[None, :, :, None] / kernel.sum(), mode="reflect")
    return result


def disc(radius: float) -> np.ndarray:
    """Return the kernel of a defocused lens."""
    side = int(np.ceil(radius))
    y, x = np.mgrid[-side : side + 1, -side : side + 1]
    kernel: np.ndarray = (radius + 0.5 - np.hypot(x, y)).clip(0, 1)
    return kernel


def line(length: int) -> np.ndarray:
    """Return the kernel of diagonal motion blur."""
    return np.eye(length)


def fog(x: np.ndarray, strength: float, noise: np.random.Generator) -> np.ndarray:
    """Return images under fog: smooth noise of several scales."""
    n, h, w, _ = x.shape
    cloud = sum(ndimage.zoom(noise.random((n, 2**k, 2**k)), (1, h / 2**k, w / 2**k), order=1) / 2**k for k in (1, 2, 3))
    cloud = (cloud - np.min(cloud)) / np.ptp(cloud)
    result: np.ndarray = (x + strength * cloud[..., None]) / (1 + strength)
    return result


def elastic(x: np.ndarray, strength: float, noise: np.random.Generator) -> np.ndarray:
    """Return images distorted by a smooth displacement of ``strength`` pixels."""
    n, h, w, _ = x.shape
    out = np.empty_like(x)
    y0, x0 = np.mgrid[:h, :w]
    for i in range(n):
        dy, dx = (ndimage.gaussian_filter(noise.uniform(-1, 1, (h, w)), 3) for _ in range(2))
        scale = strength / max(float(np.abs([dy, dx]).max()), 1e-6)
        for channel in range(3):
            out[i, ..., channel] = ndimage.map_coordinates(x[i, ..., channel], [y0 + scale * dy, x0 + scale * dx], order=1, mode="reflect")
    return out


def compressed(x: np.ndarray, quality: int) -> np.ndarray:
    """Return images after JPEG compression."""
    pixels = np.round(x.clip(0, 1) * 255).astype(np.uint8)
    return shifted(pixels, lambda p: encoded(p, "JPEG", quality=quality)) / 255.0


def pixelated(x: np.ndarray, factor: float) -> np.ndarray:
    """Return images downsampled and upsampled again."""
    _, h, w, _ = x.shape
    small = ndimage.zoom(x, (1, factor, factor, 1), order=1)
    result: np.ndarray = ndimage.zoom(small, (1, h / small.shape[1], w / small.shape[2], 1), order=0)
    return result


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": lambda x, s, g: x + level((0.04, 0.06, 0.08, 0.09, 0.10), s) * g.standard_normal(x.shape),
    "shot noise": lambda x, s, g: g.poisson(x * level((500, 250, 100, 75, 50), s)) / level((500, 250, 100, 75, 50), s),
    "impulse noise": lambda x, s, g: np.where(
        g.random(x.shape) < level((0.01, 0.02, 0.03, 0.05, 0.07), s), (g.random(x.shape) < 0.5).astype(x.dtype), x
    ),
    "defocus blur": lambda x, s, g: blurred(x, disc(level((0.7, 0.9, 1.1, 1.5, 2.0), s))),
    "motion blur": lambda x, s, g: blurred(x, line(int(level((3, 4, 5, 6, 7), s)))),
    "gaussian blur": lambda x, s, g: ndimage.gaussian_filter(x, (0, *[level((0.4, 0.6, 0.7, 0.8, 1.0), s)] * 2, 0)),
    "fog": lambda x, s, g: fog(x, level((0.2, 0.5, 0.75, 1.0, 1.5), s), g),
    "brightness": lambda x, s, g: x + level((0.05, 0.1, 0.15, 0.2, 0.3), s),
    "contrast": lambda x, s, g: (
        x.mean(axis=(1, 2), keepdims=True) + level((0.75, 0.5, 0.4, 0.3, 0.15), s) * (x - x.mean(axis=(1, 2), keepdims=True))
    ),
    "elastic": lambda x, s, g: elastic(x, level((0.6, 0.9, 1.2, 1.6, 2.0), s), g),
    "pixelate": lambda x, s, g: pixelated(x, level((0.95, 0.9, 0.85, 0.75, 0.65), s)),
    "jpeg": lambda x, s, g: compressed(x, int(level((80, 65, 58, 50, 40), s))),
}
"""Twelve corruptions modelled on CIFAR-10-C (arXiv 1903.12261), by the recipe here; not CIFAR-10-C itself."""


def corrupted(image: Pixels, name: str, severity: int) -> Pixels:
    """Return images (N, H, W, 3) uint8 under a corruption; the noise depends only on name and severity."""
    noise = np.random.default_rng([SEED, severity, *name.encode()])
    x = CORRUPTIONS[name](image / 255.0, severity, noise)
    return np.round(x.clip(0, 1) * 255).astype(np.uint8)
