"""Small files that once cost a server gigabytes or minutes, or that cost it as much as it allows."""

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the image as a file of a format."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, kind: int = 2, pixels: bytes = b"\0" * 1000) -> bytes:
    """Return a PNG that promises a size, whatever its pixels are."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """Return 46 bytes: a canvas, and a lossless frame of its size that ends at once."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frame = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\0\0\0"
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + b"VP8L" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_scans(n: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a progressive JPEG whose last scan comes so often that there are ``n``."""
    whole = encoded(Image.new("RGB", size, (200, 30, 90)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    scan = whole[last:-2]
    return whole[:-2] + scan * (n - whole.count(b"\xff\xda")) + whole[-2:]


def jpeg_of_segments(n: int) -> bytes:
    """Return a JPEG with ``n`` empty comments after its scan."""
    whole = encoded(Image.new("RGB", (256, 256)), "JPEG")
    return whole[:-2] + b"\xff\xfe\x00\x02" * n + whole[-2:]


def exif_of_tags(n: int, size: int) -> bytes:
    """Return EXIF that turns an image, and has ``n`` tags that all name the same ``size`` bytes as their value."""
    tags = [(0x0112, 3, 1, 6)] + [(0x8000 + i, 7, size, 8) for i in range(n)]
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return block.ljust(size + 8, b"\0")


def exif_of_numbers(kind: int, size: int, n: int, pointer: int = 0) -> bytes:
    """Return EXIF that turns an image, and ``n`` numbers of a type and of ``size`` bytes: in the directory of a tag if that is given."""
    own, at = [(0x0112, 3, 1, 6)], 200
    numbers = [(0x9286, kind, n, at)]
    head = directory(own + ([(pointer, 4, 1, 100)] if pointer else numbers))
    return b"II*\0\x08\0\0\0" + head.ljust(92, b"\0") + directory(numbers).ljust(100, b"\0") + struct.pack("<II", 72, 1) * (n * size // 8)


def directory(tags: list[tuple[int, int, int, int]]) -> bytes:
    """Return a directory of (tag, type, count, value)."""
    return struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


def tiff(tags: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    """Return a grey TIFF of 8 x 8 pixels with further tags; ``rest`` begins at byte 400."""
    own = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 64)]
    return (b"II*\0\x08\0\0\0" + directory(sorted(own + tags))).ljust(400, b"\0") + rest


def png_of_tags(n: int, size: int) -> bytes:
    """Return a whole PNG with such EXIF."""
    return png(40, 40, chunk(b"eXIf", exif_of_tags(n, size)), pixels=bytes(40 * 121))


def webp_of_tags(n: int, size: int) -> bytes:
    """Return a whole WebP with such EXIF."""
    return encoded(Image.new("RGB", (64, 64)), "WEBP", exif=exif_of_tags(n, size))


def jpeg_of_tags(n: int, size: int, marker: bytes = b"\xff\xe1", name: bytes = b"Exif\0\0") -> bytes:
    """Return a whole JPEG with such EXIF, or with a list of pictures of this form."""
    return jpeg_with((marker[1], name + exif_of_tags(n, size)))


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    """Return a whole JPEG with segments of (marker, body) after its first two bytes."""
    whole = encoded(Image.new("RGB", (64, 64)), "JPEG")
    return whole[:2] + b"".join(struct.pack(">BBH", 0xFF, code, len(body) + 2) + body for code, body in segments) + whole[2:]


def avif_that_lies(size: tuple[int, int], promised: tuple[int, int]) -> bytes:
    """Return an AVIF whose coded frame is larger than it promises: libavif decodes all of it, and makes it smaller."""
    data = bytearray(encoded(Image.new("RGB", size, (9, 90, 3)), "AVIF", speed=10))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", *promised)
    return bytes(data)


def png_of_texts(n: int) -> bytes:
    """Return a PNG with ``n`` texts, each of which inflates to 1 MiB."""
    return png(40, 40, *[chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20), 9))] * n)
