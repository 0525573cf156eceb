"""Requests to /generate: from a query or a body to a validated order, each limit named."""

import contextlib
import math
import secrets
import unicodedata
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from ebjdat_serve.bundle import Manifest
from ebjdat_serve.server.answer.problems import Problem
from ebjdat_serve.server.answer.responses import Order, Words
from ebjdat_serve.server.answer.schemas import GenerateQuery
from ebjdat_serve.server.ipc import Job
from ebjdat_serve.server.read.bodies import parse_json, read_body
from ebjdat_serve.server.settings import Settings

PREVIEWS = 10
MAX_BODY = 64 * 1024


async def read_values(request: Request) -> dict[str, Any]:
    """Return query parameters and body as one object.

    Raises Problem: 400 not JSON, 413 too large, 415 another content type, 422 no object.
    """
    values: dict[str, Any] = dict(request.query_params)
    if request.method == "POST":
        async with read_body(request, MAX_BODY) as body:
            values |= document(request, body) if body else {}
    return values


def make_order(values: dict[str, Any], words: Words, settings: Settings) -> Order:
    """Return what is asked for.

    Raises Problem 422 beyond a limit, RequestValidationError for a number that is none.
    """
    manifest, names = words.served.bundle.manifest, words.names
    if "class" not in values:
        raise Problem(422, f"class is missing: an index 0 to {len(names) - 1} or a name, {', '.join(names)}")
    try:
        query = GenerateQuery.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_context=False)) from None
    label = find_label(query.class_, names)
    steps = min(manifest.sampler.steps, horizon_of(manifest, settings)) if query.steps is None else query.steps
    check_work(query, steps, manifest, settings)
    seed = secrets.randbelow(2**31 - settings.max_samples) if query.seed is None else query.seed
    every = 0 if not query.stream else query.every or max(1, steps // PREVIEWS)
    sampler = replace(
        manifest.sampler,
        steps=steps,
        step_size=manifest.sampler.step_size if query.step_size is None else query.step_size,
        noise_std=manifest.sampler.noise_std * math.sqrt(query.temperature),
    )
    return Order(words, query, Job(label, query.n, sampler, seed, every))


def document(request: Request, body: bytes | bytearray) -> dict[str, Any]:
    """Return the body of a POST as an object."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":  # curl -d class=3
        return dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
    if kind != "application/json":
        raise Problem(415, f"content type {kind!r} is not accepted; send application/json, a form, or query parameters and no body")
    found = parse_json(body)
    if not isinstance(found, dict):
        raise Problem(422, 'send a JSON object such as {"class": 3, "n": 4}')
    return found


def find_label(wanted: str | int, names: list[str]) -> int:
    """Return the class index that an index or a name means; a name in any case and either of Unicode's normal forms."""
    text = unicodedata.normalize("NFC", str(wanted).strip())
    if not isinstance(wanted, int):
        known = [unicodedata.normalize("NFC", name) for name in names]
        folded = [name.casefold() for name in known]
        for name, among in ((text, known), (text.casefold(), folded)):
            if name in among:
                return among.index(name)
    with contextlib.suppress(ValueError):
        if text.isascii() and 0 <= int(text) < len(names):
            return int(text)
    raise Problem(422, f"class {text[:40]!r} is unknown: an index 0 to {len(names) - 1} or a name, {', '.join(names)}")


def check_work(query: GenerateQuery, steps: int, manifest: Manifest, settings: Settings) -> None:
    """Raise Problem 422 for a number beyond its limit."""
    s, horizon = settings, horizon_of(manifest, settings)
    for name, value, limit in (("n", query.n, s.max_samples), ("steps", steps, horizon), ("scale", query.scale, s.max_scale)):
        if not 1 <= value <= limit:
            tuned = ", the horizon this model's sampler was tuned for; serve --max-steps raises it" if name == "steps" else ""
            raise Problem(422, f"{name} must be 1 to {limit}, not {value}{tuned if not s.max_steps else ''}")
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


def horizon_of(manifest: Manifest, settings: Settings) -> int:
    """Return the most steps of a chain."""
    return settings.max_steps or manifest.sampler.steps
