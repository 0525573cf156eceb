"""The routes, and how a server is put together."""

import asyncio
import base64
import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qsl, quote

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from ebjdat_serve import __version__, pixels
from ebjdat_serve.bundle import Bundle, Manifest
from ebjdat_serve.server import problems, seam
from ebjdat_serve.server.bodies import parse_json, read_body, read_images
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.schemas import (
    ClassifyAnswer,
    ClassifyList,
    EnergyAnswer,
    EnergyList,
    GenerateAnswer,
    GenerateQuery,
    Health,
    ProblemDocument,
)
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.workers import ClassifyWorker, Drawn, GenerateWorker, Job, Model, Verdicts

TOP = 5
IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["image"], "properties": {"image": {"type": "string", "format": "binary"}}}
            },
            "application/json": {
                "schema": {
                    "oneOf": [
                        {"type": "object", "required": ["image"], "properties": {"image": {"type": "string", "format": "byte"}}},
                        {
                            "type": "object",
                            "required": ["images"],
                            "properties": {"images": {"type": "array", "items": {"type": "string", "format": "byte"}}},
                        },
                    ]
                }
            },
        },
    }
}
GENERATE_BODY = {"requestBody": {"required": False, "content": {"application/json": {"schema": GenerateQuery.model_json_schema()}}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ProblemDocument, "description": problems.TITLES[code]} for code in (400, 408, 413, 415, 422, 500, 503, 504)
}
PICTURE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "a PNG, or JSON with format=json"}}


def build_server(settings: Settings) -> seam.Server:
    """Return a server for the bundle in ``settings``; nothing runs yet.

    Raises BundleError or EngineError when the bundle or the engine cannot be served.
    """
    # The model is opened once here, so that a wrong wish is an error at the prompt and /info says what really runs.
    model = Model(settings.model, settings)
    bundle, engine = model.bundle, model.engine
    about = {"engine": engine.name, "provider": engine.provider, "precision": engine.precision}
    classify, generate = ClassifyWorker(bundle.path, settings), GenerateWorker(bundle.path, settings)
    del model, engine

    def register(server: seam.Server) -> None:
        Routes(server, bundle, settings, about, classify, generate).install(server.app)

    lanes: list[Any] = [(classify, settings.classify_deadline), (generate, settings.generate_deadline)]
    return seam.Server(lanes, register)


