"""The only module that uses LitServe's private names (0.2.19): its processes and its app, our sockets, clean exits.

Each private name has a contract test in tests/test_litserve_adapter.py; the reasons are in docs/decisions/0004 and 0011.
"""

import asyncio
import contextlib
import gc
import logging
import math
import multiprocessing as mp
import os
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from multiprocessing.connection import wait
from typing import Any

import litserve as ls
from fastapi import FastAPI

from ebjdat_serve.errors import EngineError, cause
from ebjdat_serve.logs import adopt
from ebjdat_serve.server.answer.headers import DEFAULT_HEADERS
from ebjdat_serve.server.compute.workers import Worker
from ebjdat_serve.server.memory import return_large_blocks
from ebjdat_serve.server.read.http_protocol import bounded_protocol, connections, hang_up, refuse_unfinished
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.worker_sockets import FAILED, WorkerSockets

YOUNG_OBJECTS = 10_000
"""Objects made since the last garbage collection that start another: with Python's 700, collections took 5 % of the HTTP process."""

log = logging.getLogger("ebjdat_serve")


class NoTransport:
    """In place of LitServe's transport: responses come over our own sockets."""

    async def areceive(self, consumer_id: int) -> None:
        """Never return."""
        await asyncio.Event().wait()

    def close(self, send_sentinel: bool = True) -> None:
        """Do nothing: nothing is open."""


class NoManager:
    """In place of LitServe's third process, which holds its queues and flags: there are none left."""

    def shutdown(self) -> None:
        """Do nothing: nothing runs."""


class Shutdown(threading.Event):
    """An event whose waiting thread looks for signals all the time: one that the system gives to another thread does not wake it."""

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            return super().wait(timeout)
        while not super().wait(0.2):
            pass
        return True


