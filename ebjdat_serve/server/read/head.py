"""HEAD, which load balancers probe with."""

from collections.abc import Awaitable, Callable, Collection
from typing import Any

ASGI = Callable[[Any, Any, Any], Awaitable[None]]


class HeadMiddleware:
    """Answers HEAD as GET without a body, except on paths that have an endpoint for it of their ``own``, or none.

    Those are the ones where workers would compute an answer that nobody reads.
    """

    def __init__(self, app: ASGI, own: Collection[str]) -> None:
        self._app, self._own = app, own

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass HEAD on as GET; uvicorn sends no body in response to HEAD."""
        if scope["type"] == "http" and scope["method"] == "HEAD" and scope["path"] not in self._own:
            scope = {**scope, "method": "GET"}
        return await self._app(scope, receive, send)
