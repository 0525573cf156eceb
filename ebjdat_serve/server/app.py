"""How a server is put together."""

from collections.abc import Callable, Sequence

from ebjdat_serve.bundle import draws
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server import disconnects, litserve_adapter
from ebjdat_serve.server.compute.model import Operation
from ebjdat_serve.server.compute.workers import ClassifyWorker, GenerateWorker, Worker
from ebjdat_serve.server.endpoints import ENDPOINTS
from ebjdat_serve.server.endpoints.endpoint import Endpoint, Service
from ebjdat_serve.server.model_manager import ModelManager
from ebjdat_serve.server.queues.classify_queue import ClassifyQueue
from ebjdat_serve.server.queues.generate_queue import GenerateQueue
from ebjdat_serve.server.read import browsers
from ebjdat_serve.server.read.auth import Access
from ebjdat_serve.server.served_model import open_first, store_at
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.worker_sockets import WorkerSockets


def build_server(settings: Settings, endpoints: Sequence[Endpoint] = ENDPOINTS) -> tuple[litserve_adapter.Server, Callable[[], str]]:
    """Return a server for the bundle in ``settings``, and what returns the name of the model that it serves; nothing runs yet.

    Raises BundleError when the bundle cannot be served, EbjdatError for an API key that no client could send, a key file that is wrong and
    an origin, a host name or a proxy that is none. An engine that cannot run is found by the workers, and ends the server.
    """
    if settings.check == "reach" and not settings.generate_workers:
        raise EbjdatError("serve --check reach takes gradients, which workers for /generate compute: it needs --generate-workers 1 or more")
    access = Access.of(settings)
    browsers.check(settings)
    served, refused = open_first(settings)
    sockets, s = WorkerSockets(), settings
    operations = operations_of(endpoints)
    classify = ClassifyQueue(
        workers=s.classify_workers,
        size=s.classify_queue,
        deadline=s.classify_deadline,
        worker_timeout=s.worker_timeout,
        max_batch=s.max_batch,
    )
    workers: list[tuple[Worker, int]] = [(ClassifyWorker(settings, operations), s.classify_workers)]
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
        workers.append((GenerateWorker(settings, operations), s.generate_workers))
    manager = ModelManager(served, settings, [classify, generate] if generate else [classify], sockets, refused)
    service = Service(manager, settings, classify, generate, endpoints, access)

    async def serve(server: litserve_adapter.Server) -> None:
        async with service.decoder.running():
            await manager.run(server.announce, server.give_up, beside=[access.follow(), disconnects.watch()])

    return litserve_adapter.Server(
        workers, service.install, serve, service.begin_drain, service.drain, sockets, settings
    ), lambda: manager.active.name


def operations_of(endpoints: Sequence[Endpoint]) -> list[Operation]:
    """Return the operations of all endpoints, each once; raise ValueError for two of the same name."""
    operations: dict[str, Operation] = {}
    for operation in (operation for endpoint in endpoints for operation in endpoint.operations):
        if operations.setdefault(operation.name, operation) != operation:
            raise ValueError(f"two operations are named {operation.name!r}: {operations[operation.name].run} and {operation.run}")
    return list(operations.values())
