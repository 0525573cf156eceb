"""The Open Inference Protocol v2 (docs/v2.md): /v2 and what is under it, by the plain paths that read/v2_path.py makes of it."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ebjdat_serve import __version__
from ebjdat_serve.keys import Scope
from ebjdat_serve.listing import printable
from ebjdat_serve.server.answer.predictions import refuse_not_finite
from ebjdat_serve.server.answer.v2_tensors import chosen, compressed, encode, offered
from ebjdat_serve.server.compute.model import PREDICT
from ebjdat_serve.server.endpoints.endpoint import Endpoint, Handler, Service
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.bodies import parse_json, read_body
from ebjdat_serve.server.read.model_path import MODEL_NAME
from ebjdat_serve.server.read.uploads import ImageBody
from ebjdat_serve.server.read.v2_body import InferBody, open_infer
from ebjdat_serve.server.read.v2_path import ALL_STATS, MODEL_VERSION
from ebjdat_serve.server.served_model import ServedModel
from ebjdat_serve.server.tallies import QueueTally
from ebjdat_serve.server.v2_protocol import HEADER_LENGTH, INPUT

EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics"]
TYPES = {"FP32": "TYPE_FP32", "INT64": "TYPE_INT64", "BOOL": "TYPE_BOOL", "BYTES": "TYPE_STRING"}
"""Triton's names of data types in a model's configuration."""
INDEX_BYTES = 2**12
"""Bytes of the body of /v2/repository/index."""


def of_version(scope: Mapping[str, Any], model: ServedModel) -> ServedModel:
    """Return ``model``; raise Problem 404 where a request is for another version."""
    wanted, served = scope.get(MODEL_VERSION), model.bundle.manifest.version
    if wanted not in (None, served):
        raise Problem(404, f"version {printable(wanted)} is not served: {model.bundle.manifest.name} is served in version {served}")
    return model


async def server(service: Service, request: Request) -> Response:
    """Return the server's name, version and extensions."""
    return JSONResponse({"name": "ebjdat_serve", "version": __version__, "extensions": EXTENSIONS})


async def live(service: Service, request: Request) -> Response:
    """Return that the server answers."""
    return JSONResponse({"live": True})


async def server_ready(service: Service, request: Request) -> Response:
    """Return whether every model is ready, until a stop signal."""
    refuse_unready(service.shared.draining, *service.shared.services.values())
    return JSONResponse({"live": True, "ready": True})


async def model_ready(service: Service, request: Request) -> Response:
    """Return whether every worker of a model is ready, until a stop signal."""
    named = request.scope.get(MODEL_NAME)
    if request.scope.get(MODEL_VERSION) not in (None, service.manager.active.bundle.manifest.version):
        raise Problem(404, f"that version of {named} is not served")
    refuse_unready(service.shared.draining, service)
    return JSONResponse({**({"name": named} if named else {}), "live": True, "ready": True})


def refuse_unready(draining: bool, *services: Service) -> None:
    """Raise Problem 503 when the server is stopping or a model's workers are not ready.

    Probes need no key: they tell no name and no version that the request does not name.
    """
    if draining:
        raise Problem(503, "the server is stopping")
    if not all(one.manager.ready() for one in services):
        raise Problem(503, "not ready: workers are starting; GET /models says of which model")


async def models(service: Service, request: Request) -> Response:
    """Return the names of the models, the default first."""
    return JSONResponse({"models": list(service.shared.services)})


async def model(service: Service, request: Request) -> Response:
    """Return a model's version, input and outputs."""
    served = of_version(request.scope, service.manager.active)
    outputs = offered(served, service.settings.profile_for(request.scope))
    return JSONResponse(
        {
            "name": service.name,
            "versions": [served.bundle.manifest.version],
            "platform": "ebjdat_serve",
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": one.name, "datatype": one.datatype, "shape": one.shape(-1, served)} for one in outputs],
        }
    )


async def config(service: Service, request: Request) -> Response:
    """Return a model's configuration as Triton has it, the batch among the dimensions."""
    served = of_version(request.scope, service.manager.active)
    outputs = offered(served, service.settings.profile_for(request.scope))
    return JSONResponse(
        {
            "name": service.name,
            "platform": "",
            "backend": "ebjdat_serve",
            "max_batch_size": 0,
            "input": [{"name": INPUT, "data_type": TYPES["BYTES"], "dims": [-1]}],
            "output": [{"name": one.name, "data_type": TYPES[one.datatype], "dims": one.shape(-1, served)} for one in outputs],
        }
    )


async def stats(service: Service, request: Request) -> Response:
    """Return what was counted for the served version of a model."""
    of_version(request.scope, service.manager.active)
    return JSONResponse({"model_stats": [counted(service)]})


