"""What an endpoint is, and what its handler works with."""

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from starlette.routing import request_response

from ebjdat_serve.keys import Scope
from ebjdat_serve.pixels import Pixels
from ebjdat_serve.server import problems
from ebjdat_serve.server.api_docs import prefix_of
from ebjdat_serve.server.compute.model import Operation
from ebjdat_serve.server.drift_states import Drift, DriftFile, State
from ebjdat_serve.server.model_manager import ModelManager
from ebjdat_serve.server.observer import Observer
from ebjdat_serve.server.payloads import Predictions
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.classify_queue import ClassifyQueue
from ebjdat_serve.server.queues.generate_queue import GenerateQueue
from ebjdat_serve.server.queues.request_queue import PendingRequest, RequestQueue
from ebjdat_serve.server.read.auth import Access
from ebjdat_serve.server.read.bodies import BodyMemory
from ebjdat_serve.server.read.images import ImageDecoder
from ebjdat_serve.server.read.model_path import MODEL_NAME
from ebjdat_serve.server.read.uploads import ImageBody, encoded_images, read_upload
from ebjdat_serve.server.served_model import ServedModel
from ebjdat_serve.server.settings import OPERATE, Settings
from ebjdat_serve.server.tallies import Newest, Tally
from ebjdat_serve.server.threads import in_daemon_thread

log = logging.getLogger("ebjdat_serve")
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"content": {problems.MEDIA_TYPE: {"schema": problems.SCHEMA}}, "description": problems.TITLES[code]}
    for code in (400, 401, 403, 408, 409, 413, 415, 421, 422, 429, 500, 503, 504)
}

BINARY, BASE64 = {"type": "string", "format": "binary"}, {"type": "string", "format": "byte"}

IMAGES = ImageBody(read_upload, encoded_images)
"""Images as they are, in a form or in JSON."""


