"""uvicorn's fast HTTP protocol with bounds: on connections, headers, chunks, time, requests at a time; and nothing but HTTP/1.1 passes.

What is refused here gets a problem document, and then the connection is closed. The server stops sending, reads on for a moment without
keeping anything, and closes: a connection that is closed while bytes come would be reset, and the client would lose its answer.
"""

import asyncio
import contextlib
import resource
from collections import Counter
from ipaddress import IPv4Network, IPv6Network
from typing import Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.client_address import Address, network_name, networks, parse_address
from ebjdat_serve.server.read.side_doors import side_door
from ebjdat_serve.server.settings import Settings

MAX_TARGET = 8 * 2**10
"""Bytes of a request target."""
HEADER_COST, CHUNK_COST = 160, 128
"""Bytes that a header or a chunk counts for beside its own: each takes a call, and a header a few objects, however short it is."""
LINGER_SECONDS, LINGER_BYTES = 2.0, 2**20
"""Time and bytes for which the rest of a refused request is read on."""
BODY_LINGER = 5
"""Multiples of the limit of a body that are read on after a response that came before the body's end."""
MOST_TOLD = 16
"""Connections too many that are told so at a time; others are closed without a word."""
SPARE_DESCRIPTORS = 64
"""Descriptors that are kept for workers, files and logs."""

