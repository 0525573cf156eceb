"""Encoded images in request bodies: as they are, in a form, or in JSON as base64. What grows with a body is parsed in slices.

The event loop has its turns between the slices; docs/security.md has how long they take.
"""

import asyncio
import base64
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.bodies import BodyMemory, drop, parse_json, read_body
from ebjdat_serve.server.settings import Settings

RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # the last is curl --data-binary's own
ACCEPTED = "an image body, multipart/form-data with a field image, or application/json with image or images (base64)"
SMALL_DOCUMENT = 2**16
"""Bytes of a JSON body that is parsed at once, in about a millisecond."""
SLICE = 2**16
"""Bytes of base64 that are decoded before the event loop has its turn."""
SEARCHED = 2**21
"""Bytes that are searched for a quote before the event loop has its turn."""
FORM_SLICE = 2**13
"""Bytes of a form, which is parsed in Python, before the event loop has its turn."""
WHITE_SPACE = b" \t\r\n\f\v"
FORM_TYPE = 2**10
"""Characters of the content type of a form, whose parameters are parsed at once."""


@dataclass
class Upload:
    """A request that sends images: its content type without parameters, its body, and what it holds of the memory for bodies.

    ``images`` are those found in a form or in JSON; ``made`` bytes at the beginning of each were not sent.
    """

    kind: str
    body: bytearray
    memory: BodyMemory
    images: list[bytearray] = field(default_factory=list)
    made: int = 0


@dataclass(frozen=True)
class ImageBody:
    """How a body is opened, and how images are read from it: (encoded images, whether they came as a list)."""

    open: Callable[[Request, Settings], contextlib.AbstractAsyncContextManager[Upload]]
    images: Callable[[Request, Upload, Settings], Awaitable[tuple[list[bytearray], bool]]]


@contextlib.asynccontextmanager
async def read_upload(request: Request, settings: Settings) -> AsyncIterator[Upload]:
    """Give the upload of a request that sends images, and drop it and its images in the end.

    Raises Problem: 408 too slow, 413 too large, 415 another content type, 503 when the memory for bodies is full.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Problem(415, f"content encoding {encoding[:40]!r} is not accepted; send the body as it is")
    if not (kind in RAW_TYPES or kind.startswith("image/") or kind in ("multipart/form-data", "application/json")):
        raise Problem(415, f"content type {kind[:100]!r} is not accepted; send {ACCEPTED}")
    memory = BodyMemory(settings.upload_memory, request.scope["client_name"])
    async with read_body(request, settings.max_body, settings, memory) as body:
        upload = Upload(kind, body, memory)
        try:
            yield upload
        finally:
            await drop(*upload.images)  # now, while they are counted: others still refer to them


async def encoded_images(request: Request, upload: Upload, settings: Settings) -> tuple[list[bytearray], bool]:
    """Return (encoded images, whether they came as a list), which are the upload's; the event loop has its turns meanwhile.

    Nothing large is copied at once: to touch 16 MiB of new memory takes tens of milliseconds.
    Raises Problem: 400 not JSON or no form, 422 without images.
    """
    if upload.kind == "application/json":
        listed = await from_json(upload, settings.max_images)
    elif upload.kind == "multipart/form-data":
        listed = await from_form(request, upload)
    else:
        return [upload.body], False
    upload.memory.hold(-len(upload.body))
    await drop(upload.body)
    return upload.images, listed


async def from_json(upload: Upload, max_images: int) -> bool:
    """Add the images of {"image": base64} or {"images": [base64, ...]} to the upload's, and return whether they came as a list.

    Of a large document what is around its strings is parsed as one, and the strings are decoded in slices.
    """
    shape = f'send {{"image": "<base64>"}} or {{"images": [...]}} with 1 to {max_images} base64 strings, and nothing nested'
    body = upload.body
    outline, places = (body, {}) if len(body) <= SMALL_DOCUMENT else await take_out_strings(body, max_images, shape)
    value = find_images(outline, max_images, shape)
    listed = isinstance(value, list)
    unseen = 0  # bytes parsed since the event loop had its turn
    for index, item in enumerate(value if listed else [value]):
        decoder = Base64Decoder(item, index if listed else None)
        upload.images.append(decoder.decoded)
        for text in string_slices(body, *places[item]) if item in places else [item]:
            decoder.feed(text)
            upload.memory.hold(decoder.new)
            unseen += len(text)
            if unseen >= SLICE:
                unseen = 0
                await asyncio.sleep(0)
        decoder.finish()
    return listed


async def take_out_strings(body: bytearray, max_images: int, shape: str) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return a JSON document with a name in place of each long string, and where the string of each name begins and ends.

    Raises Problem 422 for more than SMALL_DOCUMENT around all strings, for more of them, or for a quote within one.
    """
    outline, places, at = bytearray(), dict[str, tuple[int, int]](), 0
    secret = secrets.token_hex(8)  # no document can hold such a name
    for _ in range(max_images + 2):  # one of them is the key, one is too many
        start = await find_quote(body, at)
        end = await find_quote(body, start + 1)
        if start < 0 or end < 0:
            break
        if len(outline) + start - at > SMALL_DOCUMENT or body[end - 1 : end] == b"\\":
            raise Problem(422, shape)
        name = f"{secret} {len(places)}"
        long = end - start > 2 * len(name)
        outline += body[at:start] + (f'"{name}"'.encode() if long else body[start : end + 1])
        if long:
            places[name] = (start + 1, end)
        at = end + 1
    if len(outline) + len(body) - at > SMALL_DOCUMENT:
        raise Problem(422, shape)
    return bytes(outline + body[at:]), places


