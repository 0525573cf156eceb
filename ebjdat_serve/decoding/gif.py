"""Headers of GIF."""

from ebjdat_serve.decoding.header import CHUNK_WORK, Bytes, Count, Header, Limits, Steps, damaged

EXTENSION, IMAGE, TRAILER = 0x21, 0x2C, 0x3B


def judge_gif(data: Bytes, limits: Limits, steps: Steps) -> Header:
    """Return what a GIF promises; a first frame that leaves the screen widens it. Raises InvalidImage.

    Nothing after its first frame is read: no decoder of that does.
    """
    if len(data) < 13:
        damaged("GIF", "it ends within its header")
    pieces = Count(limits.max_pieces, "GIF", "blocks before its first frame", steps)
    width, height = (int.from_bytes(data[i : i + 2], "little") for i in (6, 8))
    at = 13 + _palette(data[10])
    while at + 1 < len(data) and data[at] != TRAILER:
        pieces.add()
        if data[at] == IMAGE:
            if len(data) < at + 11:
                break
            left, top, across, down = (int.from_bytes(data[i : i + 2], "little") for i in range(at + 1, at + 9, 2))
            size = max(width, left + across), max(height, top + down)
            return Header("GIF", *size, 6, passes=1.5, extra_work=pieces.n * CHUNK_WORK // 64)
        if data[at] != EXTENSION:
            at += 1  # rubbish, which Pillow skips too
            continue
        at += 2
        while at < len(data) and data[at]:
            pieces.add()
            at += 1 + data[at]
        at += 1
    return damaged("GIF", "it has no frame")


def _palette(flags: int) -> int:
    """Return the bytes of the palette that ``flags`` announce."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0
