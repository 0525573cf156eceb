"""Headers of TIFF."""

import struct

from ebjdat_serve.decoding.exif import tags_work
from ebjdat_serve.decoding.header import CHUNK_WORK, Bytes, Count, Header, Limits, Steps, damaged
from ebjdat_serve.errors import InvalidImage

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS = 256, 257, 258, 259, 262, 273, 277, 278
TILE_WIDTH, TILE_HEIGHT, TILES, FORMAT, PLANES = 322, 323, 324, 339, 284
COMPRESSIONS = {1: "none", 2: "CCITT", 3: "fax 3", 4: "fax 4", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate"}
WIDTHS = {1: 1, 3: 2, 4: 4, 16: 8}
"""Bytes of the types of whole numbers: BYTE, SHORT, LONG, LONG8."""
COLOURS, MAX_COLOURS = 320, 3 * 2**16
"""The tag of the palette, and how many numbers 16 bits of pixels can choose from."""


def judge_tiff(data: Bytes, limits: Limits, steps: Steps) -> Header:
    """Return what the first page of a TIFF promises. Raises InvalidImage."""
    big = 43 in data[2:4]
    reader = Reader(data, data[:2] == b"II", big)
    start = reader.number(8 if big else 4, 8 if big else 4)
    tags = reader.directory(start, Count(limits.max_pieces, "TIFF", "tags", steps))
    width, height = reader.first(tags, WIDTH, 0), reader.first(tags, HEIGHT, 0)
    compression = reader.first(tags, COMPRESSION, 1)
    if compression not in COMPRESSIONS:
        known = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise InvalidImage(f"the TIFF has compression {compression}; send {known}")
    bits, samples = reader.first(tags, BITS, 1), reader.first(tags, SAMPLES, 1)
    if bits not in (1, 2, 4, 8, 12, 16) or reader.first(tags, FORMAT, 1) not in (1, 4):
        raise InvalidImage(f"the TIFF has samples of {bits} bits, signed or of floating point; send unsigned ones of at most 16 bits")
    unusual = (bits == 12) + (not reader.little) + (reader.first(tags, PHOTOMETRIC, 0) == 0)
    if bits in (12, 16) and samples == 1 and unusual > 1:
        raise InvalidImage(
            f"the TIFF has samples of {bits} bits in an order that is not read; save it with 16 bits, little-endian, and 0 for black"
        )
    if not 1 <= samples <= 6:
        raise InvalidImage(f"the TIFF has {samples} samples per pixel; the limit is 6")
    strips = Count(limits.max_strips, "TIFF", "strips or tiles", Steps())  # which are not walked
    strips.add(max(tags[tag][1] for tag in (STRIPS, TILES) if tag in tags) if STRIPS in tags or TILES in tags else 0)
    if not strips.n:
        damaged("TIFF", "it has no strips and no tiles")
    if tags.get(COLOURS, (0, 0, 0))[1] > MAX_COLOURS:
        damaged("TIFF", f"its palette has more than {MAX_COLOURS} numbers")
    per_sample = 2 if bits > 8 else 1
    tile = reader.first(tags, TILE_WIDTH, width) * reader.first(tags, TILE_HEIGHT, min(reader.first(tags, ROWS, height), height))
    # all of each is decoded, also what lies beyond the image; several may be the same bytes
    beyond = strips.n * tile - width * height
    if beyond // (samples if reader.first(tags, PLANES, 1) == 2 else 1) > limits.max_pixels:
        raise InvalidImage(
            f"the TIFF's strips or tiles hold {strips.n * tile} pixels, far more than its image: save it anew", too_large=True
        )
    # libtiff reads YCbCr as RGBA
    buffer = 0 if compression == 1 else tile * max(samples * per_sample, 4 if reader.first(tags, PHOTOMETRIC, 0) == 6 else 1)
    depth = 8 if samples > 1 or compression == 7 else 6 if bits > 8 else 5
    # Pillow reads the tags once as those of the file, and once as EXIF
    work = max(0, beyond) + strips.n * CHUNK_WORK // 32 + 2 * tags_work(data, reader.order, start, steps, big=big)
    return Header("TIFF", width, height, depth, fixed=buffer + len(data), passes=1.5, extra_work=work, sure=compression != 7)


class Reader:
    """Numbers and directories of a TIFF, classic or big."""

    def __init__(self, data: Bytes, little: bool, big: bool) -> None:
        self.data, self.little, self.big, self.order = data, little, big, "<" if little else ">"

    def number(self, at: int, size: int) -> int:
        """Return the ``size`` bytes at ``at`` as a number. Raises InvalidImage beyond the end."""
        if not 0 <= at <= len(self.data) - size:
            damaged("TIFF", "an offset leaves the file")
        return int.from_bytes(self.data[at : at + size], "little" if self.little else "big")

    def directory(self, at: int, pieces: Count) -> dict[int, tuple[int, int, int]]:
        """Return {tag: (type, count, where its value or offset is)}."""
        entries = self.number(at, 8 if self.big else 2)
        pieces.add(entries)
        entry, wide = (struct.Struct(self.order + "HHQ8x"), 8) if self.big else (struct.Struct(self.order + "HHI4x"), 4)
        at += 8 if self.big else 2
        if at + entries * entry.size > len(self.data):
            damaged("TIFF", "its tags leave the file")
        tags: dict[int, tuple[int, int, int]] = {}
        for place, (tag, kind, count) in enumerate(entry.iter_unpack(self.data[at : at + entries * entry.size])):
            tags.setdefault(tag, (kind, count, at + place * entry.size + 4 + wide))
        return tags

    def first(self, tags: dict[int, tuple[int, int, int]], tag: int, default: int) -> int:
        """Return the first number of a tag, or ``default`` without it."""
        if tag not in tags:
            return default
        kind, count, at = tags[tag]
        if kind not in WIDTHS or not count:
            damaged("TIFF", f"its tag {tag} is no whole number")
        wide = 8 if self.big else 4
        if count * WIDTHS[kind] > wide:
            at = self.number(at, wide)
        return self.number(at, WIDTHS[kind])
