"""LIT_SERVER_API_KEY, LitServe's own variable, for our routes: LitServe would leave them open, close the probes, and compare with !=."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from ebjdat_serve.server import problems

OPEN = ("/health",)
ASGI = Callable[[Any, Any, Any], Awaitable[None]]


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
