"""Headers of BMP."""

from ebjdat_serve.decoding.header import Bytes, Header, Limits, Steps, damaged
from ebjdat_serve.errors import InvalidImage

COMPRESSIONS = {0: "none", 1: "RLE8", 2: "RLE4", 3: "bit fields", 4: "JPEG", 5: "PNG"}


def judge_bmp(data: Bytes, limits: Limits, steps: Steps) -> Header:
    """Return what a BMP promises; run lengths, which Pillow decodes in Python, are refused. Raises InvalidImage."""
    if len(data) < 26:
        damaged("BMP", "it ends within its header")
    size = int.from_bytes(data[14:18], "little")
    if size == 12:
        width, height, bits = (int.from_bytes(data[i : i + 2], "little") for i in (18, 20, 24))
        return Header("BMP", width, height, 8 if bits > 8 else 5)
    if size not in (40, 52, 56, 64, 108, 124) or len(data) < 14 + size:
        damaged("BMP", f"a header of {size} bytes does not exist, or is cut off")
    width, height = (int.from_bytes(data[i : i + 4], "little") for i in (18, 22))
    if data[25] == 0xFF:  # from the top down
        height = 2**32 - height
    bits, compression = (int.from_bytes(data[i : i + n], "little") for i, n in ((28, 2), (30, 4)))
    if bits not in (1, 4, 8, 16, 24, 32):
        raise InvalidImage(f"the BMP has {bits} bits per pixel; send 1, 4, 8, 16, 24 or 32")
    if compression not in (0, 3):
        raise InvalidImage(f"the BMP is compressed ({COMPRESSIONS.get(compression, compression)}); send it uncompressed, or as a PNG")
    colours = int.from_bytes(data[46:50], "little") if bits <= 8 else 0
    if colours > 2**bits:
        damaged("BMP", f"it has {colours} colours, and pixels of {bits} bits")
    return Header("BMP", width, height, 8 if bits > 8 else 5)
