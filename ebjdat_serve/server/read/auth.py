"""Middleware for API keys and for HEAD.

The key is in LIT_SERVER_API_KEY, LitServe's own variable. LitServe's check would leave our routes open, close the probes, and compare
with !=.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.problems import Problem

VARIABLE = "LIT_SERVER_API_KEY"
ASGI = Callable[[Any, Any, Any], Awaitable[None]]


def api_key() -> str | None:
    """Return the server's key without surrounding white space, None if the variable is not set.

    Raises EbjdatError for an empty key, which would leave a server open that was meant to be closed, and for one that no client can send.
    """
    key = os.environ.get(VARIABLE)
    if key is None:
        return None
    if not key.strip():
        raise EbjdatError(f"{VARIABLE} is set and holds no key: give one, or unset it to serve without")
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise EbjdatError(f"{VARIABLE} has characters that are not printable ASCII, which no header can carry: choose another key")
    return key


class HeadMiddleware:
    """Answers HEAD, which load balancers probe with, as GET without a body, on ``paths``."""

    def __init__(self, app: ASGI, paths: Collection[str]) -> None:
        self._app, self._paths = app, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass HEAD on as GET; uvicorn sends no body in response to HEAD."""
        if scope["type"] == "http" and scope["method"] == "HEAD" and scope["path"] in self._paths:
            scope = {**scope, "method": "GET"}
        return await self._app(scope, receive, send)


class ApiKeyMiddleware:
    """Answers 401 unless X-API-Key holds the key; ``keyless`` are the paths that need none."""

    def __init__(self, app: ASGI, key: str, keyless: Collection[str]) -> None:
        self._app, self._key, self._keyless = app, key.encode(), keyless

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request that has the key."""
        if scope["type"] != "http" or scope["path"] in self._keyless or self._has_key(scope["headers"]):
            return await self._app(scope, receive, send)
        problem = Problem(401, "send the server's key in the header X-API-Key", headers={"WWW-Authenticate": "X-API-Key"})
        return await problem.response()(scope, receive, send)

    def _has_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        return any(hmac.compare_digest(value, self._key) for name, value in headers if name == b"x-api-key")
