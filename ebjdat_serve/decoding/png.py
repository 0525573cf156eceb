"""Headers of PNG."""

import re

from ebjdat_serve.decoding.exif import MOST_TAGS, TAG_WORK, exif_work
from ebjdat_serve.decoding.header import CHUNK_WORK, Bytes, Count, Header, Limits, Steps, damaged
from ebjdat_serve.errors import InvalidImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits per sample that a colour type may have."""
NAME = re.compile(rb"\w{4}")
"""What Pillow takes for the name of a chunk; it ends at any other."""
EXIF_TEXT = b"Raw profile type exif\0"
"""The keyword of a text that is EXIF in hexadecimal digits, which may be compressed."""
SMALL_CHUNK = 256
"""Bytes of a chunk of pixels below which it counts as a piece: encoders write kilobytes."""


def judge_png(data: Bytes, limits: Limits, steps: Steps) -> Header:
    """Return what a PNG promises; chunks are counted to its end. Raises InvalidImage."""
    if len(data) < 33 or data[12:16] != b"IHDR" or data[8:12] != b"\0\0\0\x0d":
        damaged("PNG", "it does not begin with an IHDR chunk")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    bits, colour, interlaced = data[24], data[25], data[28]
    if bits not in DEPTHS.get(colour, ()):
        damaged("PNG", f"colour type {colour} with {bits} bits does not exist")
    pieces = Count(limits.max_pieces, "PNG", "chunks that are no pixels, or are tiny", steps)
    pixel_chunks = Count(limits.max_strips, "PNG", "chunks of pixels", steps)
    packed = Count(limits.max_compressed, "PNG", "compressed texts or profiles", steps)
    at, seen, exif = 33, False, 0
    while at + 8 <= len(data):
        kind, length = bytes(data[at + 4 : at + 8]), int.from_bytes(data[at : at + 4])
        if kind == b"IEND" or not NAME.fullmatch(kind):
            break
        if kind == b"tRNS" and (bits, colour) == (16, 2):  # Pillow reads 8 of the 16 bits, which name no one colour
            raise InvalidImage("the PNG has a transparent colour of 16 bits a sample; save it with an alpha channel, or with 8 bits")
        if kind == b"IHDR":
            damaged("PNG", "it has two IHDR chunks")
        if kind == b"IDAT" or (kind == b"fdAT" and length >= SMALL_CHUNK):
            seen = True
            (pixel_chunks if length >= SMALL_CHUNK else pieces).add()
        else:
            pieces.add()
            if kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and _is_compressed(data, at + 8, length)):
                packed.add()
            elif kind == b"eXIf":
                exif += exif_work(data[at + 8 : at + 8 + length], steps)
            if kind in (b"tEXt", b"zTXt", b"iTXt") and data[at + 8 : at + 8 + len(EXIF_TEXT)] == EXIF_TEXT:
                exif += MOST_TAGS * TAG_WORK  # for all that it may hold
        at += 12 + length
    if not seen:
        damaged("PNG", "it has no IDAT chunk")
    depth = 8 if colour in (2, 4, 6) else 6 if bits == 16 else 5
    work = packed.n * CHUNK_WORK + pieces.n * CHUNK_WORK // 8 + pixel_chunks.n * CHUNK_WORK // 64 + exif
    return Header("PNG", width, height, depth, passes=1.5 if interlaced else 1.0, extra_work=work)


def _is_compressed(data: Bytes, at: int, length: int) -> bool:
    """Return whether an iTXt chunk says that its text is compressed; a keyword has up to 79 bytes."""
    end = data.find(b"\0", at, at + min(length, 81))
    return end >= 0 and end + 1 < len(data) and data[end + 1] != 0
