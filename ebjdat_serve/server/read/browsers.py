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
SAFE = ("GET", "HEAD", "OPTIONS")
PROBED = ("/health",)
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
    app.add_middleware(SiteMiddleware, origins=origins, hosts=hosts)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["Content-Type", "X-API-Key"],
            expose_headers=[*exposed, "Retry-After"],
            max_age=PREFLIGHT_SECONDS,
        )


class SiteMiddleware:
    """Answers 403 to what another site's page sends without asking first, and 421 to a request for a host name that is not served.

    Browsers send a simple POST (a form, plain text) across sites without a preflight, so any page could have its visitors upload
    to a server that only they can reach.
    """

    def __init__(self, app: ASGI, origins: Sequence[str], hosts: Sequence[str]) -> None:
        self._app, self._origins, self._hosts = app, origins, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request that is for this server, and from no page of another site."""
        if scope["type"] == "http" and (problem := self._refuse(scope)):
            return await problem.response()(scope, receive, send)
        return await self._app(scope, receive, send)

    def _refuse(self, scope: Any) -> Problem | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if self._hosts and scope["path"] not in PROBED and not any(matches(host, one) for one in self._hosts):
            return Problem(421, f"this server is not {host[:100] or 'nameless'}; serve --allowed-host names the hosts it is")
        origin = headers.get("origin", "").lower()
        if scope["method"] in SAFE or not origin or origin in self._origins or ANY in self._origins:
            return None
        site = headers.get("sec-fetch-site")
        same = site in SAME_SITE if site else origin.partition("://")[2] == host
        return None if same else Problem(403, f"pages of {origin[:100]} may not send to this server; serve --cors-origin allows them")


def matches(host: str, allowed: str) -> bool:
    """Return whether a Host header means the host ``allowed``, with its port if that has one, by any subdomain for "*.example.org"."""
    name = host if urlsplit(f"//{allowed}").port else host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name == allowed or allowed == ANY or (allowed.startswith("*.") and name.endswith(allowed[1:]))
