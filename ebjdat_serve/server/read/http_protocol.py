"""uvicorn's fast HTTP protocol with bounds: header bytes, time to send them, one request at a time, time to read an answer."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
HEADER_SECONDS = 20.0
"""Seconds from the connection, or from the first byte of a later request, to the end of its headers."""
STALL_SECONDS = 60.0
"""Seconds in which a client must take some more of its answer."""
_open: "set[BoundedProtocol]" = set()


class BoundedProtocol(HttpToolsProtocol):
    """httptools takes headers and trailers without limit; uvicorn waits for ever, for the rest of them and for a client that reads nothing.

    A request that is sent before the last one is answered ends the connection: uvicorn would keep any number of them in memory, and
    would no longer see that the client of the first has left. Browsers, curl and client libraries do not pipeline.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_bytes = 0
        self._waiting: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to wait for a request."""
        super().connection_made(transport)
        _open.add(self)
        self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._waiting = stop(self._waiting)
        self._stall = stop(self._stall)
        _open.discard(self)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Give the next request so long, and refuse it before the last one is answered."""
        self._header_bytes = 0
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer after a body in chunks."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request may start; the bounds on its body are the application's."""
        self._waiting = stop(self._waiting)
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Pass on the body, unless the connection is being ended."""
        if not self.transport.is_closing() and self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Likewise."""
        if not self.transport.is_closing() and self.cycle is not None:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, but not with what comes after the answer to a request that never ends: a body's rest, or trailers."""
        if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            self.transport.abort()
            return
        super().data_received(data)

    def pause_writing(self) -> None:
        """Give the client so long to read some more."""
        self._stall = self.loop.call_later(STALL_SECONDS, self._look, self.transport.get_write_buffer_size())
        super().pause_writing()

    def resume_writing(self) -> None:
        """It did."""
        self._stall = stop(self._stall)
        super().resume_writing()

    def _look(self, unread: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= unread:
            self.transport.abort()
        else:
            self._stall = self.loop.call_later(STALL_SECONDS, self._look, left)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()


def stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one; return none."""
    if timer is not None:
        timer.cancel()
    return None


def connections() -> int:
    """Return how many connections are open."""
    return len(_open)


def hang_up() -> None:
    """End every connection that is still open."""
    for protocol in list(_open):
        protocol.transport.abort()
