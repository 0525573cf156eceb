"""HEAD, which load balancers probe with."""

from collections.abc import Awaitable, Callable
from typing import Any

ASGI = Callable[[Any, Any, Any], Awaitable[None]]
OWN = ("/generate",)
"""Paths whose endpoint answers HEAD itself: GET would draw an image for nothing."""


class HeadMiddleware:
    """Answers HEAD as GET without a body, wherever there is a GET."""

    def __init__(self, app: ASGI) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass HEAD on as GET; uvicorn sends no body in response to HEAD."""
        if scope["type"] == "http" and scope["method"] == "HEAD" and scope["path"] not in OWN:
            scope = {**scope, "method": "GET"}
        return await self._app(scope, receive, send)
