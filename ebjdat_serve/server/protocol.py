"""uvicorn's fast HTTP protocol with bounds: header bytes, time to send them, time to read an answer."""

import asyncio
import weakref
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
HEADER_SECONDS = 20.0
"""Seconds from the first byte of a request, or from the connection, to the end of its headers."""
STALL_SECONDS = 60.0
"""Seconds that a client may take to make room for more of its answer."""
_open: "weakref.WeakSet[BoundedProtocol]" = weakref.WeakSet()


class BoundedProtocol(HttpToolsProtocol):
    """httptools takes headers without limit, and uvicorn waits for ever: for the rest of them, and for a client that reads nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_headers = True
        self._header_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to wait for a request."""
        super().connection_made(transport)
        _open.add(self)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop(self._timer)
        self._stop(self._stall)
        _open.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless headers go on for ever."""
        if self._in_headers:
            self._header_bytes += len(data)
            if self._timer is None:  # the next request on a connection that was kept
                self._wait_for_headers()
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        """The request may start; the bounds on its body are the application's."""
        self._in_headers = False
        self._stop(self._timer)
        self._timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Count the next request's headers from here."""
        self._in_headers, self._header_bytes = True, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Give the client so long to read."""
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """It did."""
        self._stop(self._stall)
        super().resume_writing()

    def _wait_for_headers(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def connections() -> int:
    """Return how many connections are open."""
    return len(_open)


def hang_up() -> None:
    """End every connection that is still open."""
    for protocol in list(_open):
        if protocol.transport is not None:
            protocol.transport.abort()
