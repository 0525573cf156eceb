"""Which web pages and which host names may be behind a request: CORS, Origin and Host."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.settings import Settings

ASGI = Callable[[Any, Any, Any], Awaitable[None]]
ANY = "*"
PREFLIGHT_SECONDS = 600
"""Seconds for which a browser may keep the answer to a preflight."""
SAME_SITE = ("same-origin", "none")
"""Values of Sec-Fetch-Site, which no page can set, of requests by this server's own pages or by the person at the browser."""
PROBED = ("/health", "/v2/health/live", "/v2/health/ready")
"""Paths that balancers ask for by address, under no name."""


def check_origin(origin: str) -> str:
    """Return an origin as browsers send it; raise EbjdatError for what is none."""
    parts = urlsplit(origin)
    if origin == ANY:
        return origin
    if parts.scheme not in ("http", "https") or not parts.netloc or origin.rstrip("/") != f"{parts.scheme}://{parts.netloc}":
        raise EbjdatError(f"--cors-origin must be * or an origin such as https://example.org or http://localhost:5173, not {origin!r}")
    return origin.rstrip("/").lower()


def check_host(host: str) -> str:
    """Return a host name, with a port or without, in lower case; raise EbjdatError for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        known = parts.netloc == host and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise EbjdatError(f"--allowed-host must be a host name such as api.example.org or *.example.org, not {host!r}")
    return host.lower()


def check(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the origins and host names of ``settings``; raise EbjdatError for what is none."""
    return [check_origin(origin) for origin in settings.cors_origin], [check_host(host) for host in settings.allowed_host]


def install(app: FastAPI, settings: Settings, exposed: Sequence[str]) -> None:
    """Add the checks to ``app``, outside of the check of keys: a preflight carries none. Pages may read the headers ``exposed``."""
    origins, hosts = check(settings)
    app.add_middleware(SiteMiddleware, origins=origins)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["Content-Type", "X-API-Key"],
            expose_headers=[*exposed, "Retry-After"],
            max_age=PREFLIGHT_SECONDS,
        )
    if hosts:
        app.add_middleware(HostMiddleware, hosts=hosts)  # outside: no preflight passes for another host


class HostMiddleware:
    """Answers 421 to a request for a host name that is not served, as a page has it sent whose name was made to mean our address."""

    def __init__(self, app: ASGI, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request that is for this server."""
        if scope["type"] == "http" and scope["path"] not in PROBED:
            host = Headers(scope=scope).get("host", "").lower()
            if not any(matches(host, one) for one in self._hosts):
                problem = Problem(421, f"this server is not {host[:100] or 'nameless'}; serve --allowed-host names the hosts it is")
                return await problem.response()(scope, receive, send)
        return await self._app(scope, receive, send)


class SiteMiddleware:
    """Answers 403 to what a page of another site has its visitor's browser send, unless the visitor followed a link.

    Browsers send a simple POST (a form, plain text) and a GET (an image) across sites without asking first, so any page could have its
    visitors upload to a server that only they can reach, or draw there.
    """

    def __init__(self, app: ASGI, origins: Sequence[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request that is from no page of another site."""
        if scope["type"] == "http" and scope["path"] not in PROBED and (problem := self._refuse(scope)):
            return await problem.response()(scope, receive, send)
        return await self._app(scope, receive, send)

    def _refuse(self, scope: Any) -> Problem | None:
        if not any(name in (b"origin", b"sec-fetch-site") for name, _ in scope["headers"]):
            return None  # no browser's, or one that is too old to say
        headers = Headers(scope=scope)
        origin, site = headers.get("origin", "").lower(), headers.get("sec-fetch-site")
        if scope["method"] == "OPTIONS" or ANY in self._origins or origin in self._origins:
            return None
        if site:
            allowed = site in SAME_SITE or (scope["method"] in ("GET", "HEAD") and follows_link(headers))
        else:  # no browser, or an old one, which sends Origin with what is not simple
            allowed = not origin or origin.partition("://")[2] == headers.get("host", "").lower()
        if allowed:
            return None
        return Problem(403, f"pages of {origin[:100] or 'other sites'} may not send to this server; serve --cors-origin allows them")


def follows_link(headers: Headers) -> bool:
    """Return whether a browser loads the answer as a page of its own, not into a frame, as a part of another page, or ahead of a click."""
    return "sec-purpose" not in headers and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def matches(host: str, allowed: str) -> bool:
    """Return whether a Host header means the host ``allowed``, with its port if that has one, by any subdomain for "*.example.org"."""
    name, port = split_port(host)
    wanted, wanted_port = split_port(allowed)
    if wanted_port and port != wanted_port:
        return False
    return name == wanted or allowed == ANY or (wanted.startswith("*.") and name.endswith(wanted[1:]))


def split_port(host: str) -> tuple[str, str]:
    """Return the name in a Host header, without the dot that a whole name may end with, and its port, "" without one."""
    name, _, port = host.rpartition(":") if host.rpartition(":")[2].isdigit() else (host, "", "")
    return name.removesuffix("."), port
