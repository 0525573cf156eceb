"""Middleware that decides, before a body is read, who sends a request, whether its API key allows it, and how much of it.

LitServe's own check of LIT_SERVER_API_KEY would leave our routes open, close the probes, and compare with !=.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from ebjdat_serve.errors import cause
from ebjdat_serve.keys import Key, KeyRing, Reading, Scope, environment_key
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.auth_failures import LONGEST_DELAY, AuthFailures
from ebjdat_serve.server.read.client_address import ClientAddress, client_name, network_name
from ebjdat_serve.server.read.client_limits import ClientCounts, ClientLimits, limits_of
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.threads import in_daemon_thread

ASGI = Callable[[Any, Any, Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]
LOOK_SECONDS = 1.0
"""Seconds between looks at the key file."""
READ_SECONDS = 5.0
"""Seconds after which a read of the key file is given up."""
MAX_HUNG_READS = 3
"""Threads that wait for a file system that hangs, beyond which none is added until one returns."""


@dataclass(frozen=True)
class Access:
    """What decides on requests: the keys, whose reports of addresses count, the limits of a client, and what clients have in progress."""

    keys: KeyRing
    address: ClientAddress
    limits: ClientLimits
    counts: ClientCounts = field(default_factory=ClientCounts)
    failures: AuthFailures = field(default_factory=AuthFailures)

    @staticmethod
    def of(settings: Settings) -> "Access":
        """Return what ``settings`` and LIT_SERVER_API_KEY say; raise EbjdatError for a key, a key file or a proxy that is none."""
        return Access(
            KeyRing(settings.keys, environment_key()),
            ClientAddress(settings.trusted_proxy, settings.forwarded_header),
            limits_of(settings),
        )

    async def follow(self) -> None:
        """Read the key file again whenever it changes, until cancelled.

        A thread reads it, as its file system may hang: then the keys stay as they are, and others try, a few at most.
        """
        hung: list[asyncio.Future[Reading]] = []
        while self.keys.file is not None:
            await asyncio.sleep(LOOK_SECONDS)
            hung = [one for one in hung if not one.done()]
            if len(hung) >= MAX_HUNG_READS:
                given_up = "has not answered for long: keys are followed no more until its file system does, or the server is started again"
                self.keys.take(Reading(error=f"{self.keys.file} {given_up}"))
                continue
            reading = in_daemon_thread(self.keys.read_again)
            if not (await asyncio.wait([reading], timeout=READ_SECONDS))[0]:
                hung.append(reading)
                self.keys.take(Reading(error=f"{self.keys.file} cannot be read within {READ_SECONDS:g} s: its file system may hang"))
                continue
            try:
                self.keys.take(reading.result())
            except OSError as error:
                self.keys.take(Reading(error=f"{self.keys.file} cannot be read: {cause(error)}"))

    def chains(self, request: Request, n: int) -> AbstractContextManager[None]:
        """Count ``n`` chains of the client that sends ``request`` until the block ends; raise Problem 429 beyond its limit."""
        return self.counts.held(request.scope["client_name"], "chains", request.scope["limits"], n)


class ApiKeyMiddleware:
    """Names the client of a request, and refuses what its key or its limits do not allow.

    A server with keys answers 401 without a known key (X-API-Key, or Authorization: Bearer) and 403 for one without the path's scope; any
    server 429 beyond a limit of the client. The scope that is passed on has the client's name (str) as ``client_name``, the scopes of its
    key as ``scopes``, none without one, and its ClientLimits as ``limits``.
    """

    def __init__(self, app: ASGI, access: Access, scopes: Mapping[str, Collection[Scope]]) -> None:
        """``scopes``: by path, those of which a key needs one; none where no key is needed and no limit holds."""
        self._app, self._access, self._scopes = app, access, scopes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request that is allowed."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            client, key, limits = await self._identify(scope)
        except Problem as problem:
            return await problem.response()(scope, receive, send)
        scope = scope | {"client_name": client, "scopes": key.scopes if key else frozenset(), "limits": limits}
        if not limits.on_requests:
            return await self._app(scope, receive, send)
        with ExitStack() as held:
            try:
                receive = self._count(client, limits, scope["headers"], receive, held)
            except Problem as problem:
                return await problem.response()(scope, receive, send)
            return await self._app(scope, receive, send)

    def _count(self, client: str, limits: ClientLimits, headers: list[tuple[bytes, bytes]], receive: Receive, held: ExitStack) -> Receive:
        """Count a request until ``held`` is closed, and its body until the returned ``receive`` has given all of it.

        Raises Problem 429 beyond a limit.
        """
        counts = self._access.counts
        counts.request(client, limits)
        held.enter_context(counts.held(client, "requests", limits))
        if not has_body(headers):
            return receive
        body = held.enter_context(ExitStack())
        body.enter_context(counts.held(client, "bodies", limits))

        async def receive_body() -> Any:
            message = await receive()
            if not message.get("more_body"):
                body.close()  # it is here, or the client has gone
            return message

        return receive_body

    async def _identify(self, scope: Any) -> tuple[str, Key | None, ClientLimits]:
        """Return the client's name, its key if the server has keys, and its limits. Raises Problem 400, 401, 403, 404 or 429."""
        access = self._access
        address = access.address(scope["client"] and scope["client"][0], scope["headers"])
        path = scope["path"]
        needed = self._scopes.get(path)
        if needed is not None and not needed:
            return network_name(address), None, ClientLimits()
        if not access.keys.closed:
            return network_name(address), None, access.limits
        key = await self._key(scope["headers"], network_name(address))
        scope["trace"].key = key.name  # also of what it is refused: the access log says whose key lacks a scope
        if needed is None and "operate" not in key.scopes:
            raise Problem(404, f"no such path {path}")  # the app's routes are not asked: they might see another path in it than we do
        if needed and not key.scopes.intersection(needed):
            detail = f"the key {key.name} is for {', '.join(sorted(key.scopes))}; {path} needs a key for {' or '.join(sorted(needed))}"
            raise Problem(403, detail)
        limits = access.limits.of_key(rate=key.rate, burst=key.burst, concurrency=key.concurrency)
        return client_name(key.name, address), key, limits

    async def _key(self, headers: list[tuple[bytes, bytes]], client: str) -> Key:
        """Return the key that was sent. Raises Problem: 400 for two, 401 for none or a wrong one, later the more of these came before."""
        name, sent = sent_key(headers)
        if not sent:
            raise unauthorized("send an API key of this server in the header X-API-Key, or as Authorization: Bearer KEY")
        if key := self._access.keys.find(sent):
            return key
        delay = self._access.failures.failed(client)
        if delay:
            with self._access.failures.holding(client) as may_wait:
                if not may_wait:
                    raise Problem(429, "too many wrong API keys; try again later", headers={"Retry-After": str(math.ceil(LONGEST_DELAY))})
                await asyncio.sleep(delay)
        raise unauthorized(f"the API key in the header {name} is none of this server's: it is wrong, revoked or has expired")


def sent_key(headers: list[tuple[bytes, bytes]]) -> tuple[str, bytes]:
    """Return the header that holds a request's key, and the key, b"" for none.

    A scraper such as Prometheus can send Authorization alone; of other schemes than Bearer it is a proxy's, and not looked at. Raises
    Problem 400 for a header that is there twice, and for two keys.
    """
    found = {}
    for header in ("X-API-Key", "Authorization"):
        values = [value for name, value in headers if name == header.lower().encode()]
        if len(values) > 1:
            raise Problem(400, f"send one {header} header, not several")
        found[header] = values[0] if values else b""
    key, (scheme, _, token) = found["X-API-Key"], found["Authorization"].partition(b" ")
    bearer = token.strip() if scheme.lower() == b"bearer" else b""
    if key and bearer and key != bearer:
        raise Problem(400, "X-API-Key and Authorization hold different keys: send one of them")
    return ("X-API-Key", key) if key else ("Authorization", bearer)


def unauthorized(detail: str) -> Problem:
    """Return Problem 401."""
    return Problem(401, detail, headers={"WWW-Authenticate": "X-API-Key, Bearer"})


def has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether a request announces a body."""
    return any(name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0") != b"") for name, value in headers)