class Server(ls.LitServer):
    """LitServe's processes without its routes, queues and manager.

    ``serve`` runs in the HTTP process while it serves. On a stop signal ``begin_drain`` is called there, ``drain_delay`` seconds before
    connections are refused; then ``drain``, which returns when no request is left or the time for them is over.
    """

    def __init__(
        self,
        workers: list[tuple[ls.LitAPI, int]],
        register: Callable[[FastAPI], None],
        serve: Callable[["Server"], Coroutine[Any, Any, None]],
        begin_drain: Callable[[], None],
        drain: Callable[[], Coroutine[Any, Any, None]],
        sockets: "WorkerSockets",
        settings: Settings,
    ) -> None:
        self._register, self._serve, self._begin_drain, self._drain = register, serve, begin_drain, drain
        self._sockets, self._settings = sockets, settings
        self.greeting: Callable[[], None] = lambda: None
        self.failed = ""
        self.stopping = self.draining = self.gave_up = False
        self._http: list[Any] = []  # the process, once it runs
        self._counts = {api.api_path: n for api, n in workers}
        # an engine finds its own device: LitServe's accelerator would only ask for torch
        super().__init__([api for api, _ in workers], accelerator="cpu", devices=1, workers_per_device=self._counts, restart_workers=True)
        self.monitor_internal = 0.2
        graceful = max(settings.graceful_timeout, settings.generate_graceful_timeout)
        self.uvicorn_graceful_timeout = math.ceil(settings.drain_delay + graceful) + 8

    def register_endpoints(self) -> None:
        """Put our routes on the app instead of LitServe's, without its compression: images are compressed already."""
        self.app.router.redirect_slashes = False
        self.middlewares.clear()
        self._register(self.app)

    # the main process --------------------------------------------------------------------------------------------------

    def _init_manager(self, num_api_servers: int) -> NoManager:
        """Replace LitServe's shared flags by plain ones: workers tell the HTTP process that they are ready."""
        adopt()  # LitServe has just given its loggers handlers of their own
        self.workers_setup_status: dict[str, Any] = {}
        self._shutdown_event = Shutdown()
        self.litapi_request_queues = {api.api_path: None for api in self.litapi_connector}
        self._transport = NoTransport()
        return NoManager()

    def verify_worker_status(self) -> None:
        """Return at once: the HTTP process waits for the workers."""

    def launch_inference_worker(self, lit_api: ls.LitAPI) -> list[Any]:
        """Start all workers of one kind."""
        return [self._start_worker(lit_api, worker_id) for worker_id in range(self._counts[lit_api.api_path])]

    def launch_single_inference_worker(self, lit_api: ls.LitAPI, worker_id: int) -> Any:
        """Restart a worker that died; before the server was ever ready, give up instead."""
        if not self._sockets.ready():
            self.fail("a worker failed to start; its error is above")
        return self._start_worker(lit_api, worker_id)

    def _start_worker(self, lit_api: ls.LitAPI, worker_id: int) -> Any:
        """Start a worker that has one end of a new connection; no other process keeps that, so the other end tells of its death."""
        assert isinstance(lit_api, Worker)
        with self._sockets.connect() as lit_api.connection:
            process = super().launch_single_inference_worker(lit_api, worker_id)
        lit_api.connection = None
        return process

    def hurry(self) -> None:
        """Pass a second stop signal on to the HTTP process, which then ends its --drain-delay."""
        for process in self._http:
            process.terminate()

    def fail(self, why: str) -> None:
        """End the server; ``run`` raises EngineError with the first reason given."""
        self.failed = self.failed or why
        self._shutdown_event.set()

    def _start_server(self, port: Any, count: int, level: str, sockets: list[socket.socket], *arguments: Any, **options: Any) -> Any:
        """Start the HTTP process, and end the server should it die: LitServe watches workers only."""
        processes = super()._start_server(port, count, level, sockets, *arguments, **options)
        for listening in sockets:
            listening.close()  # or, once the HTTP process listens no more, connections would wait here for an answer
        self._http = list(processes.values())
        self._sockets.forked()
        threading.Thread(target=self._watch, args=(list(processes.values()),), daemon=True, name="watch-http").start()
        return processes

    def _watch(self, processes: list[Any]) -> None:
        wait([process.sentinel for process in processes])
        if not self._shutdown_event.is_set():
            self.fail(self._sockets.failure() or "the HTTP process died; the log above may say why")

    def _perform_graceful_shutdown(self, manager: Any, uvicorn_workers: dict[int, Any], *arguments: Any) -> None:
        """Set the shutdown flags first, or LitServe's monitor would restart the terminated workers.

        An HTTP process that has ended is left out: LitServe would warn of it, before the error that says why.
        """
        self.stopping = True
        self._shutdown_event.set()
        alive = {i: process for i, process in uvicorn_workers.items() if process.is_alive()}
        super()._perform_graceful_shutdown(manager, alive, *arguments)

    # the HTTP process --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run ``serve`` while requests are served, and ``drain`` on a stop signal."""
        return_large_blocks()
        gc.collect()
        gc.freeze()  # collections skip what exists now, and take a millisecond
        gc.set_threshold(YOUNG_OBJECTS)  # a request makes hundreds that live as long as it does
        loop = asyncio.get_running_loop()
        serving = loop.create_task(self._serve(self))
        serving.add_done_callback(self._served)
        draining: list[asyncio.Task[None]] = []
        uvicorn_stops = signal.getsignal(signal.SIGTERM)

        def end() -> None:
            if not draining and callable(uvicorn_stops):
                draining.append(loop.create_task(self._end()))
                uvicorn_stops(signal.SIGTERM, None)  # once: a second SIGINT would have uvicorn cut off what it serves

        def begin(number: int) -> None:
            """Have /health answer 503, and end after --drain-delay: at once for Ctrl-C, a second signal or a server that has failed."""
            at_once = number == signal.SIGINT or self.draining or self.gave_up
            self.draining = True
            self._begin_drain()
            loop.call_later(0.0 if at_once else self._settings.drain_delay, end)

        def stop(number: int, frame: Any) -> None:
            loop.call_soon_threadsafe(begin, number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        if self.stopping:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            async with super().lifespan(app):
                yield
        finally:
            serving.cancel()
            await asyncio.wait({serving}, timeout=1)

    def _served(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("the HTTP process cannot go on", exc_info=error)
            self.give_up(f"the HTTP process cannot go on: {cause(error)}")

    async def _end(self) -> None:
        """Let requests in progress end, refuse those that are still coming by then, and close the connections that are left."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        late = loop.call_later(self._settings.last_answers, refuse_unfinished)  # drawings may take longer
        await self._drain()
        late.cancel()
        refuse_unfinished()
        end = max(began + self._settings.graceful_timeout, loop.time() + 1.0)  # who is answered only now has a second to read it
        while connections() and loop.time() < end:
            await asyncio.sleep(0.05)
        hang_up()

    def announce(self) -> None:
        """Greet: the server is ready."""
        self._sockets.tell("ready")
        self.greeting()

    def give_up(self, why: str) -> None:
        """End the server from the HTTP process."""
        self.gave_up = True
        self._sockets.tell(f"{FAILED}{why}")
        os.kill(os.getpid(), signal.SIGTERM)


def run(server: Server, settings: Settings, greeting: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, then leave no process behind; call ``greeting`` when every worker is ready.

    LitServe orphans its workers on SIGTERM and, as PID 1, ignores it; here both signals end it the same way.
    """
    owner = os.getpid()
    server.greeting = greeting

    def stop(*_: object) -> None:
        if os.getpid() == owner and server.stopping:
            server.hurry()  # an exception would leave LitServe's shutdown, and processes would be killed at work
            return
        if os.getpid() == owner:
            signal.setitimer(signal.ITIMER_REAL, 2.0)
            raise KeyboardInterrupt
        # the forked HTTP process: uvicorn has shut down and raises its signal once more; or it was just forked, and Python drops
        # an exception in what it does then: lifespan looks again
        server.stopping = True
        raise SystemExit(0)

    def again(*_: object) -> None:
        if not server.stopping:
            stop()  # Python drops an exception that a signal raises in a destructor or a callback

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, again)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # idle connections must not use up the descriptors
    try:
        server.run(
            http=bounded_protocol(settings),
            ws="none",  # or uvicorn would hand a connection on to a WebSocket's protocol, which has no bounds
            host=settings.host,
            port=settings.port,
            num_api_servers=1,
            log_level="warning",
            log_config=None,  # uvicorn's loggers write where ours do
            pretty_logs=False,
            generate_client_file=False,
            access_log=False,
            proxy_headers=False,  # uvicorn would believe X-Forwarded-For of every client on this machine
            timeout_keep_alive=settings.keep_alive,
            headers=DEFAULT_HEADERS,
        )
    except KeyboardInterrupt:
        log.info("stopped while starting")
    finally:
        server.stopping = True
        signal.setitimer(signal.ITIMER_REAL, 0)  # or it goes off while Python ends, whose handler is gone by then: exit status -14
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        for child in mp.active_children():
            child.terminate()
            child.join(timeout=5)
            if child.is_alive():
                child.kill()
    if server.failed:
        raise EngineError(server.failed)


def check_address(host: str, port: int) -> None:
    """Raise EngineError when the server could not listen there, before any worker is started."""
    try:
        bind(host, port)
    except OSError as error:
        raise EngineError(f"cannot listen on {host}:{port} ({cause(error)})", options=free_port(host, port)) from error


def bind(host: str, port: int) -> None:
    """Bind a port for a moment; raise OSError if that cannot be done."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def free_port(host: str, port: int) -> tuple[str, ...]:
    """Return the option for the next free port, none if the host is what is wrong."""
    for other in (*range(port + 1, min(port + 20, 65536)), 8000):
        with contextlib.suppress(OSError):
            bind(host, other)
            return (f"--port {other}",)
    return ()
