"""The HTTP protocol class in memory: what a request means to the application, and what a connection is answered at its end."""

import asyncio
import json

import pytest
import uvicorn
from uvicorn.server import ServerState

from ebjdat_serve.keys import KeyRing, digest
from ebjdat_serve.server.observer import Observer, TraceMiddleware
from ebjdat_serve.server.read import http_protocol
from ebjdat_serve.server.read.auth import Access, ApiKeyMiddleware
from ebjdat_serve.server.read.client_address import ClientAddress
from ebjdat_serve.server.read.client_limits import ClientLimits
from ebjdat_serve.server.read.http_protocol import bounded_protocol
from ebjdat_serve.server.settings import SETTINGS, Settings
from tests.test_keys import key_of

KEY = b"a-key-of-the-tests"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self):
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80)})
        self.sent, self.closed, self.ended = b"", False, False

    def write(self, data):
        assert not self.ended
        self.sent += data

    def close(self):
        self.closed = True

    abort = close

    def is_closing(self):
        return self.closed

    def write_eof(self):
        self.ended = True

    def get_write_buffer_size(self):
        return 0

    def pause_reading(self):
        pass

    resume_reading = pause_reading


class Connection:
    """A connection to an application, and the requests that have reached it."""

    def __init__(self, app=None, **settings):
        self.requests = []
        http = bounded_protocol(Settings(**settings))
        config = uvicorn.Config(app or self.echo, http=http, interface="asgi3", proxy_headers=False, lifespan="off", log_config=None)
        config.load()
        self.wire = Wire()
        self.protocol = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
        self.protocol.connection_made(self.wire)

    async def echo(self, scope, receive, send):
        self.requests.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.requests.append("left")
                return
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def feed(self, *parts):
        for part in parts:
            self.protocol.data_received(part)
            for _ in range(5):
                await asyncio.sleep(0)
        return self.wire.sent

    def lost(self):
        self.protocol.connection_lost(None)


def conversation(*parts, app=None, **settings):
    """Return what a connection sends back, and its requests."""

    async def talk():
        connection = Connection(app, **settings)
        try:
            return await connection.feed(*parts), connection
        finally:
            connection.lost()

    return asyncio.run(talk())


def test_what_a_header_counts_for_is_what_the_setting_says():
    (about,) = [one.about for one in SETTINGS if one.name == "max_headers"]
    assert about.help.endswith(f"and {http_protocol.HEADER_COST} more for each header")


# white space around values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [" ", "\t", " \t  "])
def test_white_space_around_a_value_is_no_part_of_it(space):
    """Of any header; the application sees none. The parser itself refuses a tab behind "chunked"."""
    values = {"Host": "x", "Content-Type": "a/b", "Connection": "close", "X-A": "b c"}
    head = "".join(f"{name}:{space}{value}{space}\r\n" for name, value in values.items())
    after = space.replace("\t", " ")
    for framing in (f"Content-Length:{space}3{space}\r\n\r\nabc", f"Transfer-Encoding:{space}chunked{after}\r\n\r\n3\r\nabc\r\n0\r\n\r\n"):
        sent, connection = conversation(f"POST /echo HTTP/1.1\r\n{head}{framing}".encode())
        assert sent.startswith(b"HTTP/1.1 200 "), sent
        assert sent.endswith(b"\r\n\r\nabc")
        assert b"connection: close\r\n" in sent
        (scope,) = connection.requests
        assert all(value == value.strip() for _, value in scope["headers"])
        assert dict(scope["headers"])[b"x-a"] == b"b c"


def test_an_expectation_with_white_space_is_met_and_another_refused():
    async def talk():
        connection = Connection()
        sent = await connection.feed(POST + b"Expect: 100-continue \t\r\nContent-Length: 3\r\n\r\n")
        assert sent == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await connection.feed(b"abc")).endswith(b"\r\n\r\nabc")
        connection.lost()

    asyncio.run(talk())
    assert conversation(POST + b"Expect: 100-continue x\r\nContent-Length: 3\r\n\r\n")[0].startswith(b"HTTP/1.1 417 ")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0 \t\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5 \r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: \t\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip \r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: x\r\n\r\n", 200),
        (b"GET / HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    ],
)
def test_a_head_is_judged_by_its_values_alone(head, status):
    assert conversation(head)[0].startswith(b"HTTP/1.1 %d " % status)


