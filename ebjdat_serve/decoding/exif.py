"""What Pillow spends on EXIF: it copies each tag's value, however often these overlap."""

import struct

from ebjdat_serve.decoding.header import Bytes

IFDS = {0x8769, 0x8825, 0xA005}
"""Tags that point to further directories, which Pillow reads when it turns an image: Exif, GPS, interoperability."""
FREE_TAGS = 128
"""More than cameras write into these directories."""
TAG_WORK = 1500
"""Pixels whose decoding takes about as long as Pillow's reading of one tag."""
BYTES_PER_PIXEL = 64
"""Bytes that are copied in the time of one pixel."""


def exif_work(block: Bytes, length: int) -> int:
    """Return the work, in pixels, of reading EXIF of ``length`` bytes that begins with ``block``; takes some microseconds."""
    data = bytes(block).removeprefix(b"Exif\0\0")
    order = "<" if data[:2] == b"II" else ">"
    starts, tags = list(struct.unpack_from(order + "I", data, 4)) if len(data) >= 8 else [], 0
    for at in starts:  # which grows meanwhile
        if not 0 < at <= len(data) - 2:
            continue
        entries = min(struct.unpack_from(order + "H", data, at)[0], length // 12)
        tags += entries
        if entries <= FREE_TAGS and len(starts) <= len(IFDS):
            found = data[at + 2 : at + 2 + 12 * min(entries, (len(data) - at - 2) // 12)]
            starts += [value for tag, _, _, value in struct.iter_unpack(order + "HHII", found) if tag in IFDS]
    return max(0, tags - FREE_TAGS) * TAG_WORK + tags * length // BYTES_PER_PIXEL
