"""/classify and /energy."""

from typing import Any

from fastapi import Request, Response

from ebjdat_serve.server.answer.predictions import (
    ClassifyAnswer,
    ClassifyList,
    EnergyAnswer,
    EnergyList,
    classify_answer,
    energy_answer,
)
from ebjdat_serve.server.answer.schema import respond
from ebjdat_serve.server.compute.operations import PREDICT
from ebjdat_serve.server.endpoints.endpoint import Endpoint, Service

BINARY, BASE64 = {"type": "string", "format": "binary"}, {"type": "string", "format": "byte"}


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


async def classify(service: Service, request: Request) -> Response:
    """Return the class, its probability, the energy and whether it is suspicious, of one image or of a list."""
    result = await service.run_on_images(request, PREDICT)
    return respond(classify_answer(result.value, result.listed, result.model, service.settings.alpha))


async def energy(service: Service, request: Request) -> Response:
    """Return E(x), E(x, y) for every class, the p-value and whether it is suspicious, of one image or of a list."""
    result = await service.run_on_images(request, PREDICT)
    return respond(energy_answer(result.value, result.listed, result.model, service.settings.alpha))


CLASSIFY = Endpoint("/classify", classify, ClassifyAnswer | ClassifyList, operations=[PREDICT], openapi=IMAGE_BODY)
ENERGY = Endpoint("/energy", energy, EnergyAnswer | EnergyList, operations=[PREDICT], openapi=IMAGE_BODY)
