"""Clients that leave before their answer: whoever works for a request is told within a moment, and can stop."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastapi import Request

log = logging.getLogger("ebjdat_serve")
POLL_SECONDS = 0.1
"""Seconds between checks that clients are still connected; a request that takes less is not looked at."""


@dataclass(eq=False)
class _Watched:
    request: Request
    leave: Callable[[], None]
    since: float


_watched: set[_Watched] = set()


@contextlib.contextmanager
def on_disconnect(request: Request, leave: Callable[[], None]) -> Iterator[None]:
    """Have ``leave`` called, once, if the client of ``request`` disconnects before the block ends. The body must have been read."""
    one = _Watched(request, leave, time.monotonic())
    _watched.add(one)
    try:
        yield
    finally:
        _watched.discard(one)


async def watch() -> None:
    """Look for clients that have left, for ever; one connection that cannot tell costs no other."""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        for one in list(_watched):
            try:
                gone = time.monotonic() - one.since > POLL_SECONDS and await one.request.is_disconnected()
                if gone and one in _watched:
                    _watched.discard(one)
                    one.leave()
            except Exception:
                log.exception("cannot tell whether a client has left, or stop its work")
