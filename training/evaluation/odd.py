"""Odd images, as a new user tries first: gradients, checkerboards, text, strokes, rectangles, black and white."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ebjdat_serve.pixels import Pixels

SEED = 0
WORDS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck", "the", "quick", "a", "0123456789"]
Draw = Callable[[int, int, np.random.Generator], Pixels]
"""Height, width and noise -> one image (H, W, 3)."""


def colours(noise: np.random.Generator) -> Pixels:
    """Return two colours (2, 3), at least a quarter of the range apart in one channel: black and white half of the time."""
    if noise.random() < 0.5:
        return np.array([[0] * 3, [255] * 3], np.uint8)[noise.permutation(2)]
    while True:
        pair = noise.integers(0, 256, (2, 3))
        if np.ptp(pair, axis=0).max() >= 64:
            return pair.astype(np.uint8)


def blend(weight: np.ndarray, noise: np.random.Generator) -> Pixels:
    """Return two colours mixed by a weight (H, W) in [0,1]."""
    first, second = colours(noise).astype(np.float64)
    mixed: Pixels = np.rint(first + weight[..., None] * (second - first)).astype(np.uint8)
    return mixed


def gradient(height: int, width: int, noise: np.random.Generator) -> Pixels:
    """Return a linear gradient at any angle, or, one time in four, a radial one."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    if noise.random() < 0.25:
        weight = np.hypot(y - noise.random(), x - noise.random())
    else:
        angle = 2 * np.pi * noise.random()
        weight = np.cos(angle) * x + np.sin(angle) * y
    return blend((weight - weight.min()) / np.ptp(weight), noise)


def checkerboard(height: int, width: int, noise: np.random.Generator) -> Pixels:
    """Return a checkerboard of squares of 1 pixel to a quarter of the side, shifted."""
    side = int(noise.integers(1, max(2, height // 4) + 1))
    y, x = np.mgrid[:height, :width] + noise.integers(0, side, (2, 1, 1))
    return blend(((y // side + x // side) % 2).astype(np.float64), noise)


def lines_of_text(height: int, width: int, size: int, noise: np.random.Generator) -> Image.Image:
    """Return words in lines of a height of ``size`` pixels."""
    back, ink = (tuple(int(c) for c in colour) for colour in colours(noise))
    image = Image.new("RGB", (width, height), back)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for top in range(int(noise.integers(0, size)), height - size // 2, round(1.2 * size)):
        draw.text((int(noise.integers(0, 3)), top), " ".join(noise.choice(WORDS, 1 + 2 * width // (3 * size))), fill=ink, font=font)
    return image


def text(height: int, width: int, noise: np.random.Generator) -> Pixels:
    """Return words drawn at the image's own size, letters a quarter to a half of it high."""
    return np.asarray(lines_of_text(height, width, int(noise.integers(max(6, height // 4), max(7, height // 2))), noise))


def page(height: int, width: int, noise: np.random.Generator) -> Pixels:
    """Return a page of text, ten times as large, reduced to the image's size by area."""
    size = int(noise.integers(12, 40))
    return np.asarray(lines_of_text(10 * height, 10 * width, size, noise).resize((width, height), Image.Resampling.BOX))


def stroke(height: int, width: int, noise: np.random.Generator) -> Pixels:
    """Return one to three strokes of two to four points, smooth-edged."""
    back, ink = (tuple(int(c) for c in colour) for colour in colours(noise))
    image = Image.new("RGB", (4 * width, 4 * height), back)
    draw = ImageDraw.Draw(image)
    for _ in range(noise.integers(1, 4)):
        points = noise.random((noise.integers(2, 5), 2)) * [4 * width, 4 * height]
        draw.line([tuple(point) for point in points], fill=ink, width=int(noise.integers(4, max(5, height // 2))), joint="curve")
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def rectangle(height: int, width: int, noise: np.random.Generator) -> Pixels:
    """Return a rectangle on a plain ground, its sides a quarter to three quarters of the image's."""
    high, wide = (int(noise.integers(side // 4, 3 * side // 4 + 1)) for side in (height, width))
    top, left = noise.integers(0, height - high + 1), noise.integers(0, width - wide + 1)
    weight = np.zeros((height, width))
    weight[top : top + high, left : left + wide] = 1
    return blend(weight, noise)


ODD: dict[str, Draw] = {
    "gradients": gradient,
    "checkerboards": checkerboard,
    "rendered text": text,
    "page of text": page,
    "strokes": stroke,
    "rectangles": rectangle,
}
PLAIN = {"black": 0, "white": 255}


def odd_images(height: int, width: int, n: int) -> dict[str, Pixels]:
    """Return ``n`` images (N, H, W, 3) of each odd kind, and one each of black and white; they depend on the size alone."""
    found = {}
    for name, draw in ODD.items():
        noise = np.random.default_rng([SEED, *name.encode()])
        found[name] = np.stack([draw(height, width, noise) for _ in range(n)])
    return found | {name: np.full((1, height, width, 3), value, np.uint8) for name, value in PLAIN.items()}
