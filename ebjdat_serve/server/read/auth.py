"""LIT_SERVER_API_KEY, LitServe's own variable, for our routes: LitServe would leave them open, close the probes, and compare with !=."""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.answer import problems

OPEN = ("/health",)
LOOKED_AT = ("/", "/health", "/info", "/docs", "/openapi.json")
VARIABLE = "LIT_SERVER_API_KEY"
ASGI = Callable[[Any, Any, Any], Awaitable[None]]


def api_key() -> str | None:
    """Return the server's key, None where there is none; the line end that a file of secrets has is no part of it.

    Raises EbjdatError for a variable that is set to nothing: it would leave a server open that was meant to be closed.
    """
    key = os.environ.get(VARIABLE)
    if key is None:
        return None
    if not key.strip():
        raise EbjdatError(f"{VARIABLE} is set and holds no key: give one, or unset it to serve without")
    return key.strip()


class Heads:
    """Answer HEAD, which balancers probe with, as GET without its body; drawing an image for it would be a waste."""

    def __init__(self, app: ASGI) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on as GET; the server knows that HEAD was asked, and sends no body."""
        if scope["type"] == "http" and scope["method"] == "HEAD" and scope["path"] in LOOKED_AT:
            scope = {**scope, "method": "GET"}
        return await self._app(scope, receive, send)


class Guard:
    """Answer 401 to whoever does not send the key as X-API-Key; probes need none."""

    def __init__(self, app: ASGI, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on what may pass."""
        if scope["type"] != "http" or scope["path"] in OPEN or self._knows(scope["headers"]):
            return await self._app(scope, receive, send)
        refusal = problems.document(401, "send the server's key in the header X-API-Key", {"WWW-Authenticate": "X-API-Key"})
        return await refusal(scope, receive, send)

    def _knows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        return any(hmac.compare_digest(value, self._key) for name, value in headers if name == b"x-api-key")
