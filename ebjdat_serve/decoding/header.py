"""What an encoded image promises, and what keeping the promise costs: read from its bytes before any pixel is made.

``judge`` walks the structure of the whole file, since a decoder does: a JPEG of 700 kB may hold 8,000 scans, each of which passes over all
its pixels. The walk ends at a limit, so that its own time is bounded: about 1 ms per MiB of any bytes. In the event loop all images of a
request share Steps, which end it sooner.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from ebjdat_serve.contract import Cost, Input, cost_of
from ebjdat_serve.errors import InvalidImage

Bytes = bytes | bytearray

WORKING_BYTES = 24 * 2**20
"""Bytes that any decode may use beside what is counted: strips, rows, tables, the decoder's own code and fragmentation."""
CHUNK_WORK = 2**15
"""Pixels whose decoding takes about as long as Pillow's reading of one compressed text chunk or of eight plain ones."""


@dataclass(frozen=True)
class Limits:
    """What an image may ask for; lengths in bytes, sizes in pixels, times in seconds."""

    max_bytes: int = 16 * 2**20
    max_pixels: int = 25_000_000  # 24-megapixel cameras make up to 24.5
    max_side: int = 65_535
    max_pieces: int = 1000  # chunks, segments, blocks, boxes or tags beside pixels
    max_compressed: int = 16  # compressed text chunks and profiles of a PNG; each inflates to as much as 1 MiB
    max_scans: int = 64  # of a JPEG; ordinary progressive ones have about ten
    max_strips: int = 20_000  # strips or tiles of a TIFF, chunks of pixels of a PNG
    max_items: int = 1024  # of an AVIF or HEIC
    max_memory: int = 448 * 2**20  # of one decode
    max_seconds: float = 5.0  # of processor time of one decode
    jpeg_draft: bool = False  # decode JPEGs above draft_above at a fraction of their size
    draft_above: int = 2_000_000
    draft_margin: int = 8  # a reduced JPEG keeps at least so many pixels a side for one of the result

    @property
    def max_jpeg_pixels(self) -> int:
        """Pixels of a JPEG that can be decoded at a fraction of its size."""
        return 2 * self.max_pixels if self.jpeg_draft else self.max_pixels


class Header(NamedTuple):
    """What a header promises. ``width`` and ``height`` are as stored, before EXIF rotation."""

    format: str
    width: int
    height: int
    depth: int = 8  # bytes per pixel while it is decoded and turned upright, all buffers together
    fixed: int = 0  # bytes that do not shrink with a draft
    passes: float = 1.0  # over all pixels
    extra_work: int = 0  # in pixels
    sure: bool = True  # whether the decoder cannot be given more pixels than the header promises

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def work(self) -> int:
        """About how much time it takes, in pixels of a plain PNG."""
        return int(self.pixels * self.passes) + self.extra_work

    def scale(self, contract: Input, limits: Limits) -> int:
        """Return by what a JPEG is reduced while it is decoded: 1, 2, 4 or 8; by more than 1 only for a contract that averages areas."""
        if self.format != "JPEG" or not limits.jpeg_draft or self.pixels <= limits.draft_above or not contract.averages:
            return 1
        room = min(self.width, self.height) // (limits.draft_margin * max(contract.height, contract.width))
        return max(scale for scale in (1, 2, 4, 8) if scale <= max(room, 1))

    def memory(self, contract: Input, limits: Limits) -> int:
        """Return about how many bytes the decode for ``contract`` takes at its peak, beside the encoded image."""
        scale = self.scale(contract, limits)
        if scale > 1:
            longer = max(contract.height, contract.width)
            squashed = 12 * longer * (max(self.width, self.height) // scale + longer)  # in one direction, and the result
            # it is turned upright once it is small
            return 4 * -(-self.width // scale) * -(-self.height // scale) + self.fixed + squashed + WORKING_BYTES
        return self._whole(cost_of(contract, self.height, self.width))

    def _whole(self, cost: Cost) -> int:
        """Return about how many bytes the decode takes at its peak if the image is not reduced."""
        return self.depth * self.pixels + self.fixed + cost.memory + WORKING_BYTES

    def check(self, contract: Input, limits: Limits) -> Cost:
        """Return what it takes to resize the image for ``contract``; raise InvalidImage if it is or becomes larger than it may be."""
        size = f"the {self.format} has {self.width} x {self.height} pixels"
        if not self.pixels:
            damaged(self.format, "it has no pixels")
        if max(self.width, self.height) > limits.max_side:
            raise InvalidImage(f"{size}; the limit is {limits.max_side} a side", too_large=True)
        reduced = self.scale(contract, limits) > 1
        allowed = limits.max_jpeg_pixels if reduced else limits.max_pixels
        if self.pixels > allowed:
            raise InvalidImage(f"{size}; the limit is {allowed} in all: send it smaller", too_large=True)
        cost = cost_of(contract, self.height, self.width)
        if fault := contract.fault(cost, limits.max_pixels):
            raise InvalidImage(f"{size}, and {fault}", too_large=True)
        needed = self.memory(contract, limits) if reduced else self._whole(cost)
        if needed > limits.max_memory:
            mib = 2**20
            said = f"{size}, which take about {needed // mib} MiB to decode; the limit is {limits.max_memory // mib}: send it smaller"
            raise InvalidImage(said, too_large=True)
        return cost


class TooLong(Exception):
    """Judging takes more steps than it was given."""


class Steps:
    """How many more steps, of some microseconds, judging may take: pieces of files, of all images of one request together."""

    def __init__(self, left: float = math.inf) -> None:
        self.left = left

    def take(self, n: int = 1) -> None:
        """Take ``n`` of them. Raises TooLong: so many are not left."""
        self.left -= n
        if self.left < 0:
            raise TooLong


class Count:
    """Counts the pieces of a file, each of which is a step, and refuses it beyond a limit."""

    def __init__(self, limit: int, kind: str, what: str, steps: Steps) -> None:
        self.limit, self.kind, self.what, self.steps, self.n = limit, kind, what, steps, 0

    def add(self, n: int = 1) -> None:
        """Count ``n`` more. Raises InvalidImage beyond the limit, TooLong where no steps are left."""
        self.n += n
        if self.n > self.limit:
            raise InvalidImage(f"the {self.kind} has too many {self.what}, more than {self.limit}: save the image anew")
        self.steps.left -= n  # as take, whose call would cost as much as all else here
        if self.steps.left < 0:
            raise TooLong


def damaged(kind: str, why: str) -> NoReturn:
    """Raise InvalidImage for a file that is no valid one of its format."""
    raise InvalidImage(f"the {kind} is truncated or damaged: {why}")
