"""/classify and /energy."""

import contextlib
from typing import Annotated

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ebjdat_serve.keys import Scope
from ebjdat_serve.server.answer import respond
from ebjdat_serve.server.answer.predictions import (
    ClassifyAnswer,
    ClassifyList,
    EnergyAnswer,
    EnergyList,
    checked_answer,
    classify_answer,
    energy_answer,
)
from ebjdat_serve.server.answer.public import PublicClassifyAnswer, PublicClassifyList, told
from ebjdat_serve.server.compute.check_task import CHECK
from ebjdat_serve.server.compute.model import PREDICT
from ebjdat_serve.server.endpoints.endpoint import IMAGE_BODY, Endpoint, ImageResult, Service
from ebjdat_serve.server.payloads import CheckJob
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.request_queue import PendingRequest
from ebjdat_serve.server.read.bodies import once
from ebjdat_serve.server.read.generate_request import MAX_FIELDS, describe
from ebjdat_serve.server.served_model import ServedModel
from ebjdat_serve.server.settings import OPERATE, Check, Settings


async def classify(service: Service, request: Request) -> Response:
    """Return the class, its probability, whether the image is like the data and its label within reach, of one image or of a list."""
    settings, wanted = service.settings, CheckQuery.of(request, service.settings)
    if wanted.check == "reach" and settings.profile_for(request.scope) == "public":
        raise Problem(403, f"serve --profile public does not tell what check=reach finds: it takes a key of scope {OPERATE}")
    if wanted.check == "reach":
        checked = await run_check(service, request, wanted.radius)
        answer = checked_answer(checked.value, checked.listed, checked.model, settings.alpha)
        service.note(request, checked.model, checked.value.predictions, checked.value.reasons)
    else:
        result = await service.run_on_images(request, PREDICT)
        answer = classify_answer(result.value, result.listed, result.model, settings.alpha)
        service.note(request, result.model, result.value)
    return respond(told(answer, settings.profile_for(request.scope)))


async def run_check(service: Service, request: Request, radius: float) -> ImageResult:
    """Read the images of ``request``, and return what a generate worker's walks and searches make of them.

    Raises Problem for whatever is wrong with the request, and when it cannot be answered in time.
    """
    active = service.manager.active
    if active.no_check:
        raise Problem(409, f"{active.name}: {active.no_check}")  # before the body is read
    queue = service.generate_queue
    if queue is None:
        why = "it was started with a model that has none; restart it" if service.settings.generate_workers else "serve --generate-workers 0"
        raise Problem(409, f"check=reach takes gradients, and this server has no workers for them ({why})")
    with contextlib.ExitStack() as stack:
        model, images, listed, deadline = await service.read_images(request, queue, stack)
        if model.no_check or model.calibration is None:
            raise Problem(409, f"{model.name}: {model.no_check}")
        job, client = CheckJob(images, radius, model.calibration.reach_steps), request.scope["client_name"]
        stack.enter_context(service.access.chains(request, job.n))
        queue.admit(client, job)
        checked = await queue.submit(PendingRequest(model.key, CHECK.name, job, request, client, deadline))
        return ImageResult(checked, listed, model)


class CheckQuery(BaseModel):
    """What the label is checked for."""

    model_config = ConfigDict(extra="forbid")
    check: Check
    radius: Annotated[float, Field(ge=1e-6, lt=1, allow_inf_nan=False, description="of the search, l-inf, pixels of [0,1]")]

    @staticmethod
    def of(request: Request, settings: Settings) -> "CheckQuery":
        """Return what ``request`` asks for, else what ``settings`` say; raise Problem 422 for what is neither."""
        usual: Check = settings.check if settings.profile_for(request.scope) == "full" else "none"
        if not request.scope["query_string"]:
            return CheckQuery(check=usual, radius=settings.check_radius)
        if request.scope["query_string"].count(b"&") >= MAX_FIELDS:
            raise Problem(422, f"the query may have {MAX_FIELDS} parameters")
        given = {"check": usual, "radius": settings.check_radius, **once(request.query_params.multi_items())}
        try:
            wanted = CheckQuery.model_validate(given)
        except ValidationError as error:
            raise Problem(422, describe(error, CheckQuery)) from None
        if wanted.check == "none" and "radius" in request.query_params:
            raise Problem(422, "radius is of check=reach, which was not asked for")
        return wanted


async def energy(service: Service, request: Request) -> Response:
    """Return E(x), E(x, y) for every class, the p-value and whether it is suspicious, of one image or of a list."""
    if "check" in request.query_params:
        raise Problem(422, "check is a parameter of /classify")
    refuse_without_energy(service.manager.active)  # before the body is read
    result = await service.run_on_images(request, PREDICT)
    refuse_without_energy(result.model)
    answer = energy_answer(result.value, result.listed, result.model, service.settings.alpha)
    service.note(request, result.model, result.value)
    return respond(answer)


def refuse_without_energy(model: ServedModel) -> None:
    """Raise Problem 409 with the reason why a model has no energy, if it has none."""
    if reason := model.lacks("energy"):
        raise Problem(409, f"{model.name} has no energy: {reason}; /classify answers its OOD score")


PARAMETERS = [
    {"name": name, "in": "query", "required": False, "schema": schema}
    for name, schema in CheckQuery.model_json_schema()["properties"].items()
]
SCOPES: tuple[Scope, ...] = ("classify",)
CLASSIFY = Endpoint(
    "/classify",
    classify,
    ClassifyAnswer | ClassifyList,
    public_answer=PublicClassifyAnswer | PublicClassifyList,
    operations=[PREDICT, CHECK],
    openapi={"parameters": PARAMETERS, **IMAGE_BODY},
    scopes=SCOPES,
)
ENERGY = Endpoint("/energy", energy, EnergyAnswer | EnergyList, operations=[PREDICT], openapi=IMAGE_BODY, takes="energy")
