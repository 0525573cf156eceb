"""/explain."""

import contextlib

from fastapi import Request, Response

from ebjdat_serve.keys import Scope
from ebjdat_serve.server.answer import respond
from ebjdat_serve.server.answer.explanations import ExplainAnswer, ExplainAnswers, ExplainPreviewEvent, StripHeaders
from ebjdat_serve.server.compute.explain_task import EXPLAIN
from ebjdat_serve.server.endpoints.endpoint import ERRORS, IMAGE_BODY, Endpoint, Service, generate_queue
from ebjdat_serve.server.endpoints.generate import pictures
from ebjdat_serve.server.endpoints.streams import EventStream, events, in_encoder
from ebjdat_serve.server.payloads import Explanation
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.request_queue import PendingRequest
from ebjdat_serve.server.read.explain_request import ExplainQuery, validate

EXPLAINS = "explains"


async def explain(service: Service, request: Request) -> Response:
    """Find the nearest image, within a ball, that the model takes for another class; marked as AI-made.

    It is an adversarial image, made on demand: a key needs the scope explain.
    """
    settings, client = service.settings, request.scope["client_name"]
    queue = generate_queue(service, service.manager.active, "gradient", EXPLAINS)
    validate(request, service.manager.active.bundle.manifest, settings)  # before the body is read
    with contextlib.ExitStack() as stack:
        model, images, listed, deadline = await service.read_images(request, queue, stack)
        if listed:
            raise Problem(422, 'send one image, as it is or as {"image": "<base64>"}: a request explains one')
        generate_queue(service, model, "gradient", EXPLAINS)  # which may be another model by now
        wanted = validate(request, model.bundle.manifest, settings)
        job = wanted.job(images)
        stack.enter_context(service.access.chains(request, job.n))
        queue.admit(client, job)
        pending = PendingRequest(model.key, EXPLAIN.name, job, request, client, deadline)
        stack.enter_context(queue.waiting(pending))
        answers = ExplainAnswers(model, job, wanted.query.scale, settings.alpha)
        if wanted.query.stream:
            sent = events(service, queue, pending, opening="searching", preview=answers.preview, done=answers.document)
            return EventStream(sent, stack.pop_all())
        found: Explanation = await pending.future
        if wanted.query.format == "json":
            return await in_encoder(service, lambda: respond(answers.document(found)))
        return await in_encoder(service, lambda: png(*answers.sheet(found)))


def png(sheet: bytes, headers: StripHeaders) -> Response:
    """Return a PNG with its headers."""
    return Response(sheet, media_type="image/png", headers=headers.model_dump())


PARAMETERS = [
    {"name": name, "in": "query", "required": False, "schema": schema}
    for name, schema in ExplainQuery.model_json_schema()["properties"].items()
]
SCOPES: tuple[Scope, ...] = ("explain",)
EXPLAIN_POST = Endpoint(
    "/explain",
    explain,
    ExplainAnswer,
    operations=[EXPLAIN],
    takes="gradient",
    responses={**ERRORS, **pictures(StripHeaders, ExplainPreviewEvent)},
    openapi={"parameters": PARAMETERS, **IMAGE_BODY},
    scopes=SCOPES,
)
