"""Decode images to pixels and encode them as PNG; the only module of the server that uses Pillow.

An image of any size becomes height x width pixels as the input contract says (contract.py); before that, transparent pixels are
composited on white, 16 bits are scaled to 8, and EXIF rotation is applied; of an animation the first frame is used.
``decode`` is for images of one's own; a server judges a header first and calls ``decode_judged`` in a process with limits.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ebjdat_serve import opencv_filters
from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.header import Bytes, Header, Limits
from ebjdat_serve.decoding.judge import judge
from ebjdat_serve.errors import InvalidImage

OWN = Limits(max_pixels=50_000_000, max_memory=2**30)
"""For images of one's own."""
Pixels = NDArray[np.uint8]

PLUGINS = {"PNG": "Png", "JPEG": "Jpeg", "WEBP": "WebP", "GIF": "Gif", "BMP": "Bmp", "TIFF": "Tiff", "AVIF": "Avif"}
"""Pillow's plugins, all of them in its wheels."""
FILTERS = {
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
STRIP_PIXELS = 2**18
"""Pixels that are converted at a time."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by EXIF orientation."""
SIDEWAYS = {Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90}

AI_ORIGIN = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's digital source type of media made by a trained model, for tools that read provenance."""


def decode(data: Bytes, contract: Input, limits: Limits = OWN) -> Pixels:
    """Return the image in ``data`` as (height, width, 3) uint8, as ``contract`` says, decoded in this process.

    Raises InvalidImage: empty, larger than the limits, of a format that is not read, truncated or damaged.
    """
    header = judge(data, contract, limits)
    return decode_judged(bytes(data), header, contract, header.scale(contract, limits))


def upright_size(data: Bytes) -> tuple[int, int]:
    """Return the (height, width) of the image in ``data``, EXIF rotation applied, without its pixels. Raises InvalidImage."""
    header = judge(data, Input(1, 1), OWN)
    image = _open(bytes(data), header)
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # an image with broken EXIF is still an image
        turned = False
    return image.size if turned else (image.height, image.width)


def _open(data: bytes, header: Header) -> Image.Image:
    """Return the image in ``data``, whose header was judged, without its pixels. Raises InvalidImage."""
    with _hostile():
        picture = Image.open(io.BytesIO(data), formats=(register(header.format),))
    if picture.width * picture.height > header.pixels:
        raise InvalidImage(f"the {header.format} is damaged: it promises {header.width} x {header.height} pixels and has more")
    return picture


def decode_judged(data: bytes, header: Header, contract: Input, scale: int = 1) -> Pixels:
    """Return the image in ``data``, whose header was judged, as (height, width, 3) uint8; a JPEG at 1/``scale`` of its size.

    Raises InvalidImage: truncated or damaged, not what its header promises.
    """
    return load(_open(data, header), contract, scale)


def register(kind: str) -> str:
    """Return Pillow's name of a format, whose plugin is loaded and starts no threads."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if kind == "HEIC":
        import pillow_heif  # the extra [heic]

        pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
        return "HEIF"
    import_module(f"PIL.{PLUGINS[kind]}ImagePlugin")
    return kind


def load(picture: Image.Image, contract: Input, scale: int = 1) -> Pixels:
    """Return an open image as (height, width, 3) uint8; a JPEG at 1/``scale`` of its size. Raises InvalidImage."""
    with _hostile(), picture:
        if scale > 1:
            return _load_draft(picture, contract.height, contract.width, scale)
        tiles = getattr(picture, "tile", [])
        stored = str(tiles[0].args) if picture.format == "PNG" and tiles else ""
        frame = tiles[0].extents if picture.format == "GIF" and tiles else None
        picture.load()
        vars(picture).pop("_decoder", None)  # WebP's and AVIF's, with canvases of its own
        _scale_transparent(picture, stored)
        if frame is not None and frame != (0, 0, *picture.size):
            picture = _on_white(picture, frame)
        return np.asarray(_fit(_upright(picture, _turn(picture)), contract))


def _fit(upright: Image.Image, contract: Input) -> Image.Image:
    """Return an upright image in RGB resized, compressed and cropped as ``contract`` says."""
    resized = contract.resized(upright.height, upright.width)[::-1]
    if upright.size == resized:
        image = upright
    elif contract.filter in FILTERS:
        image = upright.resize(resized, FILTERS[contract.filter])
    else:
        image = Image.fromarray(opencv_filters.resize(np.asarray(upright), resized[1], resized[0], contract.filter))
    if contract.jpeg_quality:
        image = _compressed(image, contract.jpeg_quality)
    if image.size == (contract.width, contract.height):
        return image
    left, top = contract.offset(image.width, contract.width), contract.offset(image.height, contract.height)
    cropped = Image.new("RGB", (contract.width, contract.height), contract.pad_colour)
    cropped.paste(image, (-left, -top))
    return cropped


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    """Return an image after a JPEG round trip."""
    file = io.BytesIO()
    image.save(file, register("JPEG"), quality=quality)
    again = Image.open(file, formats=("JPEG",))
    again.load()
    return again


def _scale_transparent(picture: Image.Image, stored: str) -> None:
    """Have the level that a PNG names as transparent be one of the loaded image; in the file it has the bits of ``stored`` samples, or 8.

    Of what the file has, 16 bits, the lowest count. Pillow does so itself for samples of 1 bit; those of 16 bits are compared as they are.
    """
    named = picture.info.get("transparency")
    if not stored or named is None or picture.mode not in ("L", "RGB"):
        return
    most = 2 ** {"L;2": 2, "L;4": 4}.get(stored, 8) - 1
    picture.info["transparency"] = tuple(level & most for level in named) if isinstance(named, tuple) else (named & most) * (255 // most)


def _on_white(picture: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """Return a loaded GIF whose first frame is a part of its screen, on white, in strips: Pillow fills the rest with the first colour."""
    screen = Image.new("RGB", picture.size, "white")
    left, above, right, below = frame
    step = max(1, STRIP_PIXELS // max(1, right - left))
    for top in range(above, below, step):
        screen.paste(_rgb(picture.crop((left, top, right, min(top + step, below)))), (left, top))
    return screen


def _upright(picture: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """Return a loaded image as RGB and upright; in strips, so that no third of its size is made."""
    if turn is None and picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    columns, rows = picture.size[::-1] if turn in SIDEWAYS else picture.size
    step = max(1, STRIP_PIXELS // columns)
    to_rgb = _deep_to_rgb(picture) if picture.mode in ("I", "F") or picture.mode.startswith("I;16") else _rgb
    if step >= rows:
        return to_rgb(picture if turn is None else picture.transpose(turn))
    upright = Image.new("RGB", (columns, rows))
    for top in range(0, rows, step):
        box = _stored(turn, columns, rows, top, min(top + step, rows))
        strip = picture.crop(box)
        upright.paste(to_rgb(strip if turn is None else strip.transpose(turn)), (0, top))
    return upright


def _load_draft(picture: Image.Image, height: int, width: int, scale: int) -> Pixels:
    """Return a JPEG that is decoded at 1/``scale`` of its size, squashed by exact area.

    At this size each of the result's pixels is made of few, and BOX, which takes a pixel whole or not at all, would be off by
    as much as 13 of 255 from what it makes of the full size; exact areas are off by 2.
    """
    wide, high = picture.width / scale, picture.height / scale  # a last block that is not full counts for what it holds
    picture.draft(None, (picture.width // scale, picture.height // scale))
    picture.load()
    turn = _turn(picture)
    if turn in SIDEWAYS:
        height, width = width, height
    rows = np.empty((height, picture.width, 3), np.float32)
    for row, (first, weights) in enumerate(_shares(high, height, picture.height)):
        strip = _rgb(picture.crop((0, first, picture.width, first + len(weights))))
        rows[row] = np.tensordot(weights, np.asarray(strip, np.float32), 1)
    squashed = np.empty((height, width, 3), np.float32)
    for column, (first, weights) in enumerate(_shares(wide, width, picture.width)):
        squashed[:, column] = np.tensordot(rows[:, first : first + len(weights)], weights, ((1,), (0,)))
    small = Image.fromarray(np.rint(squashed).clip(0, 255).astype(np.uint8))
    return np.asarray(small if turn is None else small.transpose(turn))


def _shares(extent: float, n: int, limit: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Give, for each of ``n`` equal parts of a line of ``extent`` pixels, the first pixel in it and what share of it each one has."""
    for part in range(n):
        start, end = part * extent / n, (part + 1) * extent / n
        first, last = int(start), min(math.ceil(end), limit)
        place = np.arange(first, last)
        covered = np.minimum(place + 1, end) - np.maximum(place, start)
        yield first, (covered / covered.sum()).astype(np.float32)


@contextmanager
def _hostile() -> Iterator[None]:
    """Turn any exception that Pillow raises on hostile bytes into InvalidImage."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise InvalidImage("the image has more pixels than its header promises; save it anew") from error
    except UnidentifiedImageError as error:
        raise InvalidImage("the image is truncated or damaged, or a rare variant of its format; save it anew, as a PNG or JPEG") from error
    except MemoryError as error:
        raise InvalidImage("the image takes more memory to decode than its header promises; save it anew") from error
    except Exception as error:  # Pillow's decoders raise arbitrary exceptions; none may pass this line
        raise InvalidImage(f"the image is truncated or damaged ({type(error).__name__})") from error


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Return what turns a loaded image upright, by its EXIF orientation."""
    try:
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
        if turn is not None:
            ImageOps.exif_transpose(picture.crop((0, 0, 1, 1)))  # edits the EXIF too: an image whose EXIF cannot be edited stays as it is
        return turn
    except Exception:  # an image with broken EXIF is still an image
        return None


def _stored(turn: Image.Transpose | None, columns: int, rows: int, top: int, bottom: int) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) in the stored image of the rows from ``top`` to ``bottom`` of the upright one."""
    match turn:
        case Image.Transpose.ROTATE_180 | Image.Transpose.FLIP_TOP_BOTTOM:
            return 0, rows - bottom, columns, rows - top
        case Image.Transpose.TRANSPOSE | Image.Transpose.ROTATE_90:
            return (top, 0, bottom, columns) if turn == Image.Transpose.TRANSPOSE else (rows - bottom, 0, rows - top, columns)
        case Image.Transpose.TRANSVERSE | Image.Transpose.ROTATE_270:
            return (rows - bottom, 0, rows - top, columns) if turn == Image.Transpose.TRANSVERSE else (top, 0, bottom, columns)
    return 0, top, columns, bottom


def _deep_to_rgb(picture: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return what makes RGB of parts of a grey image of more than 8 bits: its 8 highest, white where it is transparent.

    Pillow leaves samples of TIFFs as they are stored: of 12 bits, and 0 for white where the file says so.
    """
    tags = getattr(picture, "tag_v2", {})
    bits = 12 if tags.get(ExifTags.Base.BitsPerSample) in (12, (12,)) else 16
    inverted = picture.format == "TIFF" and tags.get(ExifTags.Base.PhotometricInterpretation, 0) == 0
    transparent = picture.info.get("transparency")

    def to_rgb(part: Image.Image) -> Image.Image:
        levels = np.asarray(part)
        grey = (levels >> bits - 8).clip(0, 255).astype(np.uint8)
        if inverted:
            grey = 255 - grey
        if transparent is not None:
            grey[levels == transparent] = 255
        return Image.fromarray(grey).convert("RGB")

    return to_rgb


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def to_unit(image: Pixels) -> NDArray[np.float32]:
    """Return (N, H, W, 3) uint8 as (N, 3, H, W) float32 in [0,1]."""
    n, height, width, channels = image.shape
    unit = np.empty((n, channels, height, width), np.float32)
    return np.divide(image.transpose(0, 3, 1, 2), np.float32(255), out=unit)


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
