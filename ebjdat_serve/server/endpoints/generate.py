"""/generate."""

import contextlib
from typing import Any

from fastapi import Request, Response

from ebjdat_serve.server.answer import Schema, respond
from ebjdat_serve.server.answer.images import GenerateAnswer, GenerateAnswers, GeneratePreviewEvent, PngHeaders
from ebjdat_serve.server.answer.public import (
    PublicGenerateAnswer,
    PublicPngHeaders,
    PublicPreviewEvent,
    of_public_data,
    told,
)
from ebjdat_serve.server.compute.generate_task import GENERATE
from ebjdat_serve.server.endpoints.endpoint import ERRORS, Endpoint, Service, generate_queue
from ebjdat_serve.server.endpoints.streams import EventStream, events, in_encoder
from ebjdat_serve.server.payloads import GeneratedImages
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.request_queue import PendingRequest
from ebjdat_serve.server.read.generate_request import GenerateQuery, read_values, validate
from ebjdat_serve.server.served_model import ServedModel
from ebjdat_serve.server.settings import Profile, Settings

DRAWS = "draws"


async def generate(service: Service, request: Request) -> Response:
    """Draw images of one class by conditional short-run SGLD, marked as AI-made, as a PNG (grid), as JSON, or as a stream of events."""
    settings = service.settings
    generate_queue(service, service.manager.active, "generate", DRAWS)  # before the body is read
    profile, client = settings.profile_for(request.scope), request.scope["client_name"]
    values = await read_values(request, settings)
    with contextlib.ExitStack() as stack:
        model = service.manager.active
        queue = generate_queue(service, model, "generate", DRAWS)  # which may be another model by now
        check_data(model, profile, settings)
        deadline = stack.enter_context(queue.slot(model.key, client))
        wanted = validate(values, model.bundle.manifest, settings)
        stack.enter_context(service.access.chains(request, wanted.job.n))
        queue.admit(client, wanted.job)
        pending = PendingRequest(model.key, GENERATE.name, wanted.job, request, client, deadline)
        stack.enter_context(queue.waiting(pending))
        answers = GenerateAnswers(model, wanted.job, wanted.query.temperature, wanted.query.scale, settings.alpha)
        if wanted.query.stream:
            sent = events(
                service,
                queue,
                pending,
                opening="drawing",
                preview=lambda made: told(answers.preview(made), profile),
                done=lambda made: told(answers.document(made), profile),
            )
            return EventStream(sent, stack.pop_all())
        result: GeneratedImages = await pending.future
        if wanted.query.format == "json":
            return await in_encoder(service, lambda: respond(told(answers.document(result), profile)))
        return await in_encoder(service, lambda: png(*answers.sheet(result), profile))


async def generate_head(service: Service, request: Request) -> Response:
    """Check a request as GET does, and draw nothing."""
    model = service.manager.active
    generate_queue(service, model, "generate", DRAWS)
    check_data(model, service.settings.profile_for(request.scope), service.settings)
    query = validate(await read_values(request, service.settings), model.bundle.manifest, service.settings).query
    kind = "text/event-stream" if query.stream else "application/json" if query.format == "json" else "image/png"
    return Response(media_type=kind)


def check_data(model: ServedModel, profile: Profile, settings: Settings) -> None:
    """Raise Problem 403 when the profile tells nothing of the training set, which generated images do."""
    if profile == "public" and not settings.allow_generate and not of_public_data(model.bundle.manifest.provenance):
        detail = f"{model.name} was not trained on public data alone, and its images tell what it was trained on"
        raise Problem(403, f"{detail}; serve --allow-generate allows /generate under --profile public")


def png(sheet: bytes, headers: PngHeaders, profile: Profile) -> Response:
    """Return a PNG with what a profile tells of it in its headers."""
    return Response(sheet, media_type="image/png", headers=told(headers, profile).model_dump(exclude_none=True))


QUERY = GenerateQuery.model_json_schema()
PARAMETERS = [
    {"name": name, "in": "query", "required": name in QUERY["required"], "schema": schema} for name, schema in QUERY["properties"].items()
]
PICTURES = "a PNG, JSON with format=json, or events with stream=true: preview, then done, which has what format=json answers"


def pictures(headers: type[Schema], preview: type[Schema]) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says of a 200 beside its JSON: headers of a PNG, and events."""
    properties = headers.model_json_schema(mode="serialization")["properties"]
    return {
        200: {
            "content": {
                "image/png": {"schema": {"type": "string", "format": "binary"}},
                "text/event-stream": {"schema": preview.model_json_schema()},
            },
            "headers": {
                name: {"schema": {"type": "string"}, "description": schema.get("description", "")} for name, schema in properties.items()
            },
            "description": PICTURES,
        }
    }


SHARED: dict[str, Any] = {
    "answer": GenerateAnswer,
    "public_answer": PublicGenerateAnswer,
    "operations": [GENERATE],
    "takes": "generate",
    "responses": {**ERRORS, **pictures(PngHeaders, GeneratePreviewEvent)},
    "public_responses": {**ERRORS, **pictures(PublicPngHeaders, PublicPreviewEvent)},
    "example": "/generate?class=3",
}
GENERATE_GET = Endpoint("/generate", generate, method="GET", openapi={"parameters": PARAMETERS}, **SHARED)
GENERATE_HEAD = Endpoint("/generate", generate_head, method="HEAD", public_answer=PublicGenerateAnswer, operations=[GENERATE], hidden=True)
GENERATE_POST = Endpoint(
    "/generate",
    generate,
    openapi={"requestBody": {"required": False, "content": {"application/json": {"schema": QUERY}}}},
    **SHARED,
)
