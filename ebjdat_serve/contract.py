"""The input contract: how an image of any size becomes the height x width pixels that a model takes, as its source did it.

Sizes and offsets are those of the transforms that models are trained and evaluated with, all of which resize by Pillow: torchvision's
Resize and CenterCrop, timm's ResizeKeepRatio and CenterCropOrPad, and the image processors of Hugging Face transformers.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from ebjdat_serve.bounds import Bounds
from ebjdat_serve.errors import BundleError

SIDE, CROP, QUALITY = Bounds(1, 4096), Bounds(1 / 64, 1.0), Bounds(0, 100)
MOST_PIXELS, MOST_FRAME = 2**20, 2**22
"""Pixels that a model may take, and those of the frame that an image is resized to before it is cropped."""
LONGEST_SIDE = 65_500
"""Pixels of a side of a resized image: the most that a JPEG has."""
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

    With its frame, (round(height / crop), round(width / crop)), an image is resized as ``resize`` says:
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
        return round(self.height / self.crop), round(self.width / self.crop)

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

    def fault(self, height: int, width: int, most: int) -> str:
        """Return why an upright image cannot be resized, "" if it can: it would have more than ``most`` pixels, or a side no JPEG has."""
        high, wide = self.resized(height, width)
        if high * wide <= most and max(high, wide) <= LONGEST_SIDE:
            return ""
        return f"the model resizes it to {wide} x {high}; the limit is {most} pixels and {LONGEST_SIDE} a side: crop it first"

    def memory(self, height: int, width: int) -> int:
        """Return about how many bytes it takes at its peak to resize and crop an upright image, beside that image."""
        high, wide = self.resized(height, width)
        between = 4 * max(wide * height, high * width)  # resampled in one direction
        weights = 8 * int(sum((self._taps(a, b) + 2) * b for a, b in ((height, high), (width, wide))))
        again = 12 * high * wide if self.jpeg_quality else 0  # compressed, in a buffer of its own, and decoded
        return between + weights + 4 * high * wide + again + 12 * self.height * self.width

    def work(self, height: int, width: int) -> int:
        """Return about how long it takes to resize and crop an upright image, in pixels of a plain PNG."""
        high, wide = self.resized(height, width)
        taps = self._taps(width, wide) * wide * height + self._taps(height, high) * high * wide
        return int(taps / TAPS_PER_PIXEL) + JPEG_WORK * high * wide * (self.jpeg_quality > 0)

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


def crop_of(height: int, width: int, frame: tuple[int, int]) -> float:
    """Return the ``crop`` with which ``height`` x ``width`` pixels have the frame (height, width) that a source says.

    Raises BundleError if there is none: the sides of the frame are in another ratio, or shorter.
    """
    least = max((side - 0.5) / wanted for side, wanted in zip(frame, (height, width), strict=True))
    most = min((side + 0.5) / wanted for side, wanted in zip(frame, (height, width), strict=True))
    exact = frame[0] / height
    crop = 1 / (exact if least < exact < most else (least + most) / 2)
    if least >= most or crop > 1 or not math.isfinite(crop) or (round(height / crop), round(width / crop)) != tuple(frame):
        raise BundleError(f"no crop from 0 to 1 makes {height} x {width} pixels of {frame[0]} x {frame[1]}")
    return crop