async def all_stats(service: Service, request: Request) -> Response:
    """Return what was counted for the served version of each model."""
    return JSONResponse({"model_stats": [counted(one) for one in service.shared.services.values()]})


def counted(service: Service) -> dict[str, Any]:
    """Return the statistics of the served version.

    ``success`` and ``fail`` are requests of this protocol; images, batches, waits and decoding are of all paths that classify.
    """
    served = service.manager.active
    tally, queue = service.tally(served), service.classify_queue.tallies.of(served.key, QueueTally)
    codes = {code: n for (route, code), n in tally.requests.items() if route == INFER.path}
    done, failed = codes.get(200, 0), sum(n for code, n in codes.items() if code != 200)

    def said(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(1e9 * seconds)}

    return {
        "name": service.name,
        "version": served.bundle.manifest.version,
        "inference_count": tally.images,
        "execution_count": sum(queue.compute.counts),
        "inference_stats": {
            "success": said(done, tally.answered[INFER.path]),
            "fail": said(failed, 0),
            "queue": said(sum(queue.queue.counts), queue.queue.total),
            "compute_input": said(sum(tally.decode.counts), tally.decode.total),
            "compute_infer": said(sum(queue.compute.counts), queue.compute.total),
            "compute_output": said(0, 0),
        },
        "batch_stats": [],
    }


async def index(service: Service, request: Request) -> Response:
    """Return the models, their versions and states; those that are ready alone for {"ready": true}."""
    async with read_body(request, INDEX_BYTES, service.settings) as body:
        asked = parse_json(bytes(body)) if body else {}
    if not isinstance(asked, dict) or not isinstance(asked.get("ready", False), bool):
        raise Problem(400, 'send nothing, or {"ready": true}')
    rows = []
    for one in service.shared.services.values():
        ready = one.manager.ready()
        if ready or not asked.get("ready"):
            state = {"state": "READY" if ready else "UNAVAILABLE", "reason": "" if ready else "its workers are starting"}
            rows.append({"name": one.name, "version": one.manager.active.bundle.manifest.version, **state})
    return JSONResponse(rows)


async def infer(service: Service, request: Request) -> Response:
    """Return the outputs that are asked for, of the images that are sent."""
    profile = service.settings.profile_for(request.scope)
    of_version(request.scope, service.manager.active)  # before the body is read
    body = InferBody(lambda asked: chosen(asked, service.manager.active, profile))
    result = await service.run_on_images(request, PREDICT, ImageBody(open_infer, body.images))
    served, asked = of_version(request.scope, result.model), body.asked
    refuse_not_finite(result.value)
    wanted = chosen(asked, served, profile)
    accepted = request.headers.get("accept-encoding", "")

    def answer() -> tuple[int, tuple[bytes, str]]:
        data, json_bytes = encode(asked, wanted, result.value, service.name, served)
        return json_bytes, compressed(data, accepted)

    json_bytes, (data, encoding) = await asyncio.get_running_loop().run_in_executor(service.encoders, answer)
    service.note(request, served, result.value)
    headers = {HEADER_LENGTH: str(json_bytes)} if any(one.binary for one in wanted) else {}
    kind = "application/octet-stream" if headers else "application/json"
    return Response(data, headers=headers | ({"Content-Encoding": encoding} if encoding else {}), media_type=kind)


SCOPES: tuple[Scope, ...] = ("classify",)
TOLD: tuple[Scope, ...] = ("classify", "operate")
COUNTS: tuple[Scope, ...] = ("operate",)


def endpoint(path: str, handler: Handler, scopes: tuple[Scope, ...], *, public: bool = True, **more: Any) -> Endpoint:
    """Return an endpoint of the protocol, which the OpenAPI document leaves to docs/v2.md: its paths are plain ones."""
    fixed: dict[str, Any] = {"method": "GET", "responses": {}, "hidden": True, "per_model": False, **more}
    return Endpoint(path, handler, public_answer=dict[str, Any] if public else None, scopes=scopes, **fixed)


INFER = endpoint("/v2/infer", infer, SCOPES, method="POST", operations=[PREDICT])
V2 = [
    endpoint("/v2", server, TOLD),
    endpoint("/v2/health/live", live, ()),
    endpoint("/v2/health/ready", server_ready, ()),
    endpoint("/v2/models", models, TOLD),
    endpoint("/v2/model", model, TOLD),
    endpoint("/v2/ready", model_ready, ()),
    endpoint("/v2/config", config, TOLD),
    endpoint("/v2/stats", stats, COUNTS, public=False),
    endpoint(ALL_STATS, all_stats, COUNTS, public=False),
    endpoint("/v2/repository/index", index, TOLD, method="POST"),
    INFER,
]