_open: "dict[BoundedProtocol, None]" = {}
_idle: "dict[BoundedProtocol, None]" = {}
"""Connections without a whole request, those that have been so for longest first."""
_per_address: Counter[str] = Counter()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the bounds that it lacks, and without the ways out of HTTP/1.1 that it has.

    A request that is sent before the last one is answered (pipelining) ends the connection: uvicorn would keep any number of them in
    memory, and would no longer see that the client of the first has left. Browsers, curl and client libraries do not pipeline.
    """

    settings: Settings
    max_connections: int
    proxies: tuple[IPv4Network | IPv6Network, ...]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._asgi, self.app = self.app, self._run
        self._header_bytes = self._chunks = self._body_bytes = self._received = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._lingering = -1  # bytes that are still read without keeping them; -1: the connection is in use
        self._begun = False  # some of a request's headers have come
        self._address = ""
        self._over: Problem | None = None  # what a connection too many is answered

    # connections

    def connection_made(self, transport: Any) -> None:
        """Count the connection, and start the timer for the headers of the first request."""
        super().connection_made(transport)
        address = parse_address(self.client[0]) if self.client else None
        self._address = network_name(address)
        _open[self] = None
        _per_address[self._address] += 1
        self._over = self._too_many(bounded=address is not None and not self._stands_for_many(address))
        if self._over is None:
            _idle[self] = None
        self._start_header_timer()

    def _stands_for_many(self, address: Address) -> bool:
        """Return whether an address may be that of many clients: this machine's own, or a trusted proxy's."""
        return address.is_loopback or any(address in network for network in self.proxies)

    def _too_many(self, *, bounded: bool) -> Problem | None:
        """Return why this connection is one too many; make room for it if one that does nothing can be closed."""
        own, limit = bounded * self.settings.max_connections_per_address, self.max_connections
        again = {"Retry-After": "1"}
        if own and _per_address[self._address] > own:
            problem = Problem(
                429, f"your address has {own} connections open; close some (serve --max-connections-per-address)", headers=again
            )
            excess = _per_address[self._address] - own
        elif (excess := len(_open) - limit) > 0:
            for other in _idle:
                if not other.transport.get_write_buffer_size():
                    other._leave()
                    other.transport.abort()
                    return None
            problem = Problem(503, f"{limit} connections wait for an answer (serve --max-connections); try again", headers=again)
        else:
            return None
        if excess > MOST_TOLD:
            self.transport.abort()
        return problem

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        for timer in (self._header_timer, self._read_timer, self._linger_timer):
            stop(timer)
        self._header_timer = self._read_timer = self._linger_timer = None
        self._leave()
        self.app = self._asgi  # else this object would refer to itself, until a garbage collection
        super().connection_lost(exc)

    def _leave(self) -> None:
        _idle.pop(self, None)
        if self in _open:
            del _open[self]
            _per_address[self._address] -= 1
            if not _per_address[self._address]:
                del _per_address[self._address]

    # requests

    def data_received(self, data: bytes) -> None:
        """Parse what has come, or drop it after a response that ends the connection."""
        if self._lingering >= 0:
            self._lingering -= len(data)
            if self._lingering < 0:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        if self._over:
            self._refuse(self._over)
            return
        self._received += len(data)
        try:
            self.parser.feed_data(data)
            self._check_framing()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, Refused):
            # of Refused, or where the parser itself has found it, as in an HTTP/2 preface
            self._refuse(Problem(400, "this is not a valid HTTP/1.1 request"))
        if self._header_timer is None and self._lingering < 0 and (self.cycle is None or self.cycle.response_complete):
            self._start_header_timer()  # also for line ends, which may come before a request

    def on_message_begin(self) -> None:
        """Count from zero; end the connection if the last request is not answered."""
        self._header_bytes = self._chunks = self._body_bytes = self._received = 0
        self._begun = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            raise Refused  # or the parser would go on with all that has come
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the request target."""
        self._count(len(url))
        super().on_url(url)
        if len(self.url) > MAX_TARGET:
            self._end(Problem(414, f"a request target may have {MAX_TARGET} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer after a body in chunks, which is dropped: it would stand among the headers, unseen by proxies.

        White space around a value is no part of it (RFC 9112, 5.1); the parser leaves what follows it.
        """
        self._count(len(name) + len(value) + HEADER_COST)
        if self._begun:
            super().on_header(name, value.strip(b" \t"))

    def on_headers_complete(self) -> None:
        """Pass the request on, or refuse what is none that we take; the bounds on its body are in bodies.py."""
        self._header_timer = stop(self._header_timer)
        if self.transport.is_closing():
            return
        parser = self.parser
        if problem := side_door(parser.get_http_version(), parser.get_method(), self.url, self.headers, upgrade=parser.should_upgrade()):
            self._end(problem)
        self._begun = False
        _idle.pop(self, None)
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Count a chunk; some hundreds may be of any size, beyond that they must have 128 bytes each on average."""
        self._chunks += 1
        if self._chunks * CHUNK_COST > self.settings.max_headers + self._body_bytes:
            self._end(Problem(400, f"the body comes in chunks of less than {CHUNK_COST} bytes; send larger ones"))

    def on_body(self, body: bytes) -> None:
        """Pass the body on, unless the connection is being closed."""
        self._body_bytes += len(body)
        if not self.transport.is_closing() and self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Pass the end of the request on, unless the connection is being closed."""
        if not self.transport.is_closing() and self.cycle is not None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self in _open and not self.transport.is_closing():
            _idle[self] = None

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self.settings.max_headers:
            self._end(
                Problem(431, f"a request's headers may have {self.settings.max_headers} bytes, and {HEADER_COST} more count for each")
            )

    def _check_framing(self) -> None:
        """Refuse what comes and is neither header nor body: extensions of chunks, line ends before a request."""
        if self._received > 2 * self.settings.max_headers + self._header_bytes + 2 * self._body_bytes:
            self._refuse(Problem(400, "there is more between the bytes of this request than in it"))

    def _start_header_timer(self) -> None:
        seconds = self.settings.header_timeout
        self._header_timer = self.loop.call_later(LINGER_SECONDS if self._over else seconds, self._headers_late)

    def _headers_late(self) -> None:
        self._header_timer = None
        if self._begun:
            self._refuse(Problem(408, f"the headers did not arrive within {self.settings.header_timeout:g} s"))
        else:
            self.transport.close()

    # responses

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application; a response that comes before the end of its request is the last of the connection."""
        cycle = self.cycle
        cycle.transport = CycleTransport(self)  # type: ignore[assignment]

        async def respond(message: Any) -> None:
            if cycle.more_body and not cycle.response_started:
                cycle.keep_alive = False
            await send(message)

        try:
            await self._asgi(scope, receive, respond)
        finally:
            cycle.transport = self.transport

    def end_response(self) -> None:
        """Close the connection after a response; read on if the request is still coming."""
        if self.cycle.more_body:
            self._linger(self.settings.body_timeout, BODY_LINGER * self.settings.max_body)
        else:
            self.transport.close()

    def _end(self, problem: Problem) -> NoReturn:
        """Refuse the request from within the parser, which stops at an exception."""
        self._refuse(problem)
        raise Refused

    def _refuse(self, problem: Problem) -> None:
        """Answer with a problem document and close the connection; without an answer in the middle of another one's response."""
        if self._lingering >= 0 or self.transport.is_closing():
            return
        self._header_timer = stop(self._header_timer)
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # the application hears that its client has left
            problem.note(self.cycle.scope)
            self.cycle.message_event.set()
        self.transport.write(problem.last_response(self.server_state.default_headers))
        self._linger(LINGER_SECONDS, LINGER_BYTES)

    def _linger(self, seconds: float, most: int) -> None:
        """Send no more, and read what still comes without keeping it, until the client closes the connection or has had its time."""
        self._lingering = most
        if self in _open:
            _idle[self] = None  # it has its answer, and makes room where that is needed
        self.flow.resume_reading()
        with contextlib.suppress(OSError):  # the client has gone
            self.transport.write_eof()
        self._linger_timer = self.loop.call_later(seconds, self.transport.abort)

    def shutdown(self) -> None:
        """Close the connection at a stop if it is idle; a request that is still coming has the time of those in progress."""
        if not self._begun:
            super().shutdown()

    def refuse_unfinished(self) -> None:
        """Refuse a request that is still coming when that time is over."""
        if self._begun or (self.cycle is not None and self.cycle.more_body and not self.cycle.response_started):
            self._refuse(Problem(503, "the server is stopping; try again when it is back", headers={"Retry-After": "5"}))

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


class Refused(Exception):
    """Stops the parser: the request is answered already."""


class CycleTransport:
    """The transport as a response sees it: to close it reads on first, if the request is still coming."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self.write, self.is_closing = protocol.transport.write, protocol.transport.is_closing
        self.close = protocol.end_response


def bounded_protocol(settings: Settings) -> type[BoundedProtocol]:
    """Return the protocol with the bounds of ``settings``, and of the descriptors that this process may open; uvicorn takes a class."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = max(4, min(settings.max_connections, descriptors - SPARE_DESCRIPTORS))
    bounds = {"settings": settings, "max_connections": most, "proxies": networks(settings.trusted_proxy)}
    return type("BoundedProtocol", (BoundedProtocol,), bounds)


def stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one; return None to put in its place."""
    if timer is not None:
        timer.cancel()
    return None


def connections() -> int:
    """Return how many connections are open."""
    return len(_open)


def refuse_unfinished() -> None:
    """Refuse the requests that are still coming."""
    for protocol in list(_open):
        protocol.refuse_unfinished()


def hang_up() -> None:
    """End every connection that is still open."""
    for protocol in list(_open):
        protocol.transport.abort()
