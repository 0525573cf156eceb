"""Bodies of inference requests of the Open Inference Protocol v2: compressed or not, binary or JSON, files or arrays of pixels.

An array becomes an uncompressed TIFF, by a header before its bytes: so the decoders, with their limits, deadlines and fairness, resize
it by the model's input contract as they do any image.
"""

import asyncio
import contextlib
import struct
import zlib
from collections.abc import AsyncIterator, Callable

from fastapi import Request

from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.bodies import BodyMemory, drop, read_body, refuse_large
from ebjdat_serve.server.read.uploads import Upload
from ebjdat_serve.server.read.v2_json import Place, few_numbers, files, numbers, take_out
from ebjdat_serve.server.read.v2_request import infer_request
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.v2_protocol import BYTES, HEADER_LENGTH, INPUT, InferRequest

SLICE = 2**18
"""Bytes that are copied before the event loop has its turn."""
INFLATED = 2**16
"""Bytes that are inflated, or given to be, before it has."""
WINDOWS = {"gzip": 31, "deflate": 15}
"""zlib's window bits of the content encodings."""


@contextlib.asynccontextmanager
async def open_infer(request: Request, settings: Settings) -> AsyncIterator[Upload]:
    """Give the body of a request, inflated, and drop it and its images in the end.

    Raises Problem: 400 damaged, 408 too slow, 413 too large, 415 another content encoding, 503 when the memory for bodies is full.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in WINDOWS:
        raise Problem(415, f"content encoding {encoding[:40]!r} is not accepted; send gzip, deflate or the body as it is")
    memory = BodyMemory(settings.upload_memory, request.scope["client_name"])
    async with read_body(request, settings.max_body, settings, memory) as body:
        upload = Upload("v2", body, memory)
        try:
            if encoding in WINDOWS:
                upload.body = bytearray()
                await inflate(body, upload.body, WINDOWS[encoding], settings, memory)
            yield upload
        finally:
            await drop(upload.body, *upload.images)  # now, while they are counted: others still refer to them


async def inflate(body: bytearray, inflated: bytearray, window: int, settings: Settings, memory: BodyMemory) -> None:
    """Add what ``body`` holds to ``inflated``, in slices, and drop it. Raises Problem 400 damaged, 413 too large."""
    inflater, at, rest = zlib.decompressobj(window), 0, b""
    while not inflater.eof:
        given = rest or bytes(body[at : at + INFLATED])
        at += 0 if rest else len(given)
        try:
            piece = inflater.decompress(given, INFLATED)
        except zlib.error as error:
            raise Problem(400, f"the body is not of its content encoding: {error}") from None
        if not given and not piece:
            raise Problem(400, "the body ends within its content encoding")
        refuse_large(len(inflated) + len(piece), settings.max_body, settings)
        memory.hold(len(piece))
        inflated += piece
        rest = inflater.unconsumed_tail
        await asyncio.sleep(0)
    if inflater.unused_data or at < len(body):
        raise Problem(400, "the body goes on after the end of its content encoding")
    memory.hold(-len(body))
    await drop(body)


class InferBody:
    """Reads the images of one request, and keeps what it asks in ``asked``; ``check`` may refuse that before any image is decoded."""

    def __init__(self, check: Callable[[InferRequest], object]) -> None:
        self._check = check
        self.asked: InferRequest

    async def images(self, request: Request, upload: Upload, settings: Settings) -> tuple[list[bytearray], bool]:
        """Return (encoded images, that they came as a list), which are the upload's. Raises Problem 400 or 422."""
        body, memory = upload.body, upload.memory
        end = json_length(request, len(body))
        document, places = await take_out(body, end, settings.max_images)
        asked = self.asked = infer_request(document, len(body) - end, settings)
        self._check(asked)
        if asked.datatype == BYTES:
            if asked.data is None:
                await copy_elements(upload, end, asked)
            else:
                upload.images += await files(body, asked, places, memory.hold)
        else:
            pixels, start = body, end
            if asked.data is not None:
                pixels, start = await pixels_of(body, asked, places, memory.hold), 0
            await copy_arrays(upload, pixels, start, asked)
        memory.hold(-len(body))
        await drop(body)
        return upload.images, True


def json_length(request: Request, size: int) -> int:
    """Return how many bytes of a body are JSON. Raises Problem 400."""
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return size
    if not (text.isascii() and text.isdigit() and len(text) < 12 and 0 < int(text) <= size):
        raise Problem(400, f"{HEADER_LENGTH} must be a whole number from 1 to the {size} bytes of the body, not {text[:20]!r}")
    return int(text)


async def pixels_of(body: bytearray, asked: InferRequest, places: dict[str, Place], hold: Callable[[int], None]) -> bytearray:
    """Return the elements of an array in JSON. Raises Problem 400."""
    if isinstance(asked.data, str) and asked.data in places:
        return await numbers(body, places[asked.data], asked.elements, hold)
    found = few_numbers(asked.data, asked.shape)
    hold(len(found))
    return found


async def copy_elements(upload: Upload, at: int, asked: InferRequest) -> None:
    """Add the elements that follow the JSON, each after its length, to the upload's images. Raises Problem 400."""
    end = len(upload.body)
    for index in range(asked.n):
        size = int.from_bytes(upload.body[at : at + 4], "little")
        if at + 4 + size > end:
            raise Problem(400, f"element {index} of {INPUT} goes beyond the end of the body")
        upload.images.append(bytearray())
        await copy(upload, upload.body, at + 4, at + 4 + size)
        at += 4 + size
    if at != end:
        raise Problem(400, f"{INPUT} has {asked.n} elements by its shape, and {end - at} bytes follow them")


async def copy_arrays(upload: Upload, pixels: bytearray, at: int, asked: InferRequest) -> None:
    """Add each (H, W, 3) of an array to the upload's images, as a TIFF."""
    _, height, width, _ = asked.shape
    header, size = tiff_header(height, width), 3 * height * width
    upload.made = len(header)
    for start in range(at, at + asked.n * size, size):
        upload.memory.hold(len(header))
        upload.images.append(bytearray(header))
        await copy(upload, pixels, start, start + size)


async def copy(upload: Upload, source: bytearray, start: int, end: int) -> None:
    """Add some bytes to the upload's last image."""
    upload.memory.hold(end - start)
    for at in range(start, end, SLICE):
        upload.images[-1] += source[at : min(end, at + SLICE)]
        await asyncio.sleep(0)


def tiff_header(height: int, width: int) -> bytes:
    """Return what makes a TIFF of the RGB pixels that follow it, row by row: their file without their bytes."""
    short, long = 3, 4
    tags: list[tuple[int, int, int, int]] = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, 3, 0),  # bits per sample: where they are
        (259, short, 1, 1),  # no compression
        (262, short, 1, 2),  # RGB
        (273, long, 1, 0),  # where the only strip is
        (277, short, 1, 3),  # samples per pixel
        (278, long, 1, height),  # rows of a strip
        (279, long, 1, 3 * height * width),  # its bytes
    ]
    bits = 8 + 2 + 12 * len(tags) + 4
    places = {258: bits, 273: bits + 6}
    directory = b"".join(struct.pack("<HHII", tag, kind, n, places.get(tag, value)) for tag, kind, n, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + struct.pack("<I3H", 0, 8, 8, 8)
