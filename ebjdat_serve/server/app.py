"""How a server is put together."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ebjdat_serve.bundle import draws
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server import disconnects, litserve_adapter
from ebjdat_serve.server.application import Application
from ebjdat_serve.server.compute.model import Operation
from ebjdat_serve.server.compute.workers import ClassifyWorker, GenerateWorker, Worker
from ebjdat_serve.server.endpoints import ENDPOINTS
from ebjdat_serve.server.endpoints.endpoint import Endpoint, Service, Shared
from ebjdat_serve.server.model_manager import ModelManager
from ebjdat_serve.server.queues.classify_queue import ClassifyQueue
from ebjdat_serve.server.queues.generate_queue import GenerateQueue
from ebjdat_serve.server.read import browsers
from ebjdat_serve.server.read.auth import Access
from ebjdat_serve.server.served_model import ServedModel, named_models, open_first, store_at
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.supervisor import Supervisor
from ebjdat_serve.server.worker_sockets import WorkerSockets

Workers = list[tuple[Worker, int]]


def build_server(settings: Settings, endpoints: Sequence[Endpoint] = ENDPOINTS) -> tuple[litserve_adapter.Server, Callable[[], str]]:
    """Return a server for the models in ``settings``, and what returns the names of those that it serves; nothing runs yet.

    Raises BundleError when a bundle cannot be served, EbjdatError for two models of one name, an API key that no client could send, a key
    file that is wrong and an origin, a host name or a proxy that is none. An engine that cannot run is found by the workers, and ends the
    server.
    """
    if settings.check == "reach" and not settings.generate_workers:
        raise EbjdatError("serve --check reach takes gradients, which workers for /generate compute: it needs --generate-workers 1 or more")
    browsers.check(settings)
    shared, workers = Shared(settings, Access.of(settings), endpoints), Workers()
    for name, path in named_models(settings):
        threads = settings.threads and max(1, settings.threads // (1 + len(settings.more)))
        own = replace(settings, model=path, threads=threads)
        served, refused = open_first(own)
        name = name or served.bundle.manifest.name
        if name in shared.services:
            raise EbjdatError(f"two models are named {name}: give one another name, as in serve MODEL {name}-2={path}")
        shared.services[name] = service_of(name, served, refused, own, shared, workers)
    managers = {name: service.manager for name, service in shared.services.items()}
    sockets, application = WorkerSockets(), Application(shared)
    supervisor = Supervisor(managers, sockets)

    async def serve(server: litserve_adapter.Server) -> None:
        async with shared.decoder.running():
            beside = [shared.access.follow(), disconnects.watch(), shared.drift_file.follow(shared.drift_states)]
            await supervisor.run(server.announce, server.give_up, beside=beside)

    server = litserve_adapter.Server(workers, application.install, serve, application.begin_drain, application.drain, sockets, settings)
    return server, lambda: ", ".join(shown(name, manager.active) for name, manager in managers.items())


def shown(name: str, model: ServedModel) -> str:
    """Return a model's bundle and version, after the name that it is served by where that is another."""
    return model.name if name == model.bundle.manifest.name else f"{name}={model.name}"


def service_of(name: str, served: ServedModel, refused: str, settings: Settings, shared: Shared, workers: Workers) -> Service:
    """Return the service of one model, with queues and workers of its own, which are added to ``workers``."""
    s, operations = settings, operations_of(shared.endpoints)
    classify = ClassifyQueue(
        workers=s.classify_workers,
        size=s.classify_queue,
        deadline=s.classify_deadline,
        worker_timeout=s.worker_timeout,
        max_batch=s.max_batch,
    )
    workers.append((ClassifyWorker(name, settings, operations), s.classify_workers))
    generate = None
    # a store's next version may draw, which a bundle that does not is never to
    if s.generate_workers and (draws(served.bundle) or store_at(s.model)):
        generate = GenerateQueue(
            workers=s.generate_workers,
            size=s.generate_queue,
            deadline=s.generate_deadline,
            worker_timeout=s.worker_timeout,
            max_chains=s.generate_chains,
            max_backlog=s.generate_backlog,
        )
        workers.append((GenerateWorker(name, settings, operations), s.generate_workers))
    manager = ModelManager(served, settings, [classify, generate] if generate else [classify], refused)
    return Service(name, manager, settings, classify, generate, shared)


def operations_of(endpoints: Sequence[Endpoint]) -> list[Operation]:
    """Return the operations of all endpoints, each once; raise ValueError for two of the same name."""
    operations: dict[str, Operation] = {}
    for operation in (operation for endpoint in endpoints for operation in endpoint.operations):
        if operations.setdefault(operation.name, operation) != operation:
            raise ValueError(f"two operations are named {operation.name!r}: {operations[operation.name].run} and {operation.run}")
    return list(operations.values())
