"""Request bodies: received in bounded time and memory, in the HTTP process and before any queue."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from fastapi import Request

from ebjdat_serve import strict_json
from ebjdat_serve.fairness import may_hold
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.settings import Settings

SMALL_BODY = 2**20
"""Bytes of a body, above which it gets no more than its share of three quarters of the memory for bodies, so that small ones still pass."""
FREED = 2**22
"""Bytes that are given back to the system before the event loop has its turn: 22 MB take 4 ms."""
BODY_COST = 2**10
"""Bytes that a body counts for beside its own."""


class BodyMemory:
    """Bytes in memory of bodies, what is decoded of them, and pixels: of each client in ``used``, and of one request in each instance.

    Clients share the memory (``fairness.may_hold``): one has half of it at most, and with each that has some the share is smaller.
    """

    used: ClassVar[Counter[str]] = Counter()

    def __init__(self, limit: int, client: str) -> None:
        self._limit, self._client, self._held = limit, client, 0

    def hold(self, n: int) -> None:
        """Hold so many bytes more; raise Problem 503 when that would pass the client's share, of three quarters for a large body."""
        own = self._held + n
        size = self._limit if own <= SMALL_BODY + BODY_COST else self._limit * 3 // 4
        if n > 0 and not may_hold(BodyMemory.used, self._client, n, size):
            detail = "your share of the memory for bodies is full (serve --upload-memory); try again in a second"
            raise Problem(503, detail, headers={"Retry-After": "1"})
        self._count(n)

    def release(self) -> None:
        """Hold nothing any more."""
        self._count(-self._held)

    def _count(self, n: int) -> None:
        self._held += n
        BodyMemory.used[self._client] += n
        if not BodyMemory.used[self._client]:
            del BodyMemory.used[self._client]


@contextlib.asynccontextmanager
async def read_body(request: Request, limit: int, settings: Settings, memory: BodyMemory | None = None) -> AsyncIterator[bytearray]:
    """Give the body, and drop it in the end.

    Raises Problem: 408 when the body does not arrive in time, 413 when it is too large, 503 when the memory for bodies is full.
    """
    s = settings
    memory = memory or BodyMemory(s.upload_memory, request.scope["client_name"])
    held = bytearray()  # one block: a list of chunks would fragment the memory
    began = time.monotonic()
    try:
        memory.hold(BODY_COST)
        refuse_large(int(request.headers.get("content-length", 0)), limit, s)
        try:
            async with asyncio.timeout(s.body_timeout):
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(499, "the client closed the connection")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    refuse_large(len(held) + len(chunk), limit, s)
                    memory.hold(len(chunk))
                    held += chunk
                    if len(held) < s.min_upload_rate * (time.monotonic() - began - s.upload_grace):
                        raise too_slow(s)
        except TimeoutError:
            raise too_slow(s) from None
        yield held
    finally:
        try:
            await drop(held)  # now: the error for a refused body refers to it in a cycle
        finally:
            memory.release()


async def drop(*buffers: bytearray) -> None:
    """Free buffers, a part at a time."""
    freed = 0
    for buffer in buffers:
        while buffer:
            kept = 0 if len(buffer) <= FREED else len(buffer) * 49 // 100  # a bytearray gives memory back from half of it on
            freed += len(buffer) - kept
            del buffer[kept:]
            if freed >= FREED:
                freed = 0
                await asyncio.sleep(0)


def too_slow(settings: Settings) -> Problem:
    """Return Problem 408."""
    detail = f"the body did not arrive within {settings.body_timeout:g} s, or came too slowly"
    return Problem(408, detail, headers={"Connection": "close"})


def refuse_large(size: int, limit: int, settings: Settings) -> None:
    """Raise Problem 413 for a body above the limit."""
    if size > limit:
        image = f"an image may have {settings.max_image_bytes} bytes and {settings.max_pixels} pixels"
        raise Problem(413, f"the body is larger than the limit of {limit} bytes; {image}")


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return parameters as a dict; raise Problem 422 for one that is given twice, of which another reader may take the other."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Problem(422, f"{name[:40]} is given twice: a parameter may be given once, in the query or in the body")
        found[name] = value
    return found


def parse_json(body: bytes | bytearray) -> Any:
    """Return the JSON document; NaN, Infinity and a key that is given twice are not JSON. Raises Problem 400."""
    try:
        return strict_json.loads(body, unique=True)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not valid JSON: {error}") from None
