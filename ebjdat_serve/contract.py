"""The input contract: how an image of any size becomes the height x width pixels that a model takes, as its source did it.

Sizes and offsets are those of the transforms that models are trained and evaluated with, all of which resize by Pillow: torchvision's
Resize and CenterCrop, timm's ResizeKeepRatio and CenterCropOrPad, and the image processors of Hugging Face transformers.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

from ebjdat_serve.bounds import Bounds
from ebjdat_serve.errors import BundleError

SIDE, CROP, QUALITY = Bounds(1, 4096), Bounds(1 / 64, 1.0), Bounds(0, 100)
MOST_PIXELS, MOST_FRAME = 2**20, 2**22
"""Pixels that a model may take, and those of the frame that an image is resized to before it is cropped."""
LONGEST_SIDE = 65_500
"""Pixels of a side of a JPEG, and of a frame."""
ALMOST = 1e-6
"""What a side of the frame may lack of a whole number: 224 / (224 / 232) may be less than 232."""
COLOUR = re.compile("#[0-9a-f]{6}")
SUPPORT = {"nearest": 0.5, "area": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
"""Pillow's radius of each filter, in pixels of whichever image is the coarser."""
TAPS_PER_PIXEL = 12
"""Terms of a resampling filter that take about as long as the decoding of one pixel of a plain PNG."""
JPEG_WORK = 2
"""Pixels of a plain PNG whose decoding takes about as long as a JPEG round trip of one."""


