"""Headers of JPEG."""

import re

import numpy as np

from ebjdat_serve.decoding.exif import BYTES_PER_PIXEL, exif_work
from ebjdat_serve.decoding.header import CHUNK_WORK, Bytes, Count, Header, Limits, Steps, damaged
from ebjdat_serve.errors import InvalidImage

SOI, EOI, SOS, DQT, APP1, APP2, APP13, TEM, DHP, EXP = 0xD8, 0xD9, 0xDA, 0xDB, 0xE1, 0xE2, 0xED, 0x01, 0xDE, 0xDF
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
HIERARCHICAL = {0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, DHP, EXP}
RESTARTS = range(0xD0, 0xD8)
RESOURCE_WORK, TABLE_WORK, ENTRY_WORK = 150, 10, 20
"""Pixels whose decoding takes about as long as Pillow's reading of a Photoshop resource, and of a byte of a quantization table or of a list
of pictures."""
SHORT, BLOCK = 4096, 2**15
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""In the coded pixels of a scan: neither a stuffed zero, nor a restart, nor fill before another byte."""


def judge_jpeg(data: Bytes, limits: Limits, steps: Steps) -> Header:
    """Return what a JPEG promises; scans and segments are counted up to its end-of-image marker. Raises InvalidImage."""
    pieces = Count(limits.max_pieces, "JPEG", "segments, or bytes between them", steps)
    scans = Count(limits.max_scans, "JPEG", "scans", steps)
    frame: tuple[int, int, int, bytes] | None = None
    at, partial, metadata = 2, False, 0
    exif, pictures = bytearray(), bytearray()
    while at + 2 <= len(data):
        if data[at] != 0xFF or data[at + 1] == 0xFF:
            pieces.add()  # fill, or rubbish between segments
            at += 1
            continue
        code = data[at + 1]
        if code == EOI:
            break
        (scans if code == SOS else pieces).add()
        if code in (0, SOI, TEM) or code in RESTARTS:
            at += 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4])
        if code in FRAMES or code in HIERARCHICAL:
            frame = _frame(data, at, length, frame)
        start, at = at, at + 2 + max(length, 2)
        metadata += length
        if code == APP1 and data[start + 4 : start + 10] == b"Exif\0\0":
            exif += data[start + 10 : at]  # Pillow puts them together
            metadata += len(exif) // BYTES_PER_PIXEL
        elif code == APP2 and data[start + 4 : start + 8] == b"MPF\0":
            pictures[:] = data[start + 8 : at]  # Pillow reads the last
            metadata += ENTRY_WORK * length
        elif code == APP13:
            metadata += RESOURCE_WORK * data.count(b"8BIM", start, at)
        elif code == DQT:
            metadata += TABLE_WORK * length
        if code == SOS:
            if frame is None:
                damaged("JPEG", "a scan comes before its frame")
            partial |= data[start + 4 : start + 5] != bytes([len(frame[3])])  # further components come in further scans
            at = next_marker(data, at)
    if frame is None or not scans.n:
        damaged("JPEG", "it has no frame and scan")
    if exif or pictures:
        metadata += exif_work(exif, steps) + exif_work(pictures, steps)
    return _header(*frame, partial, scans.n, metadata + pieces.n * CHUNK_WORK // 16)


def _frame(data: Bytes, at: int, length: int, before: tuple[int, int, int, bytes] | None) -> tuple[int, int, int, bytes]:
    """Return (marker, width, height, sampling factors) of a start of frame."""
    code, body = data[at + 1], bytes(data[at + 4 : at + 2 + length])
    if before is not None:
        damaged("JPEG", "it has two frames")
    if code in HIERARCHICAL:
        raise InvalidImage("the JPEG is hierarchical, which hardly anything reads; save it as an ordinary JPEG")
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        damaged("JPEG", "its start of frame is cut off")
    if body[0] != 8:
        raise InvalidImage(f"the JPEG has {body[0]} bits per sample; the limit is 8")
    if body[5] not in (1, 3, 4):
        raise InvalidImage(f"the JPEG has {body[5]} components; send 1 (grey), 3 (colour) or 4 (CMYK)")
    sampling = body[7 : 6 + 3 * body[5] : 3]
    if any(not 1 <= part <= 4 for each in sampling for part in (each >> 4, each & 15)):
        damaged("JPEG", "its sampling factors do not exist")
    return code, int.from_bytes(body[3:5]), int.from_bytes(body[1:3]), sampling


def _header(code: int, width: int, height: int, sampling: bytes, partial: bool, scans: int, extra_work: int) -> Header:
    across, down = max(each >> 4 for each in sampling), max(each & 15 for each in sampling)
    columns, rows = -(-width // (8 * across)), -(-height // (8 * down))
    samples = 64 * columns * rows * sum((each >> 4) * (each & 15) for each in sampling)
    # a decoder keeps the coefficients of the whole image, 2 bytes each, when they come in more than one scan
    kept = 2 * samples if partial or scans > 1 or code in PROGRESSIVE else 0
    passes = max(scans * samples / max(width * height, 1) / 2, 0.5)
    return Header("JPEG", width, height, 5 if len(sampling) == 1 else 8, kept, passes, extra_work)


def next_marker(data: Bytes, at: int) -> int:
    """Return where the next marker is in the coded pixels from ``at`` on, or the end.

    A regular expression is the fastest over short ways, but takes 20 ns a byte of hostile ones; NumPy takes .5 ns of any.
    """
    if found := MARKER.search(data, at, at + SHORT + 1):
        return found.start()
    at, size, end = at + SHORT, BLOCK, len(data)
    while at < end:
        block = np.frombuffer(data, np.uint8, min(size + 1, end - at), at)
        first, second = block[:-1], block[1:]
        hits = np.flatnonzero((first == 0xFF) & (second != 0) & (second != 0xFF) & ((second & 0xF8) != 0xD0))
        if len(hits):
            return at + int(hits[0])
        at, size = at + size, min(2 * size, 2**18)  # doubled, so that what is looked at twice is no more than what is passed
    return end
