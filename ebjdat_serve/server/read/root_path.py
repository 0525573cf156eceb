"""The path prefix under which a proxy serves this server."""

from collections.abc import Awaitable, Callable
from typing import Any

ASGI = Callable[[Any, Any, Any], Awaitable[None]]


class RootPathMiddleware:
    """Takes the prefix off a path, if the proxy has not: what follows sees the same paths with any prefix."""

    def __init__(self, app: ASGI, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on under its path without the prefix."""
        if scope["type"] == "http" and f"{scope['path']}/".startswith(f"{self._prefix}/"):
            path = scope["path"].removeprefix(self._prefix) or "/"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        return await self._app(scope, receive, send)