def test_a_key_with_white_space_around_it_is_the_key():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": [(b"x-client", scope["client_name"].encode())]})
        await send({"type": "http.response.body"})

    keys = KeyRing(None, key_of("shop").model_copy(update={"sha256": digest(KEY)}))
    guarded = ApiKeyMiddleware(app, Access(keys, ClientAddress(), ClientLimits()), {"/echo": {"classify"}})
    guarded = TraceMiddleware(guarded, Observer(Settings()))
    for value in (KEY, KEY + b" ", b"\t" + KEY + b" \t"):
        for header in (b"X-API-Key:", b"Authorization: Bearer "):
            sent, _ = conversation(POST + header + value + b"\r\nContent-Length: 0 \r\n\r\n", app=guarded)
            assert b"204" in sent and b"key:shop" in sent, sent
    assert b" 401 " in conversation(POST + b"X-API-Key:" + KEY + b" x\r\n\r\n", app=guarded)[0]


# the end of a connection -----------------------------------------------------------------------------------------------------


UNFINISHED = {
    "a body": (POST + b"Content-Length: 9\r\n\r\nabc", b"defghi"),
    "a body in chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"0\r\n\r\n"),
    "a body that is waited for": (POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n", b"abc"),
    "headers": (POST[:-4], b"x\r\n\r\n"),
}


@pytest.mark.parametrize("kind", UNFINISHED)
def test_a_request_that_is_still_coming_at_a_stop_ends_in_time_or_is_refused_with_an_answer(kind):
    begun, rest = UNFINISHED[kind]

    async def ended(*, refused):
        connection = Connection()
        await connection.feed(begun)
        connection.protocol.shutdown()
        assert not connection.wire.closed
        if refused:
            http_protocol.refuse_unfinished()
            http_protocol.refuse_unfinished()
        sent = await connection.feed(b"" if refused else rest)
        sent = sent.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.lost()
        return sent, connection.requests

    sent, _ = asyncio.run(ended(refused=False))
    assert sent.startswith(b"HTTP/1.1 200 ")
    sent, requests = asyncio.run(ended(refused=True))
    head, _, body = sent.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert {b"connection: close", b"Retry-After: 5", b"content-type: application/problem+json"} <= set(head.split(b"\r\n"))
    assert "stopping" in json.loads(body)["detail"]
    assert requests[1:] == ([] if kind == "headers" else ["left"])


def test_a_stop_closes_an_idle_connection_and_refuses_nobody_whose_request_is_whole():
    release = asyncio.Event()

    async def slow(scope, receive, send):
        await release.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def talk():
        idle, fresh, busy = Connection(), Connection(), Connection(slow)
        await idle.feed(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await busy.feed(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        for one in (idle, fresh, busy):
            one.protocol.shutdown()
        assert (idle.wire.closed, fresh.wire.closed, busy.wire.closed) == (True, True, False)
        http_protocol.refuse_unfinished()
        assert not busy.wire.sent
        release.set()
        assert (await busy.feed(b"")).startswith(b"HTTP/1.1 204 ")
        for one in (idle, fresh, busy):
            one.lost()

    asyncio.run(talk())


@pytest.mark.parametrize("kind", ["a body", "a body in chunks"])
def test_the_end_of_what_a_client_sends_within_a_body_ends_its_request(kind):
    async def talk():
        connection = Connection()
        await connection.feed(UNFINISHED[kind][0])
        assert not connection.protocol.eof_received()  # the transport closes the connection
        connection.lost()
        await asyncio.sleep(0.01)
        assert connection.requests[1:] == ["left"]
        assert not http_protocol.connections()

    asyncio.run(talk())
