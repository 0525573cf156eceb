"""Headers of GIF."""

from ebjdat_serve.decoding.header import CHUNK_WORK, Bytes, Count, Header, Limits, damaged

EXTENSION, IMAGE, TRAILER = 0x21, 0x2C, 0x3B
COUNTED = 2000
"""Blocks after the first frame up to which frames are counted: no decoder of the first frame reads them."""


def judge_gif(data: Bytes, limits: Limits) -> Header:
    """Return what a GIF promises; a first frame that leaves the screen widens it. Raises InvalidImage."""
    if len(data) < 13:
        damaged("GIF", "it ends within its header")
    pieces = Count(limits.max_pieces, "GIF", "blocks before its first frame")
    width, height = (int.from_bytes(data[i : i + 2], "little") for i in (6, 8))
    frames, blocks, at = 0, 0, 13 + _palette(data[10])
    while at + 1 < len(data) and data[at] != TRAILER and blocks < COUNTED:
        if frames:
            blocks += 1
        else:
            pieces.add()
        if data[at] not in (EXTENSION, IMAGE):
            at += 1  # rubbish, which Pillow skips too
            continue
        if data[at] == IMAGE:
            if len(data) < at + 11:
                break
            frames += 1
            if frames == 1:
                left, top, across, down = (int.from_bytes(data[i : i + 2], "little") for i in range(at + 1, at + 9, 2))
                width, height = max(width, left + across), max(height, top + down)
            at += 11 + _palette(data[at + 9])
        else:
            at += 2
        while at < len(data) and data[at] and blocks < COUNTED:
            if frames:
                blocks += 1
            else:
                pieces.add()
            at += 1 + data[at]
        at += 1
    if not frames:
        damaged("GIF", "it has no frame")
    return Header("GIF", width, height, frames, 6, passes=1.5, extra_work=pieces.n * CHUNK_WORK // 64)


def _palette(flags: int) -> int:
    """Return the bytes of the palette that ``flags`` announce."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0
