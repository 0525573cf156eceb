"""Requests to /generate: from a query or a body to a validated job, each limit named."""

import math
import secrets
import unicodedata
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from ebjdat_serve.bounds import LONGEST_LABEL, class_number
from ebjdat_serve.manifest import Manifest
from ebjdat_serve.server.payloads import GenerateJob
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.bodies import once, parse_json, read_body
from ebjdat_serve.server.settings import Settings

PREVIEWS = 10
"""Previews of a stream that does not say how many."""
MAX_BODY = 64 * 1024
"""Bytes of a request body, which holds a few numbers."""
MAX_FORM = 8 * 1024
"""Bytes of a form, as of a target: its escapes are replaced at once, in Python."""
MAX_FIELDS = 32
"""Parameters of a query, a form or a JSON object, of which there are eleven."""


def number(value: Any) -> Any:
    """Return a value that may be a number; refuse true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "a number is needed, not true or false")
    return value


class GenerateQuery(BaseModel):
    """What to draw; GET takes it as query parameters, POST as query parameters or as a JSON object."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    class_: Annotated[StrictStr | StrictInt, Field(alias="class", description="class index or name")]
    n: Annotated[int, Field(description="how many images")] = 1
    steps: Annotated[int | None, Field(description="Langevin steps; the bundle's own number by default, and at most")] = None
    step_size: Annotated[
        float | None, Field(gt=0, le=100, description="step size in pixel units of [0,1]; the bundle's own by default")
    ] = None
    temperature: Annotated[float, Field(ge=0, le=1e4, description="noise variance in units of the bundle's own; 0: no noise")] = 1.0
    seed: Annotated[
        int | None, Field(ge=0, le=2**31 - 1, description="image i's noise depends on seed + i; drawn at random when absent")
    ] = None
    format: Literal["png", "json"] = "png"
    stream: Annotated[bool, Field(description="server-sent events: previews with energies, then what format=json answers")] = False
    every: Annotated[int | None, Field(ge=1, description="steps between previews; a tenth of all by default")] = None
    scale: Annotated[int, Field(description="PNG pixels per image pixel")] = 1

    _no_booleans = field_validator("n", "steps", "step_size", "temperature", "seed", "every", "scale", mode="before")(number)


@dataclass(frozen=True)
class GenerateRequest:
    """A validated request: what the client asked for, and the job for a worker."""

    query: GenerateQuery
    job: GenerateJob


async def read_values(request: Request, settings: Settings) -> dict[str, Any]:
    """Return query parameters and body as one object.

    Raises Problem: 400 not JSON, 413 too large, 415 another content type, 422 no object or a parameter that is given twice.
    """
    if request.scope["query_string"].count(b"&") >= MAX_FIELDS:
        raise Problem(422, f"the query may have {MAX_FIELDS} parameters")
    query: dict[str, Any] = once(request.query_params.multi_items())
    if request.method == "POST":
        async with read_body(request, MAX_BODY, settings) as body:
            sent = parse_body(request, body) if body else {}
        return once([*query.items(), *sent.items()])
    return query


