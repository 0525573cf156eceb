"""Headers of WebP."""

from ebjdat_serve.decoding.exif import exif_work
from ebjdat_serve.decoding.header import CHUNK_WORK, Bytes, Count, Header, Limits, Steps, damaged

DEPTH = 16
"""Bytes per pixel: the decoder of animations, which is Pillow's only one, keeps two canvases; bytes and image are two copies more."""


def judge_webp(data: Bytes, limits: Limits, steps: Steps) -> Header:
    """Return what a WebP promises: the canvas, which must hold every frame. Raises InvalidImage."""
    pieces = Count(limits.max_pieces, "WebP", "chunks", steps)
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    canvas, framed, lossless, at, exif = (0, 0), False, False, 12, 0
    while at + 8 <= end:
        pieces.add()
        kind, length = bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"ANMF":
            framed = True
            _check_animation(bytes(data[at + 8 : min(at + 24, end)]), canvas)
            at += 8 + length + length % 2
            continue
        body = bytes(data[at + 8 : min(at + 18, end)])
        if kind == b"VP8X" and at == 12:
            if len(body) < 10:
                damaged("WebP", "its VP8X chunk is cut off")
            canvas = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif kind in (b"VP8 ", b"VP8L"):
            size = _frame_size(kind, body)
            lossless |= kind == b"VP8L"
            framed = True
            if canvas != (0, 0) and size != canvas:
                damaged("WebP", f"its frame of {size[0]} x {size[1]} is not its canvas of {canvas[0]} x {canvas[1]}")
            canvas = size
        elif kind == b"EXIF":
            exif += exif_work(data[at + 8 : min(at + 8 + length, end)], steps)
        at += 8 + length + length % 2
    if not framed or canvas == (0, 0):
        damaged("WebP", "it has no frame")
    return Header("WEBP", *canvas, DEPTH, passes=2.0 if lossless else 1.5, extra_work=pieces.n * CHUNK_WORK // 64 + exif)


def _frame_size(kind: bytes, body: bytes) -> tuple[int, int]:
    if kind == b"VP8L":
        if len(body) < 5 or body[0] != 0x2F:
            damaged("WebP", "its lossless frame has no signature")
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if len(body) < 10 or body[3:6] != b"\x9d\x01\x2a":
        damaged("WebP", "its frame has no start code")
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _check_animation(body: bytes, canvas: tuple[int, int]) -> None:
    if len(body) < 16:
        damaged("WebP", "a frame of its animation is cut off")
    x, y, width, height = (int.from_bytes(body[i : i + 3], "little") for i in (0, 3, 6, 9))
    if 2 * x + width + 1 > canvas[0] or 2 * y + height + 1 > canvas[1]:
        damaged("WebP", "a frame of its animation leaves the canvas")
