"""What Pillow spends on tags of EXIF and TIFF: it copies each value, however often they overlap, and reads numbers in Python."""

import struct
from typing import Literal

from ebjdat_serve.decoding.header import Bytes, Steps

IFDS = {0x8769, 0x8825, 0xA005}
"""Tags that point to further directories, which Pillow reads when it turns an image: Exif, GPS, interoperability."""
FREE_TAGS = 128
"""More than cameras write into these directories."""
MOST_TAGS, MOST_DIRECTORIES = 512, 16
"""Beyond either an image is costly, however little its values are: they are not read."""
TAG_WORK = 1500
"""Pixels whose decoding takes about as long as Pillow's reading of one tag."""
BYTES_PER_PIXEL = 64
"""Bytes that are copied in the time of one pixel."""
TEXT, WHOLE, FLOAT, RATIONAL = 0, 110, 300, 1200
"""Pixels whose decoding takes about as long as Pillow's reading and writing of one value: 1.4 us a number, 3.9 a float, 15 a ratio."""
VALUES = {
    **{1: (1, TEXT), 2: (1, TEXT), 7: (1, TEXT)},
    **{6: (1, WHOLE), 3: (2, WHOLE), 8: (2, WHOLE), 4: (4, WHOLE), 9: (4, WHOLE), 13: (4, WHOLE), 16: (8, WHOLE)},
    **{11: (4, FLOAT), 12: (8, FLOAT), 5: (8, RATIONAL), 10: (8, RATIONAL)},
}
"""Bytes and work of one value, by type."""
TAGS_PER_STEP = 4


def exif_work(block: Bytes, steps: Steps) -> int:
    """Return the work, in pixels, of reading EXIF. Raises TooLong."""
    data = bytes(block).removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    if len(data) < 8:
        return 0
    order = "<" if data[:2] == b"II" else ">"
    return tags_work(data, order, struct.unpack_from(order + "I", data, 4)[0], steps)


def tags_work(data: Bytes, order: str, start: int, steps: Steps, *, big: bool = False) -> int:
    """Return the work, in pixels, of reading the directory at ``start`` and those that it names; ``big``: of BigTIFF. Raises TooLong."""
    head, entry, inline = ("Q", struct.Struct(order + "HHQQ"), 8) if big else ("H", struct.Struct(order + "HHII"), 4)
    ends: Literal["little", "big"] = "little" if order == "<" else "big"
    starts = [start]
    tags = work = copied = 0
    for at in starts:  # which grows meanwhile
        if not 0 < at <= len(data) - struct.calcsize(order + head):
            continue
        entries = min(int(struct.unpack_from(order + head, data, at)[0]), len(data) // entry.size)
        tags += entries
        if tags > MOST_TAGS or len(starts) > MOST_DIRECTORIES:
            return (tags + MOST_TAGS) * TAG_WORK
        steps.take(1 + entries // TAGS_PER_STEP)
        at += struct.calcsize(order + head)
        values = data[at : at + entry.size * min(entries, (len(data) - at) // entry.size)]
        for tag, kind, n, value in entry.iter_unpack(values):
            size, each = VALUES.get(kind, (0, 0))
            if size * n <= len(data):  # else it is not read
                copied += size * n
                work += each * n
                if tag in IFDS and each == WHOLE:
                    named = value.to_bytes(inline, ends) if size * n <= inline else data[value : value + size]
                    starts.append(int.from_bytes(named[:size], ends))
    return work + max(0, tags - FREE_TAGS) * TAG_WORK + copied // BYTES_PER_PIXEL
