"""Headers of every response."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import MutableHeaders

ASGI = Callable[[Any, Any, Any], Awaitable[None]]
DEFAULT_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
]
"""Of every response, also of those that uvicorn makes itself: it adds them."""


class ResponseHeadersMiddleware:
    """Keeps answers out of caches, unless they say otherwise, and ends connections while the server is draining."""

    def __init__(self, app: ASGI, draining: Callable[[], bool]) -> None:
        self._app, self._draining = app, draining

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, and its response back with the headers."""

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Cache-Control", "no-store")
                if self._draining():
                    headers["Connection"] = "close"
            await send(message)

        return await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
