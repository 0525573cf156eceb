"""Encoded images to pixels, for a request: by processes with limits, until its deadline or until its client has left."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import Request

from ebjdat_serve.bundle import Input
from ebjdat_serve.decoding.header import Bytes, Limits
from ebjdat_serve.decoding.jobs import DecoderLost
from ebjdat_serve.decoding.pool import Decoders
from ebjdat_serve.decoding.pool_settings import LIGHT, PoolSettings
from ebjdat_serve.errors import EbjdatError, InvalidImage
from ebjdat_serve.pixels import Pixels
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.settings import Settings

log = logging.getLogger(__name__)
SLICE = 2**20
"""Bytes of images that are copied before the event loop has its turn."""
POLL_SECONDS = 0.1
"""Seconds between checks that clients are still connected."""


def limits(settings: Settings) -> Limits:
    """Return the limits of one image."""
    return Limits(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_pixels,
        max_memory=settings.decode_memory - LIGHT * (settings.decoders - 1),
        max_seconds=settings.decode_seconds,
        jpeg_draft=settings.jpeg_draft,
    )


@dataclass(eq=False)
class Decode:
    """One under way."""

    request: Request
    since: float
    timeout: asyncio.Timeout
    left: bool = False  # its client has


class ImageDecoder:
    """The decoders of a server, and the requests that they work for."""

    def __init__(self, settings: Settings) -> None:
        least = LIGHT * settings.decoders
        if settings.decode_memory < least:
            raise EbjdatError(
                f"serve --decode-memory must be at least {least} for {settings.decoders} decoders, not {settings.decode_memory}"
            )
        self.limits = limits(settings)
        # each request ends its own decode at its deadline; this is for a zygote that does not hear of it
        pool = PoolSettings(self.limits, large=settings.decoders, memory=settings.decode_memory, timeout=settings.classify_deadline)
        self.decoders = Decoders(pool)
        self.under_way: set[Decode] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep decoders running until the end of the block."""
        await self.decoders.start()
        watching = asyncio.create_task(self.watch())
        try:
            yield
        finally:
            watching.cancel()
            await self.decoders.close()

    async def watch(self) -> None:
        """End the decodes of clients that have left, for ever."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for one in list(self.under_way):
                try:
                    gone = time.monotonic() - one.since > POLL_SECONDS and await one.request.is_disconnected()
                except Exception:
                    log.exception("cannot tell whether a client has left")
                    continue
                if gone and one in self.under_way and not one.timeout.expired():
                    one.left = True
                    one.timeout.reschedule(0)  # now

    async def decode(self, request: Request, images: Sequence[Bytes], contract: Input, deadline: float, *, listed: bool) -> Pixels:
        """Return the images of ``request`` as (n, H, W, 3).

        Raises Problem: 413 too large, 422 not an image (with its index in a list), 499 the client has left, 503 the decoder ended before
        it answered, 504 at ``deadline``, a time of time.monotonic().
        """
        now = time.monotonic()
        try:
            async with asyncio.timeout(deadline - now) as timeout:
                one = Decode(request, now, timeout)
                self.under_way.add(one)
                try:
                    decoded = await self.decoders.decode(images, contract.height, contract.width, request.scope["client_name"])
                    return await stacked(decoded)
                finally:
                    self.under_way.discard(one)
        except InvalidImage as error:
            raise refusal(error, listed=listed) from None
        except DecoderLost as error:
            raise Problem(503, str(error), headers={"Retry-After": "1"}) from None
        except TimeoutError:
            if one.left:
                raise Problem(499, "the client closed the connection") from None
            late = "the image was not decoded by the deadline; try again, or send it smaller"
            raise Problem(504, late, headers={"Retry-After": "1"}) from None


async def stacked(images: Sequence[Pixels]) -> Pixels:
    """Return images of one size as one array; the event loop has its turns meanwhile."""
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