def json_object(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with one field."""
    return {"type": "object", "required": [name], "properties": {name: schema}}


IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": BINARY},
            "multipart/form-data": {"schema": json_object("image", BINARY)},
            "application/json": {
                "schema": {"oneOf": [json_object("image", BASE64), json_object("images", {"type": "array", "items": BASE64})]}
            },
        },
    }
}
"""OpenAPI's description of a body with one image or several, for every endpoint that uses Service.run_on_images."""


class Shared:
    """What the models of a server share: access, processes that decode images and threads that encode them.

    ``services`` are by name; the first is the default, which paths without a name mean.
    """

    def __init__(self, settings: Settings, access: Access, endpoints: Sequence["Endpoint"]) -> None:
        self.settings, self.access, self.endpoints = settings, access, endpoints
        self.services: dict[str, Service] = {}
        self.draining = False  # a stop signal has come
        self.observer, self.drift_file = Observer(settings), DriftFile(settings.drift_state)
        self.decoder = ImageDecoder(settings)
        self.encoders = ThreadPoolExecutor(2, thread_name_prefix="encode")

    def drift_states(self) -> dict[str, State]:
        """Return the states of all drift tests."""
        return {of: drift.state() for service in self.services.values() for of, drift in service.drifts.items()}

    def service(self, scope: Mapping[str, Any]) -> "Service":
        """Return the service of the model that a request is for; raise Problem 404 for a name that no model has."""
        name = scope.get(MODEL_NAME)
        if name is None:
            return next(iter(self.services.values()))
        if name not in self.services:
            raise Problem(404, f"no model here is named {name}; GET {prefix_of(self.settings)}/models lists them")
        return self.services[name]


@dataclass(frozen=True)
class ImageResult:
    """What a worker says of the images of one request; ``listed``: they came as a list."""

    value: Any
    listed: bool
    model: ServedModel


class Service:
    """What handlers work with: one model, its queues, and what it shares with the other models of the server."""

    def __init__(
        self,
        name: str,
        manager: ModelManager,
        settings: Settings,
        classify: ClassifyQueue,
        generate: GenerateQueue | None,
        shared: "Shared",
    ) -> None:
        """``name`` is the model's in /models/NAME, ``settings`` are those of the server but for ``model`` and ``threads``."""
        self.name, self.manager, self.settings, self.shared = name, manager, settings, shared
        self.classify_queue, self.generate_queue = classify, generate
        self.access, self.decoder, self.encoders = shared.access, shared.decoder, shared.encoders
        self.tallies = Newest[Tally]()  # by bundle
        self.drifts = Newest[Drift]()  # by name of the model, bundle, graph, alpha and calibration

    @property
    def queues(self) -> list[RequestQueue]:
        """The queues of the model."""
        return [self.classify_queue, *([self.generate_queue] if self.generate_queue else [])]

    def tally(self, model: ServedModel) -> Tally:
        """Return what is counted of answers with ``model``."""
        return self.tallies.of(model.key, lambda: Tally(model.bundle.manifest.version, model.labels))

    def drift(self, model: ServedModel) -> Drift | None:
        """Return the drift test of ``model``, which goes on after a restart and begins anew with a version; None: it is not calibrated."""
        if (calibration := model.calibration) is None:
            return None
        of = f"{self.name} {model.key} {calibration.of} {self.settings.alpha:g}{f' {model.recorded.name}' if model.recorded else ''}"
        return self.drifts.of(of, lambda: self.shared.drift_file.take(of, Drift(calibration, self.settings.alpha)))

    def note(self, request: Request, model: ServedModel, predictions: Predictions, reasons: NDArray[np.bool_] | None = None) -> None:
        """Count what was predicted for a request, and write the audit log; ``reasons`` are those of a check."""
        trace, calibration = request.scope["trace"], model.calibration
        trace.model, trace.images, why = model, len(predictions.top), None
        if calibration is not None:
            hits = predictions.reasons if reasons is None else reasons
            trace.decisions = ["review" if any(row) else "accept" for row in hits.tolist()]
        self.tally(model).predict(predictions, trace.decisions)
        if (drift := self.drift(model)) and drift.note(predictions):
            log.error("drift of the traffic of %s, at /models/%s: %s", model.name, self.name, drift.words)
        if self.shared.observer.audit:
            if calibration is not None:
                names = [*calibration.reviewed, *(["reach"] if reasons is not None else [])]
                why = [[name for name, hit in zip(names, row, strict=True) if hit] for row in hits.tolist()]
            self.shared.observer.audited(trace, predictions, model.labels, why)

    async def run_on_images(self, request: Request, operation: Operation, body: ImageBody = IMAGES) -> ImageResult:
        """Read and decode the images of ``request``, and return what a classify worker makes of them by ``operation``.

        Raises Problem for whatever is wrong with the request, and when it cannot be answered in time.
        """
        queue = self.classify_queue
        with contextlib.ExitStack() as stack:
            model, images, listed, deadline = await self.read_images(request, queue, stack, body)
            client = request.scope["client_name"]
            value = await queue.submit(PendingRequest(model.key, operation.name, images, request, client, deadline))
            return ImageResult(value, listed, model)

    async def read_images(
        self, request: Request, queue: RequestQueue, stack: contextlib.ExitStack, body: ImageBody = IMAGES
    ) -> tuple[ServedModel, Pixels, bool, float]:
        """Return the model for ``request``, its images (n, H, W, 3), whether they came as a list, and its deadline.

        ``stack`` holds a slot of ``queue``, and memory for the pixels, from the end of the body on. Raises Problem for whatever is wrong
        with the request.
        """
        client = request.scope["client_name"]
        queue.check_room(client)  # before the body is read; a slow body takes no slot
        async with body.open(request, self.settings) as upload:
            model = self.manager.active
            deadline = stack.enter_context(queue.slot(model.key, client))
            encoded, listed = await body.images(request, upload, self.settings)
            contract = model.bundle.manifest.input
            memory = BodyMemory(self.settings.upload_memory, client)
            stack.callback(memory.release)
            memory.hold(3 * len(encoded) * contract.height * contract.width)
            trace = request.scope["trace"]
            trace.model = model
            if self.shared.observer.audit:
                trace.digests = await in_daemon_thread(lambda: [sha256(one[upload.made :]).hexdigest() for one in encoded])
            began = time.monotonic()
            images = await self.decoder.decode(request, encoded, contract, deadline, listed=listed)
            trace.decode = time.monotonic() - began
        return model, images, listed, deadline


def generate_queue(service: Service, model: ServedModel, capability: Literal["gradient", "generate"], what: str) -> GenerateQueue:
    """Return the queue of generate workers.

    Raises Problem 404 where the operator wants no such workers, 409 where ``model`` has no gradient or does not generate, and where the one
    that the server was started with had neither, so that there are no workers.
    """
    if not service.settings.generate_workers:
        raise Problem(404, f"this server {what} nothing: it was started by serve --generate-workers 0")
    if reason := model.lacks(capability):
        raise Problem(409, f"{model.name} {what} nothing: {reason}")
    if service.generate_queue is None:
        raise Problem(409, f"this server {what} nothing: it was started with a model that cannot, without workers for it; restart it")
    return service.generate_queue


Handler = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A path, its handler, the operations that the handler has workers run, and what the OpenAPI document says of it.

    The handler's docstring is the description; ``answer`` is the schema of a 200, ``responses`` are further ones by status.
    ``public_answer`` and ``public_responses`` are those of the public profile, which answers 403 where there is no ``public_answer``.
    """

    path: str
    handler: Handler
    answer: Any = None
    method: str = "POST"
    operations: Sequence[Operation] = ()
    responses: Mapping[int | str, dict[str, Any]] = field(default_factory=lambda: ERRORS)
    public_answer: Any = None
    public_responses: Mapping[int | str, dict[str, Any]] | None = None  # None: as ``responses``
    openapi: Mapping[str, Any] = field(default_factory=dict)
    example: str = ""  # an address to try
    hidden: bool = False  # from the document and the index
    takes: Literal["", "energy", "gradient", "generate"] = ""  # the capability without which it is answered 409
    scopes: Collection[Scope] | None = None  # an API key needs one of these, no key if there is none; None: as operations say, or operate
    per_model: bool = True  # also under /models/NAME

    def __post_init__(self) -> None:
        if "{" in self.path:
            raise ValueError(f"{self.path}: scopes of keys go by paths as they are; take parameters from the query or the body")

    def impossible(self, model: ServedModel) -> bool:
        """Whether the model lacks what the endpoint takes."""
        return bool(self.takes and model.lacks(self.takes))

    @property
    def public(self) -> bool:
        """Whether the public profile has an answer."""
        return self.public_answer is not None

    def install(self, app: FastAPI, shared: Shared) -> None:
        """Add the endpoint to ``app``."""
        documented = shared.settings.profile
        responses = self.public_responses if documented == "public" and self.public_responses is not None else self.responses

        async def endpoint(request: Request) -> Response:
            trace = request.scope["trace"]
            trace.route = self.path
            if not self.public and shared.settings.profile_for(request.scope) == "public":
                also = "".join(f" and {scope}" for scope in sorted(self.scopes or ()) if scope != OPERATE)
                raise Problem(403, f"{self.path} is not part of serve --profile public: it takes a key of scope {OPERATE}{also}")
            trace.service = service = shared.service(request.scope)
            trace.model = service.manager.active  # a handler may read the request for a later one
            return await self.handler(service, request)

        app.router.add_api_route(
            self.path,
            endpoint,
            methods=[self.method],
            name=self.handler.__name__,
            description=self.handler.__doc__,
            response_model=self.answer if documented == "full" else self.public_answer,
            responses=dict(responses),
            openapi_extra=dict(self.openapi) or None,
            include_in_schema=not self.hidden and (documented == "full" or self.public),
            route_class_override=DirectRoute,
        )


class DirectRoute(APIRoute):
    """A route that FastAPI documents and Starlette runs: handlers parse requests and build responses themselves."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.app = request_response(endpoint)
