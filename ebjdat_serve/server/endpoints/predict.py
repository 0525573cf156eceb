"""/classify and /energy."""

from fastapi import Request, Response

from ebjdat_serve.server.answer import respond
from ebjdat_serve.server.answer.predictions import (
    ClassifyAnswer,
    ClassifyList,
    EnergyAnswer,
    EnergyList,
    classify_answer,
    energy_answer,
)
from ebjdat_serve.server.answer.public import PublicClassifyAnswer, PublicClassifyList, told
from ebjdat_serve.server.compute.model import PREDICT
from ebjdat_serve.server.endpoints.endpoint import IMAGE_BODY, Endpoint, Service


async def classify(service: Service, request: Request) -> Response:
    """Return the class, its probability, the energy and whether it is suspicious, of one image or of a list."""
    result = await service.run_on_images(request, PREDICT)
    answer = classify_answer(result.value, result.listed, result.model, service.settings.alpha)
    return respond(told(answer, service.settings.profile_for(request.scope)))


async def energy(service: Service, request: Request) -> Response:
    """Return E(x), E(x, y) for every class, the p-value and whether it is suspicious, of one image or of a list."""
    result = await service.run_on_images(request, PREDICT)
    return respond(energy_answer(result.value, result.listed, result.model, service.settings.alpha))


CLASSIFY = Endpoint(
    "/classify",
    classify,
    ClassifyAnswer | ClassifyList,
    public_answer=PublicClassifyAnswer | PublicClassifyList,
    operations=[PREDICT],
    openapi=IMAGE_BODY,
)
ENERGY = Endpoint("/energy", energy, EnergyAnswer | EnergyList, operations=[PREDICT], openapi=IMAGE_BODY)