async def find_quote(body: bytearray, at: int) -> int:
    """Return where the next quote is from a place on, -1 if there is none."""
    for start in range(at, len(body), SEARCHED):
        if (found := body.find(b'"', start, start + SEARCHED)) >= 0:
            return found
        await asyncio.sleep(0)
    return -1


def find_images(document: bytes | bytearray, max_images: int, shape: str) -> Any:
    """Return the value of image, or the list that is the value of images; raise Problem 400 or 422 where a document holds neither."""
    if document.count(b"[") + document.count(b"{") > 2 or document.count(b",") > 2 * max_images:
        raise Problem(422, shape)
    found = parse_json(document)
    if not isinstance(found, dict) or len(found) != 1 or next(iter(found)) not in ("image", "images"):
        raise Problem(422, 'send {"image": "<base64>"} or {"images": ["<base64>", ...]}, and no other key')
    if "image" in found:
        if isinstance(found["image"], list):
            raise Problem(422, "image must be a base64 string, not list")
        return found["image"]
    items = found["images"]
    if not isinstance(items, list) or not 1 <= len(items) <= max_images:
        raise Problem(422, f"images must be a list of 1 to {max_images} base64 strings")
    return items


def string_slices(body: bytearray, start: int, end: int) -> Iterator[str]:
    """Yield the text of the JSON string between two places of a document, in slices. Raises Problem 400."""
    while start < end:
        piece = body[start : min(start + SLICE, end)]
        if start + len(piece) < end and (escape := piece.rfind(b"\\", len(piece) - 6)) >= 0:
            del piece[escape:]  # an escape may go on in the next slice
        start += len(piece)
        try:
            yield json.loads(f'"{piece.decode()}"')
        except ValueError as error:
            raise Problem(400, f"the body is not valid JSON: {error}") from None


class Base64Decoder:
    """Decodes base64 of the standard alphabet, with padding, with or without a data: prefix; white space is skipped.

    Raises Problem 422, with the index of the image in a list.
    """

    def __init__(self, value: Any, index: int | None) -> None:
        self._place = "image" if index is None else f"images[{index}]"
        self._extra: dict[str, Any] = {} if index is None else {"index": index}
        if not isinstance(value, str):
            raise Problem(422, f"{self._place} must be a base64 string, not {type(value).__name__}", **self._extra)
        self.decoded, self._rest, self._begun, self._padded = bytearray(), b"", False, False
        self.new = 0  # bytes that the last text brought

    def feed(self, text: str) -> None:
        """Decode some more; the prefix must be whole in the first text."""
        if not self._begun and text.startswith("data:"):
            text = text.partition(",")[2]
        self._begun = True
        try:
            data = text.encode("ascii").translate(None, WHITE_SPACE)
            if data and self._padded:
                raise ValueError("base64 goes on after its padding")
            data = self._rest + data
            whole = len(data) - len(data) % 4
            decoded = base64.b64decode(data[:whole], validate=True)
        except ValueError:
            self._refuse()
        self._rest, self._padded = data[whole:], data[:whole].endswith(b"=")
        self.decoded += decoded
        self.new = len(decoded)

    def finish(self) -> None:
        """Refuse base64 that ends too early."""
        if self._rest:
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise Problem(422, f"{self._place} is not base64 of the standard alphabet, with padding", **self._extra) from None


class FormParser(MultiPartParser):
    """Starlette's parser, which would write a file above 1 MiB to a disk, and decode text by a codec that clients choose."""

    def __init__(self, boundary: bytes, stream: AsyncGenerator[bytes, None]) -> None:
        headers = Headers(raw=[(b"content-type", b'multipart/form-data; boundary="%b"' % boundary)])  # no charset: it is UTF-8
        super().__init__(headers, stream, max_files=2, max_fields=0)
        self.file = bytearray()

    def on_headers_finished(self) -> None:
        """Refuse text before any of it has come. Raises Problem 422."""
        try:
            super().on_headers_finished()
        except MultiPartException:
            if self._current_fields:
                raise Problem(422, "a form field holds text; send one file and nothing else: curl -F image=@cat.png") from None
            raise

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Keep what is a file's."""
        self.file += data[start:end]


def form_boundary(content_type: str) -> bytes:
    """Return the boundary of a form. Raises ValueError."""
    if len(content_type) > FORM_TYPE:
        raise ValueError(f"its content type has more than {FORM_TYPE} characters")
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary or b'"' in boundary or b"\\" in boundary:
        raise ValueError("its content type names no boundary, or one with quotes or backslashes")
    return boundary


async def from_form(request: Request, upload: Upload) -> bool:
    """Add the file of the field ``image`` in a multipart body to the upload's images; return False. Raises Problem 422 or 400."""
    body = upload.body
    upload.memory.hold(len(body))  # for the file

    async def slices() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), FORM_SLICE):
            yield bytes(body[start : start + FORM_SLICE])
            await asyncio.sleep(0)

    try:
        parser = FormParser(form_boundary(request.headers["content-type"]), slices())
        upload.images.append(parser.file)
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        raise Problem(400, f"the body is not valid multipart/form-data: {error}") from None
    await form.close()  # the files are empty
    if [name for name, _ in form.multi_items()] != ["image"]:
        raise Problem(422, "send exactly one form field, image: curl -F image=@cat.png")
    return False
