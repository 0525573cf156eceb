"""Clients that leave before their answer: whoever works for a request is told within a moment, and can stop."""

import asyncio
import logging
import time
from collections.abc import Callable

from fastapi import Request

log = logging.getLogger("ebjdat_serve")
POLL_SECONDS = 0.1
"""Seconds between checks that clients are still connected; a request that takes less is not looked at."""


class on_disconnect:  # noqa: N801 - a context manager
    """Have ``leave`` called, once, if the client of ``request`` disconnects before the block ends. The body must have been read."""

    def __init__(self, request: Request, leave: Callable[[], None]) -> None:
        self.request, self.leave, self.since = request, leave, time.monotonic()

    def __enter__(self) -> None:
        _watched.add(self)

    def __exit__(self, *_: object) -> None:
        _watched.discard(self)


_watched: set[on_disconnect] = set()


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
