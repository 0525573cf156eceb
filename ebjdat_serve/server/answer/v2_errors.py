"""Errors on the paths of the Open Inference Protocol v2: {"error": "..."}, the only ones that its clients read."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from ebjdat_serve.server.problems import MEDIA_TYPE, v2_error
from ebjdat_serve.server.v2_protocol import is_v2

ASGI = Callable[[Any, Any, Any], Awaitable[None]]


class V2ErrorMiddleware:
    """Turns problem documents into the protocol's errors, whoever made them, on its paths alone."""

    def __init__(self, app: ASGI) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, and its response back."""
        if scope["type"] != "http" or not is_v2(scope["path"]):
            return await self._app(scope, receive, send)
        start: Any = None  # of a problem document, until its body is here
        held = bytearray()

        async def send_error(message: Any) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and (b"content-type", MEDIA_TYPE.encode()) in message["headers"]:
                start = message
            elif start is None:
                await send(message)
            elif message.get("more_body"):
                held.extend(message["body"])
            else:
                error = v2_error(start["status"], json.loads(held + message["body"])["detail"])
                own = {name for name, _ in error.raw_headers}
                kept = [(name, value) for name, value in start["headers"] if name not in own]
                await send({**start, "status": error.status_code, "headers": [*kept, *error.raw_headers]})
                await send({**message, "body": error.body})

        return await self._app(scope, receive, send_error)
