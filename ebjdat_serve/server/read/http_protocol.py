"""uvicorn's fast HTTP protocol with bounds: header bytes, time to send them, one request at a time, time to read an answer."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ebjdat_serve.server.settings import Settings

_open: "set[BoundedProtocol]" = set()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the bounds that it lacks: on header bytes, and on the time for headers and for a client to read its response.

    A request that is sent before the last one is answered (pipelining) ends the connection: uvicorn would keep any number of them in
    memory, and would no longer see that the client of the first has left. Browsers, curl and client libraries do not pipeline.
    """

    settings: Settings

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the timer for the headers of the first request."""
        super().connection_made(transport)
        _open.add(self)
        self._header_timer = self.loop.call_later(self.settings.header_timeout, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._header_timer = stop(self._header_timer)
        self._read_timer = stop(self._read_timer)
        _open.discard(self)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Start the timer for the headers of the next request; end the connection if the last request is not answered."""
        self._header_bytes = 0
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.settings.header_timeout, self.transport.abort)
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
        """Pass the request on; the bounds on its body are in bodies.py."""
        self._header_timer = stop(self._header_timer)
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Pass the body on, unless the connection is being closed."""
        if not self.transport.is_closing() and self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Pass the end of the request on, unless the connection is being closed."""
        if not self.transport.is_closing() and self.cycle is not None:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Parse what has come; end the connection when a request goes on after its response: the rest of a body, or trailers."""
        if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            self.transport.abort()
            return
        super().data_received(data)

    def pause_writing(self) -> None:
        """Start the timer for the client to read some more."""
        self._read_timer = self.loop.call_later(self.settings.read_timeout, self._check_read, self.transport.get_write_buffer_size())
        super().pause_writing()

    def resume_writing(self) -> None:
        """Stop the timer: the client has read some more."""
        self._read_timer = stop(self._read_timer)
        super().resume_writing()

    def _check_read(self, unread: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= unread:
            self.transport.abort()
        else:
            self._read_timer = self.loop.call_later(self.settings.read_timeout, self._check_read, left)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self.settings.max_headers:
            self.transport.abort()


def bounded_protocol(settings: Settings) -> type[BoundedProtocol]:
    """Return the protocol with the bounds of ``settings``; uvicorn takes a class."""
    return type("BoundedProtocol", (BoundedProtocol,), {"settings": settings})


def stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one; return None to put in its place."""
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
