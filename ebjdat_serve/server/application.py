"""The app of a server: endpoints, middleware and error pages; and how it ends."""

import asyncio

from fastapi import FastAPI

from ebjdat_serve import __version__
from ebjdat_serve.keys import Scope
from ebjdat_serve.server import api_docs, problems
from ebjdat_serve.server.answer.explanations import StripHeaders
from ebjdat_serve.server.answer.headers import ResponseHeadersMiddleware
from ebjdat_serve.server.answer.images import PngHeaders
from ebjdat_serve.server.answer.v2_errors import V2ErrorMiddleware
from ebjdat_serve.server.endpoints.endpoint import DirectRoute, Shared
from ebjdat_serve.server.observer import TraceMiddleware
from ebjdat_serve.server.read import browsers
from ebjdat_serve.server.read.auth import ApiKeyMiddleware
from ebjdat_serve.server.read.head import HeadMiddleware
from ebjdat_serve.server.read.http_protocol import connections
from ebjdat_serve.server.read.model_path import ModelPathMiddleware
from ebjdat_serve.server.read.root_path import RootPathMiddleware
from ebjdat_serve.server.read.v2_path import V2PathMiddleware
from ebjdat_serve.server.v2_protocol import HEADER_LENGTH

FIELDS = [field.alias or "" for kind in (PngHeaders, StripHeaders) for field in kind.model_fields.values()]
EXPOSED = list(dict.fromkeys([*FIELDS, HEADER_LENGTH]))
"""Headers that pages of other sites may read."""


class Application:
    """What LitServe's process installs and drains."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def install(self, app: FastAPI) -> None:
        """Add the endpoints, middleware and error pages to ``app``."""
        settings, endpoints = self._shared.settings, self._shared.endpoints
        app.title, app.version = "ebjdat_serve", __version__
        problems.install(app, settings)
        api_docs.install(app, settings)
        app.add_middleware(HeadMiddleware, own={one.path for one in endpoints if one.operations})
        app.add_middleware(ApiKeyMiddleware, access=self._shared.access, scopes=self.scopes())
        app.add_middleware(ModelPathMiddleware, paths={one.path for one in endpoints if one.per_model})
        app.add_middleware(V2PathMiddleware)
        browsers.install(app, settings, exposed=EXPOSED)
        app.add_middleware(V2ErrorMiddleware)
        app.add_middleware(ResponseHeadersMiddleware, draining=lambda: self._shared.draining)
        if prefix := api_docs.prefix_of(settings):
            app.add_middleware(RootPathMiddleware, prefix=prefix)
        app.add_middleware(TraceMiddleware, observer=self._shared.observer)
        for endpoint in endpoints:
            endpoint.install(app, self._shared)
        app.router.routes.sort(key=lambda route: not isinstance(route, DirectRoute))  # they are tried in turn, FastAPI's own last

    def scopes(self) -> dict[str, set[Scope]]:
        """Return, by path, the scopes of which an API key needs one; none where no key is needed."""
        endpoints = self._shared.endpoints
        found: dict[str, set[Scope]] = {path: {"operate"} for path in api_docs.PATHS}
        for path in {one.path for one in endpoints}:
            here = [one for one in endpoints if one.path == path]
            said = [one.scopes for one in here if one.scopes is not None]
            kinds: set[Scope] = {operation.kind for one in here for operation in one.operations}
            found[path] = set().union(*said) if said else kinds or {"operate"}
        return found

    def begin_drain(self) -> None:
        """Have /health answer 503 from now on, and connections end after their next response."""
        self._shared.draining = True

    async def drain(self) -> None:
        """Wait for the requests in progress, longer for /generate than for others; then fail those that are left."""
        loop, settings, services = asyncio.get_running_loop(), self._shared.settings, self._shared.services.values()
        began, decoders = loop.time(), self._shared.decoder.decoders
        queues = [queue for service in services for queue in service.queues]
        while any(queue.active for queue in queues) or connections():  # uvicorn has closed the idle connections
            await asyncio.sleep(0.1)
            if loop.time() - began > settings.last_answers:
                await decoders.close()  # what is decoded by then is still classified
            drawing = any(service.generate_queue and service.generate_queue.chains for service in services)
            if loop.time() - began > (settings.generate_graceful_timeout if drawing else settings.graceful_timeout):
                break
        for queue in queues:
            queue.close("the server is stopping; try again when it is back")
        await decoders.close()
        await self._shared.drift_file.close(self._shared.drift_states())
