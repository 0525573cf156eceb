"""Requests to /explain: from a query to a validated job without its image, each limit named."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ebjdat_serve.counterfactual import LONGEST, RADIUS, Norm
from ebjdat_serve.manifest import Manifest
from ebjdat_serve.pixels import Pixels
from ebjdat_serve.server.payloads import ExplainJob
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.bodies import once
from ebjdat_serve.server.read.generate_request import MAX_FIELDS, describe, find_label, number
from ebjdat_serve.server.settings import Settings

TILES = 3
"""Images side by side in a strip: input, counterfactual, difference."""


class ExplainQuery(BaseModel):
    """What to look for; the body is the image."""

    model_config = ConfigDict(extra="forbid")
    to: Annotated[str | None, Field(description="class index or name; the runner-up when absent")] = None
    norm: Annotated[Norm, Field(description="norm of the ball")] = "l2"
    radius: Annotated[
        float | None,
        Field(
            gt=0, allow_inf_nan=False, description=f"of the ball, in pixel units of [0,1]; l2: {RADIUS['l2']:g}, linf: 32/255 by default"
        ),
    ] = None
    probability: Annotated[
        float, Field(ge=0, lt=1, description="of the class, that the counterfactual must have; 0: the largest is enough")
    ] = 0
    format: Literal["png", "json"] = "png"
    stream: Annotated[bool, Field(description="server-sent events: previews of the search, then what format=json answers")] = False
    scale: Annotated[int, Field(description="PNG pixels per image pixel")] = 1

    _no_booleans = field_validator("radius", "probability", "scale", mode="before")(number)


@dataclass(frozen=True)
class ExplainRequest:
    """A validated request."""

    query: ExplainQuery
    target: int | None
    radius: float
    every: int  # steps between previews, 0: none

    def job(self, image: Pixels) -> ExplainJob:
        """Return the job for a worker, of one image (1, H, W, 3)."""
        return ExplainJob(image, self.target, self.query.norm, self.radius, self.query.probability, self.every)


def validate(request: Request, manifest: Manifest, settings: Settings) -> ExplainRequest:
    """Return what the query of ``request`` asks for; raise Problem 422 for a wrong type, an unknown name or a number beyond its limit."""
    if request.scope["query_string"].count(b"&") >= MAX_FIELDS:
        raise Problem(422, f"the query may have {MAX_FIELDS} parameters")
    return validate_values(once(request.query_params.multi_items()), manifest, settings)


def validate_values(values: dict[str, Any], manifest: Manifest, settings: Settings) -> ExplainRequest:
    """Return what ``values`` ask for; raise Problem 422 for a wrong type, an unknown name or a number beyond its limit."""
    try:
        query = ExplainQuery.model_validate(values)
    except ValidationError as error:
        raise Problem(422, describe(error, ExplainQuery)) from None
    size, s = manifest.input, settings
    radius = RADIUS[query.norm] if query.radius is None else query.radius
    widest = 1.0 if query.norm == "linf" else math.sqrt(3 * size.height * size.width)
    if radius > widest:
        raise Problem(422, f"radius must be above 0 and at most {widest:.6g}, which holds every image, in {query.norm}; not {radius:g}")
    if not 1 <= query.scale <= s.max_scale:
        raise Problem(422, f"scale must be 1 to {s.max_scale}, not {query.scale}")
    if TILES * query.scale**2 * size.height * size.width > s.max_sheet:
        raise Problem(422, f"{TILES} x scale^2 x {size.height} x {size.width} may be at most {s.max_sheet} pixels; lower scale")
    target = None if query.to is None else find_label(query.to, manifest.labels, "to")
    return ExplainRequest(query, target, radius, math.ceil(LONGEST / s.max_previews) if query.stream else 0)
