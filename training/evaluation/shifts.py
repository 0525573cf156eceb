"""Benign shifts, such as recompression and resizing, through the server's decoder; and image corruptions."""

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from ebjdat_serve.contract import Input
from ebjdat_serve.handling import SEED, brightened, encoded, resized
from ebjdat_serve.pixels import Pixels, decode

Shift = Callable[[Image.Image], bytes]


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
    "brightness x1.15": lambda p: encoded(brightened(p, 1.15), "PNG"),
}


def shifted(image: Pixels, shift: Shift) -> Pixels:
    """Return images (N, H, W, 3) after a shift, decoded by the server's decoder."""
    size = Input(*image.shape[1:3])
    return np.stack([decode(shift(Image.fromarray(one)), size) for one in image])


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