@dataclass(frozen=True)
class Input:
    """The input contract: how an image of any size becomes height x width pixels in [0,1]. Raises BundleError for values out of bounds.

    With its frame, (height / crop, width / crop) rounded down as timm and Hugging Face do, an image is resized as ``resize`` says:
    squash: to the frame; the aspect ratio is not kept (torchvision's Resize of two sizes);
    shorter: so that its shorter side is that of the frame, the other one rounded down (torchvision's Resize of one size, Hugging Face);
    cover: to the smallest size that covers the frame, rounded (timm's centre crop of unequal sides);
    pad: to the largest size within the frame, rounded (timm's crop mode ``border``).
    Then it is compressed as a JPEG of ``jpeg_quality`` and decoded, unless that is 0, and cropped about its centre.
    """

    height: Annotated[int, SIDE]
    width: Annotated[int, SIDE]
    resize: Literal["squash", "shorter", "cover", "pad"] = "squash"
    filter: Literal["area", "bilinear", "bicubic", "lanczos", "nearest"] = "area"
    crop: Annotated[float, CROP] = 1.0
    crop_offset: Literal["round", "floor"] = "round"  # of half the difference: round as torchvision, to even; floor as Hugging Face
    pad_colour: str = "#000000"  # of what the crop has beyond the resized image
    jpeg_quality: Annotated[int, QUALITY] = 0

    def __post_init__(self) -> None:
        for name, bounds in (("height", SIDE), ("width", SIDE), ("crop", CROP), ("jpeg_quality", QUALITY)):
            if fault := bounds.fault(getattr(self, name)):
                raise BundleError(f"{name} {fault}")
        if self.height * self.width > MOST_PIXELS:
            raise BundleError(f"{self.height} x {self.width} are more than {MOST_PIXELS} pixels")
        high, wide = self.frame
        if high * wide > MOST_FRAME or max(high, wide) > LONGEST_SIDE:
            raise BundleError(f"crop {self.crop:g} resizes to {high} x {wide}, more than {MOST_FRAME} pixels or {LONGEST_SIDE} a side")
        if not COLOUR.fullmatch(self.pad_colour):
            raise BundleError(f"pad_colour must be like #7f7f7f, not {self.pad_colour[:40]!r}")

    @property
    def frame(self) -> tuple[int, int]:
        """The (height, width) that an image is resized to, or to fit, before it is cropped."""
        return int(self.height / self.crop + ALMOST), int(self.width / self.crop + ALMOST)

    @property
    def averages(self) -> bool:
        """Whether every pixel is a mean over an area of the whole image, so that a JPEG may be decoded at a fraction of its size."""
        return self.resize == "squash" and self.filter == "area" and self.crop == 1 and not self.jpeg_quality

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an upright image of ``height`` x ``width`` is resized to."""
        high, wide = self.frame
        if self.resize == "squash":
            return high, wide
        if self.resize == "shorter":
            short = min(high, wide)
            return (int(short * height / width), short) if width <= height else (short, int(short * width / height))
        ratio = (min if self.resize == "cover" else max)(height / high, width / wide)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def offset(self, size: int, wanted: int) -> int:
        """Return where ``wanted`` pixels about the centre of ``size`` begin; negative where they begin before it."""
        if self.crop_offset == "floor":
            return (size - wanted) // 2
        return round((size - wanted) / 2) if size >= wanted else -((wanted - size) // 2)

    def cost(self, height: int, width: int) -> "Cost":
        """Return what it takes to resize and crop an upright image."""
        high, wide = self.resized(height, width)
        down, across = self._taps(height, high), self._taps(width, wide)
        pixels, between = high * wide, max(wide * height, high * width)  # what is resampled in one direction
        again = 8 * pixels if self.jpeg_quality else 0  # compressed, in a buffer of its own, and decoded
        weights = 8 * int((down + 2) * high + (across + 2) * wide)
        work = int((across * wide * height + down * pixels) / TAPS_PER_PIXEL) + (JPEG_WORK * pixels if self.jpeg_quality else 0)
        return Cost(high, wide, 4 * (between + pixels) + weights + again + 12 * self.height * self.width, work)

    def fault(self, cost: "Cost", most: int) -> str:
        """Return why an image cannot be resized, "" if it can: it would have more than ``most`` pixels, or a side that no JPEG has."""
        if cost.height * cost.width > most:
            return f"the model resizes it to {cost.width} x {cost.height}; the limit is {most} in all: crop it first"
        if self.jpeg_quality and max(cost.height, cost.width) > LONGEST_SIDE:
            return f"the model resizes it to {cost.width} x {cost.height}; the limit of its JPEG is {LONGEST_SIDE} a side: crop it first"
        return ""

    def _taps(self, size: int, resized: int) -> float:
        """Return how many pixels of a line of ``size`` each of ``resized`` is made of."""
        return 2 * SUPPORT[self.filter] * max(1.0, size / resized) if size != resized else 0.0

    def described(self) -> str:
        """Return the contract in words."""
        high, wide = self.frame
        how = {"squash": "squashed to", "shorter": "shorter side to that of", "cover": "resized to cover", "pad": "resized to fit within"}
        words = f"{self.height} x {self.width} pixels: {how[self.resize]} {high} x {wide} ({self.filter})"
        words += f", a JPEG of quality {self.jpeg_quality}" if self.jpeg_quality else ""
        words += ", cropped about the centre" if self.crop < 1 or self.resize in ("shorter", "cover") else ""
        return words + (f", on {self.pad_colour}" if self.resize == "pad" else "")


class Cost(NamedTuple):
    """What it takes to resize and crop an image."""

    height: int  # that it is resized to
    width: int
    memory: int  # bytes at the peak, beside the image itself
    work: int  # time, in pixels of a plain PNG


@lru_cache(maxsize=1024)
def cost_of(contract: Input, height: int, width: int) -> Cost:
    """Return what it takes to resize and crop an image that is stored as ``height`` x ``width``, whichever way it is turned upright."""
    as_stored = contract.cost(height, width)
    if height == width or contract.height == contract.width:
        return as_stored
    turned = contract.cost(width, height)
    larger = max(as_stored, turned, key=lambda cost: cost.height * cost.width)
    return larger._replace(memory=max(as_stored.memory, turned.memory), work=max(as_stored.work, turned.work))


def crop_of(height: int, width: int, frame: tuple[int, int]) -> float:
    """Return the ``crop`` with which ``height`` x ``width`` pixels have the frame (height, width) that a source says.

    Raises BundleError if there is none: the sides of the frame are in another ratio, or shorter.
    """
    pairs = list(zip(frame, (height, width), strict=True))
    least, most = max(side / wanted for side, wanted in pairs), min((side + 1) / wanted for side, wanted in pairs)
    if not 1 <= least < most:
        raise BundleError(f"no crop from 0 to 1 makes {height} x {width} pixels of {frame[0]} x {frame[1]}")
    return 1 / least
