"""Request bodies to pixels, in the HTTP process and before any queue: what is invalid never reaches a worker."""

import asyncio
import base64
import binascii
import contextlib
import gc
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from ebjdat_serve.bundle import Input
from ebjdat_serve.errors import InvalidImage
from ebjdat_serve.pixels import MAX_BYTES, MAX_PIXELS, Pixels, load, peek
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.settings import Settings

RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # the last is curl --data-binary's own
ACCEPTED = "an image body, multipart/form-data with a field image, or application/json with image or images (base64)"
DRAIN_FACTOR = 5
"""Multiples of the limit of a body that are read on, without keeping them, before the connection is closed."""
INLINE_PIXELS, INLINE_BYTES = 2**16, 2**18
"""Pixels and bytes of a request that are decoded in the event loop: this takes milliseconds, tens of them for hostile bytes."""
SMALL_BODY = 2**20
"""Bytes of a body that is read even when the memory for bodies is full."""


class BodyMemory:
    """Bytes of bodies in memory."""

    used = 0


@contextlib.asynccontextmanager
async def read_upload(request: Request, settings: Settings) -> AsyncIterator[tuple[str, bytes | bytearray]]:
    """Give (content type, body) of a request that sends images.

    Raises Problem: 408 too slow, 413 too large, 415 another content type, 503 when the memory for bodies is full.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Problem(415, f"content encoding {encoding[:40]!r} is not accepted; send the body as it is")
    if not (kind in RAW_TYPES or kind.startswith("image/") or kind in ("multipart/form-data", "application/json")):
        raise Problem(415, f"content type {kind!r} is not accepted; send {ACCEPTED}")
    async with read_body(request, settings.max_body, settings) as body:
        yield kind, body


async def decode_upload(
    request: Request, upload: tuple[str, bytes | bytearray], contract: Input, settings: Settings, pool: ThreadPoolExecutor
) -> tuple[Pixels, bool]:
    """Return (pixels (n, H, W, 3), whether a list was sent).

    Raises Problem: 400 not JSON or no form, 413 too large, 422 not an image (with its index in a list).
    """
    kind, body = upload
    if kind == "application/json":
        images, listed = from_json(body, settings.max_images)
    elif kind == "multipart/form-data":
        images, listed = [await from_form(request, body)], False
    else:
        images, listed = [bytes(body)], False
    run = asyncio.get_running_loop().run_in_executor
    small = sum(map(len, images)) <= INLINE_BYTES
    # to hand a small one to another thread would take longer
    opened = [attempt(peek, one) for one in images] if small else [await run(pool, attempt, peek, one) for one in images]
    for index, one in enumerate(opened):
        refuse_invalid(one, index if listed else None)
    total = sum(one.width * one.height for one in opened)
    if listed and total > MAX_PIXELS:
        raise Problem(413, f"the images of one list may have {MAX_PIXELS} pixels in all, these have {total}; send them one by one")
    if small and total <= INLINE_PIXELS:
        decoded = [attempt(load, one, contract.height, contract.width) for one in opened]
    else:
        decoded = await asyncio.gather(*(run(pool, attempt, load, one, contract.height, contract.width) for one in opened))
    for index, one in enumerate(decoded):
        refuse_invalid(one, index if listed else None)
    return np.stack(decoded), listed


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``function`` returns, or the InvalidImage it raises."""
    try:
        return function(*arguments)
    except InvalidImage as error:
        return error


def refuse_invalid(error: Any, index: int | None) -> None:
    """Raise the Problem for an image that could not be decoded, if it is one, naming its place in the list."""
    if not isinstance(error, InvalidImage):
        return
    text = str(error)
    status = 413 if "limit is" in text and index is None else 422
    if index is None:
        raise Problem(status, text)
    raise Problem(422, f"images[{index}]: {text}; nothing was computed", index=index)


