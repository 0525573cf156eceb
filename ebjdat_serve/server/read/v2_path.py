"""Paths of the Open Inference Protocol v2: those that name a model or a version become the plain ones that keys' scopes go by."""

from collections.abc import Awaitable, Callable
from typing import Any

from ebjdat_serve.server.read.model_path import MODEL_NAME

ASGI = Callable[[Any, Any, Any], Awaitable[None]]
MODEL_VERSION = "model_version"
"""Key of an ASGI scope: the version of the model that a request is for; without it, the one that is served."""
PREFIX = "/v2/models/"
ALL_STATS = "/v2/models/stats"
"""Of all models, as in Triton; so are those of a model named stats."""
OF_A_MODEL = {"": "/v2/model", "/ready": "/v2/ready", "/infer": "/v2/infer", "/config": "/v2/config", "/stats": "/v2/stats"}
"""What follows /v2/models/NAME and /v2/models/NAME/versions/VERSION, and the path that it becomes."""


def plain(path: str) -> tuple[str, dict[str, str]]:
    """Return the plain path, and what the scope is to have beside; the same path where it names no model."""
    if not path.startswith(PREFIX) or path == ALL_STATS:
        return path, {}
    name, slash, rest = path.removeprefix(PREFIX).partition("/")
    named, rest = {MODEL_NAME: name}, slash + rest
    if rest.startswith("/versions/"):
        version, slash, rest = rest.removeprefix("/versions/").partition("/")
        named, rest = named | {MODEL_VERSION: version}, slash + rest
    if rest not in OF_A_MODEL or not all(named.values()):
        return path, {}
    return OF_A_MODEL[rest], named


class V2PathMiddleware:
    """Takes the model and its version off the protocol's paths and notes them in the scope."""

    def __init__(self, app: ASGI) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on under the plain path."""
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            path, named = plain(scope["path"])
            scope = {**scope, "path": path, "raw_path": path.encode(), **named}
        return await self._app(scope, receive, send)
