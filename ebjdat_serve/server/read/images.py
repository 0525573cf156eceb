"""Encoded images to pixels, for a request: by processes with limits, until its deadline or until its client has left."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np
from fastapi import Request

from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.header import Bytes, Limits
from ebjdat_serve.decoding.jobs import DecoderLost
from ebjdat_serve.decoding.pool import Decoders
from ebjdat_serve.decoding.pool_settings import LIGHT, PoolSettings
from ebjdat_serve.errors import EbjdatError, InvalidImage
from ebjdat_serve.pixels import Pixels
from ebjdat_serve.server.disconnects import on_disconnect
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.settings import Settings

SHARED = 384 * 2**20
"""Bytes that decoders of large images share where --decode-memory says nothing, and one of them may have of it."""
SLICE = 2**20
"""Bytes of images that are copied before the event loop has its turn."""


def limits(settings: Settings) -> Limits:
    """Return the limits of one image."""
    return Limits(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_pixels,
        max_memory=memory_of(settings) - LIGHT * (settings.decoders - 1),
        max_seconds=settings.decode_seconds,
        jpeg_draft=settings.jpeg_draft,
    )


def memory_of(settings: Settings) -> int:
    """Return the memory in bytes of the decoders of large images: by default what they share stays the same, however many there are."""
    return SHARED + LIGHT * settings.decoders if settings.decode_memory is None else settings.decode_memory


class ImageDecoder:
    """The decoders of a server, and the requests that they work for."""

    def __init__(self, settings: Settings) -> None:
        least, memory = LIGHT * settings.decoders, memory_of(settings)
        if memory < least:
            raise EbjdatError(f"serve --decode-memory must be at least {least} for {settings.decoders} decoders, not {memory}")
        self.limits = limits(settings)
        # each request ends its own decode at its deadline; this is for a zygote that does not hear of it
        pool = PoolSettings(self.limits, large=settings.decoders, memory=memory, timeout=settings.classify_deadline)
        self.decoders = Decoders(pool)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep decoders running until the end of the block."""
        await self.decoders.start()
        try:
            yield
        finally:
            await self.decoders.close()

    async def decode(self, request: Request, images: Sequence[Bytes], contract: Input, deadline: float, *, listed: bool) -> Pixels:
        """Return the images of ``request`` as (n, H, W, 3).

        Raises Problem: 413 too large, 422 not an image (with its index in a list), 499 the client has left, 503 the decoder ended before
        it answered, 504 at ``deadline``, a time of time.monotonic().
        """
        left = False

        def leave() -> None:
            nonlocal left
            if not timeout.expired():
                left = True
                timeout.reschedule(0)  # now

        try:
            async with asyncio.timeout(deadline - time.monotonic()) as timeout:
                with on_disconnect(request, leave):
                    decoded = await self.decoders.decode(images, contract, request.scope["client_name"])
                    return await stacked(decoded)
        except InvalidImage as error:
            raise refusal(error, listed=listed) from None
        except DecoderLost as error:
            raise Problem(503, str(error), headers={"Retry-After": "1"}) from None
        except TimeoutError:
            if left:
                raise Problem(499, "the client closed the connection") from None
            late = "the image was not decoded by the deadline; try again, or send it smaller"
            raise Problem(504, late, headers={"Retry-After": "1"}) from None


async def stacked(images: Sequence[Pixels]) -> Pixels:
    """Return images of one size as one array; the event loop has its turns meanwhile."""
    if len(images) == 1:
        return images[0][np.newaxis]
    together, unseen = np.empty((len(images), *images[0].shape), np.uint8), 0
    for place, image in zip(together, images, strict=True):
        place[...] = image
        unseen += image.nbytes
        if unseen >= SLICE:
            unseen = 0
            await asyncio.sleep(0)
    return together


def refusal(error: InvalidImage, *, listed: bool) -> Problem:
    """Return the Problem for an image that could not be decoded, naming its place in a list."""
    text = str(error)
    if listed and error.index is not None:
        return Problem(422, f"images[{error.index}]: {text}; nothing was computed", index=error.index)
    return Problem(413 if error.too_large else 422, text)
