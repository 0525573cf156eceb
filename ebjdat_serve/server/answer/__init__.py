"""From a worker's result to a response: models from which the JSON and its documentation both come. A new name is a breaking change."""

from fastapi import Response
from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """A JSON object; NaN and infinity, which are not JSON, raise an error."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True, allow_inf_nan=False)


class Attributed(Schema):
    """An answer that names the model that made it, and the alpha of its flags."""

    alpha: float
    model: str


def respond(answer: Schema, status: int = 200) -> Response:
    """Return ``answer`` as JSON; fields that were not set are left out."""
    return Response(answer.model_dump_json(exclude_unset=True), status, media_type="application/json")