def parse_body(request: Request, body: bytes | bytearray) -> dict[str, Any]:
    """Return the body of a POST as an object."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":  # curl -d class=3
        if len(body) > MAX_FORM:
            raise Problem(413, f"the form may have {MAX_FORM} bytes; send application/json")
        try:
            fields = parse_qsl(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except ValueError:
            raise Problem(422, f"the form may have {MAX_FIELDS} fields") from None
        return once(fields)
    if kind != "application/json":
        raise Problem(415, f"content type {kind!r} is not accepted; send application/json, a form, or query parameters and no body")
    found = parse_json(body)
    if not isinstance(found, dict):
        raise Problem(422, 'send a JSON object such as {"class": 3, "n": 4}')
    if len(found) > MAX_FIELDS:
        raise Problem(422, f"the JSON object may have {MAX_FIELDS} fields")
    return found


def validate(values: dict[str, Any], manifest: Manifest, settings: Settings) -> GenerateRequest:
    """Return the request that ``values`` describe.

    Raises Problem: 422 a wrong type, an unknown name or a number beyond its limit; 409 a class without a prior.
    """
    labels = manifest.labels
    if "class" not in values:
        raise Problem(422, f"class is missing: an index 0 to {len(labels) - 1} or a name, {', '.join(labels)}")
    try:
        query = GenerateQuery.model_validate(values)
    except ValidationError as error:
        raise Problem(422, describe(error, GenerateQuery)) from None
    label = find_label(query.class_, labels)
    if manifest.prior and not manifest.prior.images[label]:
        raise Problem(409, f"nothing is drawn of class {labels[label]!r}: no prior was fitted to it (ebjdat-serve prior BUNDLE DIR)")
    steps = min(manifest.sampler.steps, max_steps(manifest, settings)) if query.steps is None else query.steps
    check_limits(query, steps, manifest, settings)
    seed = secrets.randbelow(2**31 - settings.max_samples) if query.seed is None else query.seed
    every = 0 if not query.stream else query.every or max(1, steps // PREVIEWS)
    sampler = replace(
        manifest.sampler,
        steps=steps,
        step_size=manifest.sampler.step_size if query.step_size is None else query.step_size,
        noise_std=manifest.sampler.noise_std * math.sqrt(query.temperature),
    )
    return GenerateRequest(query, GenerateJob(label, query.n, sampler, seed, every))


def describe(error: ValidationError, query: type[BaseModel]) -> str:
    """Return pydantic's findings of a ``query`` as one readable line."""
    found = []
    for item in error.errors(include_context=False):
        place = ".".join(str(part) for part in item["loc"] if part not in ("str", "int"))
        if item["type"] == "extra_forbidden":
            known = ", ".join(field.alias or name for name, field in query.model_fields.items())
            found.append(f"{place[:40]} is unknown; known are {known}")
        else:
            found.append(f"{place}: {item['msg']}" if place else item["msg"])
    return "; ".join(found)


def find_label(wanted: str | int, labels: list[str], what: str = "class") -> int:
    """Return the class index that an index or a name means; a name in any case and either of Unicode's normal forms.

    Raises Problem 422, in which the parameter is named ``what``.
    """
    text = str(wanted).strip()
    if len(text) > LONGEST_LABEL:
        raise Problem(422, f"{what} may have {LONGEST_LABEL} characters: an index 0 to {len(labels) - 1} or a name, {', '.join(labels)}")
    text = unicodedata.normalize("NFC", text)
    if not isinstance(wanted, int):
        known = [unicodedata.normalize("NFC", label) for label in labels]
        folded = [label.casefold() for label in known]
        for name, among in ((text, known), (text.casefold(), folded)):
            if name in among:
                return among.index(name)
    if (number := class_number(text, len(labels))) is not None:
        return number
    raise Problem(422, f"{what} {text[:40]!r} is unknown: an index 0 to {len(labels) - 1} or a name, {', '.join(labels)}")


def check_limits(query: GenerateQuery, steps: int, manifest: Manifest, settings: Settings) -> None:
    """Raise Problem 422 for a number beyond its limit."""
    s = settings
    for name, value, limit in (
        ("n", query.n, s.max_samples),
        ("steps", steps, max_steps(manifest, s)),
        ("scale", query.scale, s.max_scale),
    ):
        if not 1 <= value <= limit:
            tuned = ", the number that its sampler was tuned for (serve --max-steps raises it)" if name == "steps" else ""
            raise Problem(422, f"{name} must be 1 to {limit}{tuned if not s.max_steps else ''}, not {value}")
    size = manifest.input
    if query.n * query.scale**2 * size.height * size.width > s.max_sheet and (query.format == "png" or query.stream):
        raise Problem(422, f"n x scale^2 x {size.height} x {size.width} may be at most {s.max_sheet} pixels; lower n or scale")
    if query.n * steps > s.max_work:
        raise Problem(422, f"n x steps must be at most {s.max_work}, not {query.n} x {steps}")
    if query.every is not None and not query.stream:
        raise Problem(422, "every is for stream=true")
    if query.every is not None and query.every * s.max_previews < steps:
        least = -(-steps // s.max_previews)
        raise Problem(422, f"every must be at least {least} for {steps} steps: a stream shows at most {s.max_previews} previews")
    if query.stream and query.n > s.max_streamed:
        raise Problem(422, f"n must be 1 to {s.max_streamed} with stream=true, not {query.n}")


def max_steps(manifest: Manifest, settings: Settings) -> int:
    """Return the most steps of a chain."""
    return settings.max_steps or manifest.sampler.steps
