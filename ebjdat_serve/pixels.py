"""Decode images to pixels and encode them as PNG; the only module of the server that uses Pillow.

An image of any size is resized to height x width by area averaging (aspect ratio is not kept); transparent pixels are
composited on white; 16-bit images are scaled to 8; EXIF rotation is applied; of an animation the first frame is used.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ebjdat_serve.errors import InvalidImage

MAX_BYTES = 16 * 2**20
MAX_PIXELS = 40_000_000
MAX_PIECES = 200
FORMATS = ("PNG", "JPEG", "WEBP")
Pixels = NDArray[np.uint8]

AI_ORIGIN = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's digital source type of media made by a trained model, for tools that read provenance."""


def decode(data: bytes | bytearray, height: int, width: int) -> Pixels:
    """Return the image in ``data`` as (height, width, 3) uint8.

    Raises InvalidImage: empty, too many bytes or pixels, not PNG, JPEG or WebP, truncated or damaged.
    """
    return load(peek(data), height, width)


def peek(data: bytes | bytearray) -> Image.Image:
    """Return the image in ``data`` with only its header read, so that ``size`` bounds the cost of ``load``. Raises InvalidImage."""
    if not data:
        raise InvalidImage("the image is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise InvalidImage(f"the image has {len(data)} bytes; the limit is {MAX_BYTES}")
    if pieces(data) > MAX_PIECES:
        raise InvalidImage(f"the image is made of more than {MAX_PIECES} pieces, more than any camera or program writes; save it again")
    with _hostile():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    columns, rows = image.size
    if columns * rows > MAX_PIXELS:
        raise InvalidImage(f"the image has {columns} x {rows} pixels; the limit is {MAX_PIXELS} in total")
    return image


def upright_size(data: bytes | bytearray) -> tuple[int, int]:
    """Return the (height, width) of the image in ``data``, EXIF rotation applied, from its header alone. Raises InvalidImage."""
    image = peek(data)
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # an image with broken EXIF is still an image
        turned = False
    return image.size if turned else (image.height, image.width)


def pieces(data: bytes | bytearray) -> int:
    """Return the number of non-pixel chunks of a PNG, or of segments before a JPEG's pixels; counting stops beyond MAX_PIECES.

    Pillow reads each of them in Python, and inflates some: 16 MiB of them take up to a minute.
    """
    count = at = 0
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        at = 8
        while at + 8 <= len(data) and count <= MAX_PIECES:
            kind = data[at + 4 : at + 8]
            length = int.from_bytes(data[at : at + 4])
            # pixels come in chunks of kilobytes, and profiles inflate
            count += 50 if kind == b"iCCP" else 1 if kind != b"IDAT" or length < 256 else 0
            at += 12 + length
    elif data.startswith(b"\xff\xd8"):
        at = 2
        while at + 4 <= len(data) and count <= MAX_PIECES and data[at + 1] != 0xDA:
            count += 1
            if data[at] != 0xFF or data[at + 1] == 0xFF:
                at += 1  # padding or garbage between segments
            else:
                at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return count


def load(image: Image.Image, height: int, width: int) -> Pixels:
    """Return an image from ``peek`` as (height, width, 3) uint8. Raises InvalidImage."""
    with _hostile(), image:
        upright = _rgb(_upright(_eight_bit(image)))
        return np.asarray(upright if upright.size == (width, height) else upright.resize((width, height), Image.Resampling.BOX))


@contextmanager
def _hostile() -> Iterator[None]:
    """Turn any exception that Pillow raises on hostile bytes into InvalidImage."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise InvalidImage(f"the image has too many pixels; the limit is {MAX_PIXELS}") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"not an image this server reads; send {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise arbitrary exceptions; none may pass this line
        raise InvalidImage(f"the image is truncated or damaged ({type(error).__name__})") from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # an image with broken EXIF is still an image
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        shallow = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        # the orientation is kept; a transparent grey level has 16 bits and is meaningless here
        shallow.info = {key: value for key, value in image.info.items() if key != "transparency"}
        return shallow
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def to_unit(image: Pixels) -> NDArray[np.float32]:
    """Return (N, H, W, 3) uint8 as (N, 3, H, W) float32 in [0,1]."""
    return np.ascontiguousarray(image.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def to_bytes(image: NDArray[np.float32]) -> Pixels:
    """Return (N, 3, H, W) in [0,1] as (N, H, W, 3) uint8, rounded."""
    return np.rint(image.transpose(0, 2, 3, 1) * 255).clip(0, 255).astype(np.uint8)


def grid(images: Pixels, scale: int, columns: int | None = None) -> Pixels:
    """Return images (N, H, W, 3) tiled in a grid, about square unless ``columns`` is given, each pixel enlarged ``scale`` times."""
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * columns, height, width, 3), 255, np.uint8)
    sheet[:n] = images
    page = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    return page.repeat(scale, axis=0).repeat(scale, axis=1)


def encode_png(image: Pixels, text: Sequence[tuple[str, str]] = (), *, generated: bool = False) -> bytes:
    """Return a PNG of (H, W, 3); ``generated`` adds the machine-readable XMP mark of AI origin."""
    info = PngImagePlugin.PngInfo()
    for key, value in text:
        info.add_text(key, value)
    if generated:
        info.add_itxt("XML:com.adobe.xmp", _xmp())
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _xmp() -> str:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f"<Iptc4xmpExt:DigitalSourceType>{AI_ORIGIN}</Iptc4xmpExt:DigitalSourceType>"
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    )
