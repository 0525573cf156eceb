"""Which format some bytes are, and the verdict on their header."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

from ebjdat_serve.contract import Input
from ebjdat_serve.decoding import bmff, bmp, gif, jpeg, png, tiff, webp
from ebjdat_serve.decoding.header import Bytes, Header, Limits, Steps
from ebjdat_serve.errors import InvalidImage

T = TypeVar("T")
HUFFMAN, RAW_BYTES, FREE_BYTES, BYTE_WORK = ("PNG", "TIFF", "WEBP"), 4, 2**16, 9
"""Formats whose bytes may be nothing but tables of Huffman codes, each byte of which takes as long as nine pixels; bytes of a pixel without
compression, and of metadata: what a file has beyond them can hold no pixels."""
JUDGES: dict[str, Callable[[Bytes, Limits, Steps], Header]] = {
    "PNG": png.judge_png,
    "JPEG": jpeg.judge_jpeg,
    "WEBP": webp.judge_webp,
    "GIF": gif.judge_gif,
    "BMP": bmp.judge_bmp,
    "TIFF": tiff.judge_tiff,
    "AVIF": bmff.judge_bmff,
    "HEIC": bmff.judge_bmff,
}
NEVER_SURE = {"AVIF", "HEIC"}
"""Formats whose decoders can be given more pixels than any header promises."""
STEPS_OF_ANY = 8
"""Steps that the shortest header takes."""
STRANGERS = {
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xml": "XML or an SVG",
    b"<!DOCTYPE": "HTML",
    b"<html": "HTML",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "a Photoshop file",
    b"\0\0\1\0": "an icon",
    b"qoif": "QOI",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "gzip",
    b"data:": "a data: URL; send its bytes, or JSON",
    b"iVBORw0KGgo": "base64 of a PNG; send its bytes, or JSON",
    b"/9j/": "base64 of a JPEG; send its bytes, or JSON",
    b"{": "JSON",
}
"""What else arrives, by how it begins."""


def judge(data: Bytes, contract: Input, limits: Limits, steps: Steps | None = None) -> Header:
    """Return what the image in ``data`` promises, if that is within the limits for a decode for ``contract``, whose work it counts.

    Raises InvalidImage: what arrived, and the limit or the fix; TooLong: that takes more than ``steps``. Takes about 1 ms per MiB at the
    most.
    """
    steps = steps or Steps()
    steps.take(STEPS_OF_ANY)
    header = JUDGES[judge_kind(data, limits)](data, limits, steps)
    more = header.check(contract, limits).work
    if (beyond := len(data) - RAW_BYTES * header.pixels - FREE_BYTES) > 0 and header.format in HUFFMAN:
        more += BYTE_WORK * beyond
    return header._replace(extra_work=header.extra_work + more) if more else header


def judge_kind(data: Bytes, limits: Limits) -> str:
    """Return the format of ``data``, by its first bytes. Raises InvalidImage: not one that is read here, or too long."""
    if not data:
        raise InvalidImage("the image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise InvalidImage(f"the image has {len(data)} bytes; the limit is {limits.max_bytes}", too_large=True)
    kind = format_of(data)
    if kind == "HEIC" and not reads_heic():
        raise InvalidImage(
            "the image is a HEIC, which this server reads only with its extra: pip install 'ebjdat-serve[heic]'; or send a JPEG"
        )
    if kind not in JUDGES:
        raise InvalidImage(f"not an image this server reads{f': it is {kind}' if kind else ''}; send {', '.join(accepted())}")
    return kind


def each(images: Sequence[Bytes], verdict: Callable[[Bytes], T]) -> Iterator[T]:
    """Yield a verdict on each image of one request. Raises InvalidImage, with the index of the first that is refused."""
    for index, data in enumerate(images):
        try:
            yield verdict(data)
        except InvalidImage as error:
            error.index = index
            raise


def judge_all(images: Sequence[Bytes], contract: Input, limits: Limits) -> tuple[Header, ...]:
    """Return the headers of the images of one request. Raises InvalidImage, with the index of the first that is refused."""
    headers = tuple(each(images, lambda data: judge(data, contract, limits)))
    check_list(headers, contract, limits)
    return headers


def check_list(headers: Sequence[Header], contract: Input, limits: Limits) -> None:
    """Raise InvalidImage for the images of one request if they have more pixels together than one may have, as sent or as decoded."""
    if len(headers) > 1:
        total, said = sum(one.pixels for one in headers), "have {} pixels"
        if total <= limits.max_pixels:
            total, said = len(headers) * contract.height * contract.width, "have {} pixels at the size of the model"
        if total > limits.max_pixels:
            said = f"the images of one list {said.format(total)}; the limit is {limits.max_pixels} in all: send them one by one"
            raise InvalidImage(said, too_large=True)


def format_of(data: Bytes) -> str:
    """Return the format that the first bytes announce, as Pillow names it; else in words what they are; else nothing."""
    head = bytes(data[:16])
    if head.startswith(png.SIGNATURE):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"BM"):
        return "BMP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head[4:8] == b"ftyp":
        return _boxed(data)
    return next((name for start, name in STRANGERS.items() if bytes(data[:64]).lstrip().startswith(start)), "")


def _boxed(data: Bytes) -> str:
    names = bmff.brands(data)
    if names & bmff.AVIF:
        return "AVIF"
    if names & (bmff.HEIC | bmff.CONTAINERS):
        return "HEIC"
    return "a video" if names else ""


def accepted() -> tuple[str, ...]:
    """Return the formats that are read here."""
    return tuple(name for name in JUDGES if name != "HEIC" or reads_heic())


@cache
def reads_heic() -> bool:
    """Return whether the package that reads HEIC is installed."""
    return find_spec("pillow_heif") is not None
