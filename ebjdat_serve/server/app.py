"""The routes, and how a server is put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from ebjdat_serve import __version__, pixels
from ebjdat_serve.server import api_docs, litserve_adapter
from ebjdat_serve.server.answer import problems
from ebjdat_serve.server.answer.problems import Problem
from ebjdat_serve.server.answer.responses import Order, Words, event
from ebjdat_serve.server.answer.schemas import (
    ClassifyAnswer,
    ClassifyList,
    EnergyAnswer,
    EnergyList,
    GenerateAnswer,
    GenerateQuery,
    Health,
    ProblemDocument,
)
from ebjdat_serve.server.compute.workers import ClassifyWorker, GenerateWorker
from ebjdat_serve.server.ipc import Verdicts
from ebjdat_serve.server.model_manager import Fleet, open_bundle
from ebjdat_serve.server.queues.generate_queue import GenerateLane
from ebjdat_serve.server.queues.request_queue import ClassifyLane, Item, Lane
from ebjdat_serve.server.read.auth import Guard, Heads, api_key
from ebjdat_serve.server.read.bodies import decode_upload, read_upload
from ebjdat_serve.server.read.generate_request import horizon_of, make_order, read_values
from ebjdat_serve.server.read.http_protocol import connections
from ebjdat_serve.server.settings import Settings

ALIVE = 15.0
"""Seconds of silence after which a stream says that it is still there."""

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
    code: {"model": ProblemDocument, "description": problems.TITLES[code]} for code in (400, 401, 408, 413, 415, 422, 429, 500, 503, 504)
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}, "text/event-stream": {}}, "description": "a PNG, JSON with format=json, or events with stream=true"}
}


def build_server(settings: Settings) -> tuple[litserve_adapter.Server, str]:
    """Return a server for the bundle in ``settings``, and the model's name; nothing runs yet.

    Raises BundleError when the bundle cannot be served; an engine that cannot run is found by the workers, and ends the server.
    """
    api_key()  # said here, and not by the HTTP process
    served = open_bundle(settings.model, settings)
    wire, s = litserve_adapter.Wire.open(), settings
    classify = ClassifyLane(
        workers=s.classify_workers, deadline=s.classify_deadline, worker_timeout=s.worker_timeout, max_batch=s.max_batch
    )
    workers: list[tuple[Any, int]] = [(ClassifyWorker(wire.address, settings), s.classify_workers)]
    generate = None
    if s.generate_workers:
        generate = GenerateLane(
            workers=s.generate_workers,
            deadline=s.generate_deadline,
            worker_timeout=s.worker_timeout,
            chains=s.generate_chains,
            backlog=s.generate_backlog,
        )
        workers.append((GenerateWorker(wire.address, settings), s.generate_workers))
    fleet = Fleet(served, settings, [classify, generate] if generate else [classify], wire.listener)
    routes = Routes(fleet, settings, classify, generate)

    async def serve(server: litserve_adapter.Server) -> None:
        await fleet.run(server.announce, server.give_up)

    return litserve_adapter.Server(workers, routes.install, serve, routes.drain, wire, settings), served.name


class Routes:
    """Our own routes: decode and validate here, compute in a worker, word the answer here."""

    def __init__(self, fleet: Fleet, settings: Settings, classify: ClassifyLane, generate: GenerateLane | None) -> None:
        self.fleet, self.settings = fleet, settings
        self.classify_lane, self.generate_lane = classify, generate
        # apart, so that large sheets keep no image waiting
        self.decoders, self.encoders = (ThreadPoolExecutor(2, thread_name_prefix=name) for name in ("decode", "encode"))

    def install(self, app: FastAPI) -> None:
        """Add the routes and the error pages to ``app``."""
        app.title, app.version = "ebjdat_serve", __version__
        problems.install(app)
        api_docs.install(app)
        app.add_middleware(Heads)
        if key := api_key():
            app.add_middleware(Guard, key=key)
        images: dict[str, Any] = {"openapi_extra": IMAGE_BODY, "responses": ERRORS}
        for path, endpoint in (("/classify", self.classify), ("/energy", self.energy)):
            # FastAPI's routes below document them; these, found first, answer without what FastAPI does for each request
            app.router.routes.append(Route(path, endpoint, methods=["POST"]))
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

    async def drain(self) -> None:
        """Wait for requests under way, drawings longer than others; then answer those that are left that the server stops."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        lanes: list[Lane] = [self.classify_lane, *([self.generate_lane] if self.generate_lane else [])]
        while any(lane.in_flight for lane in lanes) or connections():  # uvicorn has ended the connections that nothing came on
            await asyncio.sleep(0.1)
            drawing = self.generate_lane and self.generate_lane.chains
            if loop.time() - began > (self.settings.generate_graceful_timeout if drawing else self.settings.graceful_timeout):
                break
        for lane in lanes:
            lane.close("the server is stopping; try again when it is back")

    async def classify(self, request: Request) -> Response:
        """Return the class, its probability, the energy and whether it is suspicious, of one image or of a list."""
        verdicts, listed, words = await self._verdicts(request)
        return words.answer(words.classified(verdicts), listed)

    async def energy(self, request: Request) -> Response:
        """Return E(x), E(x, y) for every class, the p-value and whether it is suspicious, of one image or of a list."""
        verdicts, listed, words = await self._verdicts(request)
        return words.answer(words.energies(verdicts), listed)

    async def _verdicts(self, request: Request) -> tuple[Verdicts, bool, Words]:
        lane, limit = self.classify_lane, self.settings.classify_queue
        lane.check_room(limit, "classify_queue")  # before the body is read; a slow body takes no place
        with contextlib.ExitStack() as stack:
            async with read_upload(request, self.settings) as upload:
                words = self._words()
                late = stack.enter_context(lane.place(limit, "classify_queue", words.served.key))
                image, listed = await decode_upload(request, upload, words.served.bundle.manifest.input, self.settings, self.decoders)
            return await lane.submit(words.served.key, image, request, late), listed, words

    async def generate(self, request: Request) -> Response:
        """Draw images of one class by conditional short-run SGLD, marked as AI-made, as a PNG (grid), as JSON, or as a stream of events."""
        lane = self.generate_lane
        if lane is None:
            raise Problem(404, "this server draws nothing: it was started by serve --generate-workers 0")
        values = await read_values(request)
        with contextlib.ExitStack() as stack:
            words = self._words()
            late = stack.enter_context(lane.place(self.settings.generate_queue, "generate_queue", words.served.key))
            order = make_order(values, words, self.settings)
            lane.admit(order.job)
            item = Item(words.served.key, order.job, request, late)
            stack.enter_context(lane.entered(item))
            if order.query.stream:
                return Events(self._events(lane, order, item), stack.pop_all())
            drawn = await item.future
            return await asyncio.get_running_loop().run_in_executor(self.encoders, order.drawn, drawn)

    async def _events(self, lane: GenerateLane, order: Order, item: Item) -> AsyncIterator[bytes]:
        """Yield the newest preview whenever the client has taken the last one, then the images, or the error."""
        loop = asyncio.get_running_loop()
        yield b": drawing\n\n"
        while not item.future.done():
            try:
                async with asyncio.timeout(ALIVE):
                    await item.shown.wait()
            except TimeoutError:
                yield b": still there\n\n"
                continue
            item.shown.clear()
            if item.preview and not item.future.done():
                preview, item.preview = item.preview, None
                yield await loop.run_in_executor(self.encoders, order.preview, preview)
                lane.seen(item)
        try:
            yield await loop.run_in_executor(self.encoders, order.done, item.future.result())
        except Problem as problem:
            yield event("error", problems.content(problem.status, problem.detail))

    async def health(self) -> Response:
        """Return ok when every worker is ready."""
        ready = self.fleet.ready()
        return JSONResponse({"status": "ok" if ready else "not ready"}, 200 if ready else 503)

    async def info(self) -> dict[str, Any]:
        """Return the model, what runs it, the limits, what is under way, and the measured figures."""
        s, served = self.settings, self.fleet.active
        m, calibration = served.bundle.manifest, served.calibration
        return {
            "model": served.name,
            "architecture": m.architecture,
            "labels": m.labels,
            "input": asdict(m.input),
            "sampler": asdict(m.sampler),
            "provenance": asdict(m.provenance),
            **self.fleet.about(),
            "alpha": s.alpha,
            "calibration": {
                "n": len(calibration.scores),
                "of": calibration.of,
                "dataset": calibration.dataset,
                "score": calibration.score,
                "weight": calibration.weight,
            },
            "limits": {
                "body_bytes": s.max_body,
                "image_bytes": pixels.MAX_BYTES,
                "image_pixels": pixels.MAX_PIXELS,
                "images": s.max_images,
                "n": s.max_samples,
                "steps": horizon_of(m, s),
                "n_times_steps": s.max_work,
                "scale": s.max_scale,
                "chains": s.generate_chains,
                "backlog_seconds": s.generate_backlog,
            },
            "load": self._load(),
            "refresh": self.fleet.refresh(),
            "metrics": served.metrics,
            "version": __version__,
        }

    def _load(self) -> dict[str, Any]:
        load: dict[str, Any] = {"classify": {"requests": self.classify_lane.in_flight, "workers": len(self.classify_lane.peers)}}
        if lane := self.generate_lane:
            load["generate"] = {
                "requests": lane.in_flight,
                "workers": len(lane.peers),
                "chains": lane.chains,
                "chain_steps_left": lane.work,
                "chain_steps_per_second": round(lane.rate, 1),
                "longest_wait_seconds": round(lane.longest, 3),
            }
        return load

    async def index(self) -> dict[str, Any]:
        """Return where to go from here."""
        paths = ["/classify", "/energy", *(["/generate?class=3"] if self.generate_lane else []), "/health", "/info", "/docs"]
        return {"model": self.fleet.active.name, "paths": paths}

    def _words(self) -> Words:
        return Words(self.fleet.active, self.settings.alpha)


class Events(StreamingResponse):
    """Server-sent events; what the request holds is let go when the last is sent, or the client leaves."""

    def __init__(self, events: AsyncIterator[bytes], held: contextlib.ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        with self._held:
            await super().__call__(scope, receive, send)
