"""/models/NAME/PATH, which is PATH of one of several models."""

from collections.abc import Awaitable, Callable, Collection
from typing import Any

ASGI = Callable[[Any, Any, Any], Awaitable[None]]
MODEL_NAME = "model_name"
"""Key of an ASGI scope: the name of the model that a request is for; without it, the default."""
PREFIX = "/models/"


class ModelPathMiddleware:
    """Takes /models/NAME off a path and notes the name: what follows, the scopes of keys included, sees the paths of one model.

    ``paths`` are those that a model has; /models/NAME alone is its /info.
    """

    def __init__(self, app: ASGI, paths: Collection[str]) -> None:
        self._app, self._paths = app, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on under the path of the model."""
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            name, slash, rest = scope["path"].removeprefix(PREFIX).partition("/")
            path = f"/{rest}" if slash else "/info"
            if name and path in self._paths:
                scope = {**scope, "path": path, "raw_path": path.encode(), MODEL_NAME: name}
        return await self._app(scope, receive, send)