@contextlib.asynccontextmanager
async def read_body(request: Request, limit: int, settings: Settings) -> AsyncIterator[bytes | bytearray]:
    """Give the body; beyond ``limit`` bytes it is read on without keeping it, so that the client gets its 413 and no reset.

    Raises Problem: 408 when the body does not arrive in time, 413 when it is too large, 503 when the memory for bodies is full.
    """
    s = settings
    held = bytearray()  # one block: a list of chunks would fragment the memory
    size = kept = 0
    began = time.monotonic()
    slow = Problem(408, f"the body did not arrive within {s.body_timeout:g} s, or came too slowly", headers={"Connection": "close"})
    try:
        try:
            async with asyncio.timeout(s.body_timeout):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limit:
                        held += chunk
                        kept += len(chunk)
                        BodyMemory.used += len(chunk)
                        if BodyMemory.used > s.upload_memory and kept > SMALL_BODY:
                            raise Problem(503, "too many bytes are being uploaded; try again in a second", headers={"Retry-After": "1"})
                    elif size > DRAIN_FACTOR * limit:
                        break
                    else:
                        held.clear()
                        BodyMemory.used -= kept
                        kept = 0
                    if size < s.min_upload_rate * (time.monotonic() - began - s.upload_grace):
                        raise slow
        except TimeoutError:
            raise slow from None
        except ClientDisconnect:
            raise Problem(499, "the client closed the connection") from None
        if size > limit:
            image = f"an image may have {MAX_BYTES} bytes and {MAX_PIXELS} pixels"
            raise Problem(413, f"the body is larger than the limit of {limit} bytes; {image}")
        yield held
    finally:
        BodyMemory.used -= kept
        if size > SMALL_BODY:
            # the error for a refused body refers to it in a cycle, which would be collected only after thousands more
            asyncio.get_running_loop().call_later(0.1, gc.collect)


def from_json(body: bytes | bytearray, max_images: int) -> tuple[list[bytes], bool]:
    """Return (encoded images, whether they came as a list) from {"image": base64} or {"images": [base64, ...]}."""
    if body.count(b"[") + body.count(b"{") > 2 or body.count(b",") > 2 * max_images:
        # before parsing: millions of empty lists would hold the whole process for seconds
        raise Problem(422, f'send {{"image": "<base64>"}} or {{"images": [...]}} with 1 to {max_images} base64 strings, and nothing nested')
    document = parse_json(body)
    if not isinstance(document, dict) or len(document) != 1 or next(iter(document)) not in ("image", "images"):
        raise Problem(422, 'send {"image": "<base64>"} or {"images": ["<base64>", ...]}, and no other key')
    if "image" in document:
        return [from_base64(document["image"], None)], False
    items = document["images"]
    if not isinstance(items, list) or not 1 <= len(items) <= max_images:
        raise Problem(422, f"images must be a list of 1 to {max_images} base64 strings")
    return [from_base64(item, index) for index, item in enumerate(items)], True


def parse_json(body: bytes | bytearray) -> Any:
    """Return the JSON document; NaN and Infinity are not JSON. Raises Problem 400."""

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not valid JSON: {error}") from None


def from_base64(value: Any, index: int | None) -> bytes:
    """Return the bytes of a base64 string, with or without a data: prefix. Raises Problem 422 with its index."""
    place = "image" if index is None else f"images[{index}]"
    extra: dict[str, Any] = {} if index is None else {"index": index}
    if not isinstance(value, str):
        raise Problem(422, f"{place} must be a base64 string, not {type(value).__name__}", **extra)
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Problem(422, f"{place} is not base64 of the standard alphabet, with padding", **extra) from None


async def from_form(request: Request, body: bytes | bytearray) -> bytes:
    """Return the file of the field ``image`` in a multipart body. Raises Problem 422 or 400."""

    async def once() -> AsyncGenerator[bytes, None]:
        yield bytes(body)

    try:
        form = await MultiPartParser(request.headers, once(), max_files=2, max_fields=2, max_part_size=MAX_BYTES + 1).parse()
    except (MultiPartException, ValueError, KeyError) as error:
        raise Problem(400, f"the body is not valid multipart/form-data: {error}") from None
    if [name for name, _ in form.multi_items()] != ["image"]:
        raise Problem(422, "send exactly one form field, image: curl -F image=@cat.png")
    value = form["image"]
    if isinstance(value, str):
        raise Problem(422, "the form field image holds text; send a file: curl -F image=@cat.png")
    return await value.read()
