"""Headers of AVIF and HEIC: boxes of the ISO base media file format."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ebjdat_serve.decoding.header import CHUNK_WORK, Bytes, Count, Header, Limits, Steps, damaged
from ebjdat_serve.errors import InvalidImage

AVIF = {b"avif", b"avis"}
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
CONTAINERS = {b"mif1", b"msf1"}
SEQUENCES = {b"avis", b"hevc", b"hevx", b"msf1"}
NESTED = {b"iprp", b"ipco", b"moov", b"trak", b"mdia", b"minf", b"stbl"}
VERSIONED = {b"meta", b"iref"}
"""Boxes that hold boxes, at once or after a version and flags."""
DEEPEST = 8
LONGEST_BRANDS = 1024
"""Bytes of the box of brands: ordinary ones have 24 to 48."""


@dataclass
class Found:
    """What was found in the boxes."""

    sizes: list[tuple[int, int]] = field(default_factory=list)  # by place in ipco; (0, 0) for other properties
    of_primary: list[int] = field(default_factory=list)  # places of the primary item's properties, from 0
    primary: int = -1
    items: int = 0
    tiles: int = 0  # of the largest grid
    tracks: list[tuple[int, int]] = field(default_factory=list)
    samples: int = 2  # of luma and chroma in two pixels: 2 grey, 3 4:2:0, 4 4:2:2, 6 4:4:4
    deep: bool = False
    alpha: bool = False


def brands(data: Bytes) -> set[bytes]:
    """Return the major and the compatible brands, or nothing."""
    length = int.from_bytes(data[:4])
    if data[4:8] != b"ftyp" or not 16 <= length <= min(len(data), LONGEST_BRANDS):
        return set()
    return {bytes(data[8:12]), *(name for (name,) in struct.iter_unpack("4s", data[16 : length - length % 4]))}


def judge_bmff(data: Bytes, limits: Limits, steps: Steps) -> Header:
    """Return what an AVIF or HEIC promises of its primary image, or of its track if it is a sequence. Raises InvalidImage.

    The coded frame has a size of its own, which may be another: libavif scales it.
    """
    names = brands(data)
    kind = "AVIF" if names & AVIF else "HEIC"
    pieces = Count(limits.max_pieces, kind, "boxes and properties", steps)
    items = Count(limits.max_items, kind, "items", steps)
    places = Count(limits.max_strips, kind, "properties of items", steps)
    found = Found()
    _walk(data, 0, len(data), kind, (pieces, items, places), found)
    sizes = [size for size in found.sizes if size != (0, 0)]
    own = [found.sizes[place] for place in found.of_primary if place < len(found.sizes) and found.sizes[place] != (0, 0)]
    tracked = bytes(data[8:12]) in SEQUENCES and found.tracks
    if not own and not tracked:
        damaged(kind, "its primary image has no size")
    width, height = found.tracks[0] if tracked else own[0]
    for size in (*sizes, *found.tracks):
        if size[0] * size[1] > limits.max_pixels:
            said = f"the {kind} holds an image of {size[0]} x {size[1]} pixels; the limit is {limits.max_pixels} in all: send it smaller"
            raise InvalidImage(said, too_large=True)
    planes = found.samples * (2 if found.deep else 1) / 2 + (2 if found.deep else 1) * found.alpha
    # a grid's planes are put together from those of its tiles; RGB bytes and an image are made of them
    depth = int(-(-planes // 1)) + 8
    fixed = max((size[0] * size[1] for size in sizes), default=0) * depth // 4 if found.tiles else 0
    work = (pieces.n + items.n + places.n) * CHUNK_WORK // 64
    return Header(kind, width, height, depth, fixed + len(data), passes=3.0, extra_work=work, sure=False)


def _boxes(data: Bytes, at: int, end: int, kind: str, pieces: Count) -> Iterator[tuple[bytes, int, int]]:
    """Give (type, start, end) of the boxes between two places."""
    while at + 8 <= end:
        pieces.add()
        length, name, start = int.from_bytes(data[at : at + 4]), bytes(data[at + 4 : at + 8]), at + 8
        if length == 1:
            length, start = int.from_bytes(data[at + 8 : at + 16]), at + 16
        elif length == 0:
            length = end - at
        if length < start - at:
            damaged(kind, f"its box {name!r} is shorter than its own header")
        yield name, start, min(at + length, end)
        at += length


def _walk(
    data: Bytes, at: int, end: int, kind: str, counts: tuple[Count, Count, Count], found: Found, inside: tuple[bytes, ...] = ()
) -> None:
    """Read the boxes between two places, and those in them."""
    pieces, items, places = counts
    if len(inside) > DEEPEST:
        damaged(kind, "its boxes are nested too deep")
    for name, start, stop in _boxes(data, at, end, kind, pieces):
        body = memoryview(data)[start:stop]
        if name in NESTED or name in VERSIONED:
            _walk(data, start + 4 * (name in VERSIONED), stop, kind, counts, found, (*inside, name))
        elif inside[-1:] == (b"ipco",):
            _property(name, body, found)
        elif name == b"pitm" and len(body) >= 6:
            found.primary = int.from_bytes(body[4 : 8 if body[0] else 6])
        elif name == b"iinf" and len(body) >= 6:
            items.add(int.from_bytes(body[4 : 8 if body[0] else 6]))
        elif name == b"dimg" and len(body) >= 6:
            found.tiles = max(found.tiles, _references(body))
            items.add(_references(body))
        elif name == b"ipma":
            _associations(body, kind, places, found)
        elif name == b"tkhd" and len(body) >= 84:
            size = int.from_bytes(body[-8:-6]), int.from_bytes(body[-4:-2])  # of 16.16 bits
            found.tracks += [size] if 0 not in size else []


def _property(name: bytes, body: memoryview, found: Found) -> None:
    """Note what is in ipco, in whose order properties are named by number."""
    if name == b"ispe" and len(body) >= 12:
        found.sizes.append((int.from_bytes(body[4:8]), int.from_bytes(body[8:12])))
        return
    if name == b"av1C" and len(body) >= 4:
        deep, grey, halved_x, halved_y = (bool(body[2] & bit) for bit in (0x40, 0x10, 8, 4))
        found.deep |= deep
        found.samples = max(found.samples, 2 if grey else 3 if halved_y else 4 if halved_x else 6)
    elif name == b"hvcC" and len(body) >= 23:
        found.deep |= bool(body[17] & 7)
        found.samples = max(found.samples, (2, 3, 4, 6)[body[16] & 3])
    elif name == b"auxC":
        found.alpha = True
    found.sizes.append((0, 0))


def _references(body: memoryview) -> int:
    """Return how many items a reference names; whether their numbers have 2 or 4 bytes, the length tells."""
    return int.from_bytes(body[2:4]) if len(body) == 4 + 2 * int.from_bytes(body[2:4]) else int.from_bytes(body[4:6])


def _associations(body: memoryview, kind: str, counted: Count, found: Found) -> None:
    """Note which properties the primary item has."""
    if len(body) < 8:
        return
    wide, long = 4 if body[0] else 2, body[3] & 1
    at = 8
    for _ in range(int.from_bytes(body[4:8])):
        if at + wide + 1 > len(body):
            damaged(kind, "its list of properties is cut off")
        item, n = int.from_bytes(body[at : at + wide]), body[at + wide]
        at += wide + 1
        counted.add(1 + n)
        if item == found.primary:
            step = 1 + long
            places = [int.from_bytes(body[i : i + step]) & (0x7FFF if long else 0x7F) for i in range(at, at + n * step, step)]
            found.of_primary += [place - 1 for place in places if place]
        at += n * (1 + long)
