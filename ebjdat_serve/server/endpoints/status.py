"""/health, /models, /info and /."""

import asyncio

from fastapi import Request, Response

from ebjdat_serve.keys import SCOPES
from ebjdat_serve.server.answer import respond
from ebjdat_serve.server.answer.public import PublicInfo, PublicModels, told
from ebjdat_serve.server.answer.status import (
    ClassifyLoad,
    ClientLimitsInfo,
    GenerateLoad,
    Health,
    Index,
    Info,
    Load,
    ModelEntry,
    Models,
    info_answer,
)
from ebjdat_serve.server.api_docs import prefix_of
from ebjdat_serve.server.endpoints.endpoint import Endpoint, Service
from ebjdat_serve.server.memory import memory_of
from ebjdat_serve.server.read.generate_request import max_steps
from ebjdat_serve.server.read.model_path import MODEL_NAME


async def health(service: Service, request: Request) -> Response:
    """Return ok when every worker of every model is ready, or of the one that is named, and until a stop signal."""
    if service.shared.draining:
        return respond(Health(status="stopping"), 503)
    asked = [service] if MODEL_NAME in request.scope else service.shared.services.values()
    return respond(Health(status="ok")) if all(one.manager.ready() for one in asked) else respond(Health(status="not ready"), 503)


async def models(service: Service, request: Request) -> Response:
    """Return the models of this server: the name under which each is at /models/NAME, whether it is ready, and its workers' memory."""
    services = service.shared.services.values()
    pids = [[worker.pid for queue in one.queues for worker in queue.workers] for one in services]
    sizes = await asyncio.get_running_loop().run_in_executor(service.encoders, lambda: list(map(memory_of, pids)))
    listed = [
        ModelEntry(
            name=one.name,
            model=one.manager.active.name,
            ready=one.manager.ready(),
            default=place == 0,
            memory_bytes=size,
        )
        for place, (one, size) in enumerate(zip(services, sizes, strict=True))
    ]
    return respond(told(Models(models=listed), service.settings.profile_for(request.scope)))


async def info(service: Service, request: Request) -> Response:
    """Return the model, what runs it, the limits, what is in progress, and the measured figures."""
    served, own = service.manager.active, request.scope["limits"]
    answer = info_answer(
        served,
        service.settings,
        drift=service.drift(served),
        steps=max_steps(served.bundle.manifest, service.settings),
        client=ClientLimitsInfo(rate=own.rate, requests=own.requests, bodies=own.bodies, chains=own.chains),
        engine_info=service.manager.engine_info(),
        load=load(service),
        refresh=service.manager.refresh_status(),
    )
    return respond(told(answer, service.settings.profile_for(request.scope)))


def load(service: Service) -> Load:
    """Return what is in progress."""
    classify, generate = service.classify_queue, service.generate_queue
    requests = ClassifyLoad(requests=classify.active, workers=len(classify.workers))
    if generate is None:
        return Load(classify=requests)
    return Load(
        classify=requests,
        generate=GenerateLoad(
            requests=generate.active,
            workers=len(generate.workers),
            chains=generate.chains,
            chain_steps_left=generate.work,
            chain_steps_per_second=round(generate.rate, 1),
            longest_wait_seconds=round(generate.longest_wait, 3),
        ),
    )


async def index(service: Service, request: Request) -> Response:
    """Return where to go from here."""
    kinds = {queue.kind for queue in service.queues}
    model = service.manager.active
    profile, prefix = service.settings.profile_for(request.scope), prefix_of(service.settings)
    listed = [one for one in service.shared.endpoints if not one.hidden and (profile == "full" or one.public)]
    workers = [one for one in listed if not one.operations or one.operations[0].kind in kinds]  # further ones are of options
    offered = [one for one in workers if not one.impossible(model)]
    paths = [prefix + path for path in [*dict.fromkeys(one.example or one.path for one in offered), "/docs"]]
    return respond(Index(model=model.name, paths=paths))


HEALTH = Endpoint("/health", health, Health, public_answer=Health, method="GET", responses={503: {"model": Health}}, scopes=())
MODELS = Endpoint("/models", models, Models, public_answer=PublicModels, method="GET", responses={}, scopes=SCOPES, per_model=False)
INFO = Endpoint("/info", info, Info, public_answer=PublicInfo, method="GET", responses={})
INDEX = Endpoint("/", index, Index, public_answer=Index, method="GET", responses={}, hidden=True, scopes=SCOPES, per_model=False)