class Routes:
    """Our own routes: decode and validate here, compute in a worker, word the answer here."""

    def __init__(
        self, server: seam.Server, bundle: Bundle, settings: Settings, about: dict[str, str], classify: Any, generate: Any
    ) -> None:
        self.server, self.bundle, self.settings, self.about = server, bundle, settings, about
        self.manifest: Manifest = bundle.manifest
        self.names = bundle.manifest.labels
        self.model = f"{bundle.manifest.name}@{bundle.manifest.version}"
        s = settings
        self.classify_lane = seam.Lane(
            server, classify, limit=s.classify_queue, slots=2 * s.max_batch, deadline=s.classify_deadline, limit_name="classify_queue"
        )
        self.generate_lane = seam.Lane(
            server, generate, limit=s.generate_queue, slots=1, deadline=s.generate_deadline, limit_name="generate_queue"
        )
        self.metrics, self.calibration = bundle.metrics(), bundle.calibration(settings.precision)
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")

    def install(self, app: FastAPI) -> None:
        """Add the routes and the error pages to ``app``."""
        app.title, app.version = "ebjdat_serve", __version__
        problems.install(app)
        images: dict[str, Any] = {"openapi_extra": IMAGE_BODY, "responses": ERRORS}
        app.add_api_route("/classify", self.classify, methods=["POST"], response_model=ClassifyAnswer | ClassifyList, **images)
        app.add_api_route("/energy", self.energy, methods=["POST"], response_model=EnergyAnswer | EnergyList, **images)
        drawn: dict[str, Any] = {"responses": {**ERRORS, **PICTURE}, "response_model": GenerateAnswer}
        query = [
            {"name": name, "in": "query", "required": name == "class", "schema": schema}
            for name, schema in GenerateQuery.model_json_schema()["properties"].items()
        ]
        app.add_api_route("/generate", self.generate, methods=["GET"], openapi_extra={"parameters": query}, **drawn)
        app.add_api_route("/generate", self.generate, methods=["POST"], openapi_extra=GENERATE_BODY, **drawn)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=Health, responses={503: {"model": Health}})
        app.add_api_route("/info", self.info, methods=["GET"])
        app.add_api_route("/", self.index, methods=["GET"], include_in_schema=False)

    async def classify(self, request: Request) -> Response:
        """Return the class, its probability, the energy and whether it is suspicious, of one image or of a list."""
        verdicts, listed = await self._verdicts(request)
        return self._json([self._classified(verdicts, i) for i in range(len(verdicts.energy))], listed)

    async def energy(self, request: Request) -> Response:
        """Return E(x), E(x, y) for every class, the p-value and whether it is suspicious, of one image or of a list."""
        verdicts, listed = await self._verdicts(request)
        energies = verdicts.joint_energy.tolist()
        return self._json([{**self._flag(verdicts, i), "joint_energy": joint} for i, joint in enumerate(energies)], listed)

    async def _verdicts(self, request: Request) -> tuple[Verdicts, bool]:
        with self.classify_lane.place() as late:
            image, listed = await read_images(request, self.manifest.input, self.settings, self.decoders)
            return await self.classify_lane.submit(image, request, late), listed

    async def generate(self, request: Request) -> Response:
        """Draw images of one class by conditional short-run SGLD, marked as AI-made, as a PNG (grid) or as JSON."""
        query = await self._query(request)
        label = self._label(query.class_)
        steps = self.manifest.sampler.steps if query.steps is None else query.steps
        self._check_work(query, steps)
        seed = secrets.randbelow(2**31 - self.settings.max_samples) if query.seed is None else query.seed
        with self.generate_lane.place() as late:
            drawn: Drawn = await self.generate_lane.submit(Job(label, query.n, steps, seed), request, late)
        word = self._drawn_json if query.format == "json" else self._drawn_png
        return await asyncio.get_running_loop().run_in_executor(self.decoders, word, drawn, query, label, steps, seed)

    async def health(self) -> Response:
        """Return ok when every worker is ready."""
        ready = self.server.ready()
        return JSONResponse({"status": "ok" if ready else "not ready"}, 200 if ready else 503)

    async def info(self) -> dict[str, Any]:
        """Return the model, what runs it, the limits and the measured figures."""
        m, s = self.manifest, self.settings
        return {
            "model": self.model,
            "architecture": asdict(m.architecture),
            "labels": m.labels,
            "input": asdict(m.input),
            "sampler": asdict(m.sampler),
            "provenance": asdict(m.provenance),
            **self.about,
            "alpha": s.alpha,
            "calibration": {"n": len(self.calibration.energies), "of": self.calibration.of, "dataset": self.calibration.dataset},
            "limits": {
                "body_bytes": s.max_body,
                "image_bytes": pixels.MAX_BYTES,
                "image_pixels": pixels.MAX_PIXELS,
                "images": s.max_images,
                "n": s.max_samples,
                "steps": s.max_steps,
                "n_times_steps": s.max_work,
                "scale": s.max_scale,
            },
            "metrics": self.metrics,
            "version": __version__,
        }

    async def index(self) -> dict[str, Any]:
        """Return where to go from here."""
        return {"model": self.model, "paths": ["/classify", "/energy", "/generate?class=3", "/health", "/info", "/docs"]}

    # wording -------------------------------------------------------------------------------------------------------

    def _json(self, rows: list[dict[str, Any]], listed: bool) -> JSONResponse:
        tail = {"alpha": self.settings.alpha, "model": self.model}
        return JSONResponse({"results": rows, **tail} if listed else {**rows[0], **tail})

    def _candidate(self, verdicts: Verdicts, i: int, label: int) -> dict[str, Any]:
        return {"class": label, "label": self.names[label], "probability": float(verdicts.probability[i, label])}

    def _flag(self, verdicts: Verdicts, i: int) -> dict[str, Any]:
        return {"energy": float(verdicts.energy[i]), "p_value": float(verdicts.p_value[i]), "suspicious": bool(verdicts.suspicious[i])}

    def _classified(self, verdicts: Verdicts, i: int) -> dict[str, Any]:
        order = np.argsort(-verdicts.probability[i], kind="stable")[:TOP]
        top = [self._candidate(verdicts, i, int(label)) for label in order]
        return {**top[0], **self._flag(verdicts, i), "top": top}

    def _drawn_json(self, drawn: Drawn, query: GenerateQuery, label: int, steps: int, seed: int) -> Response:
        rows = [
            {
                **self._candidate(drawn.verdicts, i, label),
                **self._flag(drawn.verdicts, i),
                "seed": seed + i,
                "png": base64.b64encode(self._png(image, label, [seed + i], steps)).decode(),
            }
            for i, image in enumerate(drawn.image)
        ]
        tail = {"steps": steps, "sampler": "short-run SGLD", "alpha": self.settings.alpha, "model": self.model}
        return JSONResponse({"images": rows, **tail})

    def _drawn_png(self, drawn: Drawn, query: GenerateQuery, label: int, steps: int, seed: int) -> Response:
        sheet = pixels.grid(drawn.image, query.scale)
        v = drawn.verdicts

        def listed(values: Any) -> str:
            return ",".join(f"{float(value):.6g}" for value in values)

        headers = {
            "X-Class": str(label),
            "X-Label": quote(self.names[label]),
            "X-Seed": str(seed),
            "X-Steps": str(steps),
            "X-Energy": listed(v.energy),
            "X-Probability": listed(v.probability[:, label]),
            "X-P-Value": listed(v.p_value),
            "X-Model": quote(self.model, safe="@-._"),
            "X-Content-Origin": "ai-generated",
        }
        seeds = list(range(seed, seed + query.n))
        return Response(self._png(sheet, label, seeds, steps), media_type="image/png", headers=headers)

    def _png(self, image: pixels.Pixels, label: int, seeds: list[int], steps: int) -> bytes:
        text = [
            ("Software", f"ebjdat_serve {__version__}"),
            ("Source", "AI-generated: conditional SGLD on an energy-based model"),
            ("Description", f"class {label} ({self.names[label]}), model {self.model}, seeds {seeds[0]}..{seeds[-1]}, {steps} steps"),
        ]
        return pixels.encode_png(image, text, generated=True)

    # validation ----------------------------------------------------------------------------------------------------

    async def _query(self, request: Request) -> GenerateQuery:
        values: dict[str, Any] = dict(request.query_params)
        if request.method == "POST":
            async with read_body(request, 64 * 1024) as body:
                values |= self._document(request, body) if body else {}
        if "class" not in values:
            raise Problem(422, f"class is missing: an index 0 to {len(self.names) - 1} or a name, {', '.join(self.names)}")
        try:
            return GenerateQuery.model_validate(values)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_context=False)) from None

    def _document(self, request: Request, body: bytes) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind == "application/x-www-form-urlencoded":  # curl -d class=3
            return dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
        if kind != "application/json":
            raise Problem(415, f"content type {kind!r} is not accepted; send application/json, a form, or query parameters and no body")
        document = parse_json(body)
        if not isinstance(document, dict):
            raise Problem(422, f'send a JSON object such as {{"class": "{self.names[0]}", "n": 4}}')
        return document

    def _label(self, wanted: str | int) -> int:
        text = str(wanted).strip()
        if text.lower() in (lowered := [name.lower() for name in self.names]) and not isinstance(wanted, int):
            return lowered.index(text.lower())
        with contextlib.suppress(ValueError):
            if text.isascii() and 0 <= int(text) < len(self.names):
                return int(text)
        raise Problem(422, f"class {text[:40]!r} is unknown: an index 0 to {len(self.names) - 1} or a name, {', '.join(self.names)}")

    def _check_work(self, query: GenerateQuery, steps: int) -> None:
        s = self.settings
        for name, value, limit in (("n", query.n, s.max_samples), ("steps", steps, s.max_steps), ("scale", query.scale, s.max_scale)):
            if not 1 <= value <= limit:
                raise Problem(422, f"{name} must be 1 to {limit}, not {value}")
        size = self.manifest.input
        if query.format == "png" and query.n * query.scale**2 * size.height * size.width > s.max_sheet:
            raise Problem(422, f"n x scale^2 x {size.height} x {size.width} may be at most {s.max_sheet} pixels; lower n or scale")
        if query.n * steps > s.max_work:
            raise Problem(422, f"n x steps must be at most {s.max_work}, not {query.n} x {steps}")
