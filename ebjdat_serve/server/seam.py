"""The one place that knows LitServe's private names (0.2.19): queues in, answers out, a loop that sleeps, clean exits.

Each private name used here has a contract test in tests/test_seam.py; reference measurements are in docs/decisions/0004.
"""

import asyncio
import contextlib
import http.client
import logging
import multiprocessing as mp
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from queue import Empty
from typing import Any

import litserve as ls
from fastapi import Request
from litserve.loops.base import _SENTINEL_VALUE, _StopLoopError
from litserve.loops.simple_loops import BatchedLoop
from litserve.server import RegularRequestHandler
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus

from ebjdat_serve.errors import EngineError
from ebjdat_serve.server.problems import Problem

log = logging.getLogger("ebjdat_serve")
POLL = 0.1
"""Seconds between looks at whether the client is still there."""
LOOK = 0.5
"""Seconds between looks at whether the worker is; starting one again takes longer than that."""


class DrainLoop(BatchedLoop):
    """Sleep until a request comes, then take what else is waiting: 0.2 % of a core idle, against LitServe's 98 %."""

    def get_batch_requests(self, lit_api: ls.LitAPI, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        """Return ([(queue id, uid, payload)], [(queue id, uid) of requests past their time])."""
        ready: list[Any] = []
        late: list[Any] = []
        try:
            item = request_queue.get(timeout=1.0)
        except Empty:
            return ready, late
        while True:
            if item == _SENTINEL_VALUE:
                raise _StopLoopError
            queue_id, uid, submitted, payload = item
            if time.monotonic() - submitted > lit_api.request_timeout:
                late.append((queue_id, uid))
            else:
                ready.append((queue_id, uid, payload))
            if len(ready) >= lit_api.max_batch_size:
                return ready, late
            try:
                item = request_queue.get_nowait()
            except Empty:
                return ready, late


class Server(ls.LitServer):
    """LitServe's processes and queues without its routes, ready only when every worker is."""

    def __init__(self, lanes: list[tuple[ls.LitAPI, float]], register: Callable[["Server"], None]) -> None:
        self._register = register
        self.greeting = ""
        self.failed = ""
        self.stopping = False
        # an engine finds its own device: LitServe's accelerator would only ask for torch
        super().__init__([api for api, _ in lanes], accelerator="cpu", devices=1, timeout=max(t for _, t in lanes), restart_workers=True)
        for api, deadline in lanes:
            api.request_timeout = deadline  # what nobody waits for any more is not computed

    def register_endpoints(self) -> None:
        """Put our routes on the app instead of LitServe's."""
        self.app.router.redirect_slashes = False
        self._register(self)

    def verify_worker_status(self) -> None:
        """Wait until all workers are ready; raise EngineError when one fails or dies during set-up."""
        while True:
            states = list(self.workers_setup_status.values())
            if all(state == WorkerSetupStatus.READY for state in states):
                return
            if any(state == WorkerSetupStatus.ERROR for state in states) or not all(w.is_alive() for w in self.inference_workers):
                raise EngineError("a worker failed to start; its error is above")
            time.sleep(0.02)

    def _start_server(self, port: int, *arguments: Any, **options: Any) -> Any:
        """Start the HTTP process, greet when it answers, and end the server should it die: LitServe watches workers only."""
        processes = super()._start_server(port, *arguments, **options)
        threading.Thread(target=self._watch, args=(port, list(processes.values())), daemon=True, name="watch-http").start()
        return processes

    def _watch(self, port: int, processes: list[Any]) -> None:
        while all(process.is_alive() for process in processes):
            if self.greeting and answers(port):
                print(self.greeting, flush=True)
                self.greeting = ""
            time.sleep(0.1 if self.greeting else 1.0)
        with contextlib.suppress(OSError, EOFError):  # the manager is gone: the server is already going down
            if not self._shutdown_event.is_set():
                self.failed = "the HTTP process died; the log above may say why"
                self._shutdown_event.set()

    def _perform_graceful_shutdown(self, *arguments: Any) -> None:
        """Say first that this is the end, or the monitor would start terminated workers again."""
        self.stopping = True
        # from another thread: this one's connection to the manager is still inside the wait() that a signal broke off
        teller = threading.Thread(target=self._shutdown_event.set, daemon=True)
        teller.start()
        teller.join(2)
        super()._perform_graceful_shutdown(*arguments)

    def ready(self, api: ls.LitAPI | None = None) -> bool:
        """Return whether every worker, or every worker of ``api``, is ready."""
        kind = api.api_path.rsplit("/", 1)[-1] + "_" if api else ""
        try:
            states = [state for name, state in self.workers_setup_status.items() if name.startswith(kind)]
        except (ConnectionError, EOFError):  # the manager is gone: the server is going down
            return False
        return bool(states) and all(state == WorkerSetupStatus.READY for state in states)


def answers(port: int) -> bool:
    """Return whether something on this machine answers GET /health."""
    connection = http.client.HTTPConnection("localhost", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Abandoned(Problem):
    """Nobody waits for the answer any more, but the worker may still be computing it."""


class Lane:
    """One worker kind as the HTTP process sees it: bounded, with a deadline, and cancelled with its client.

    Requests wait here, where a client that leaves takes its request along, and only ``slots`` of them at a time are in
    the worker's queue, where nothing can be taken back.
    """

    def __init__(self, server: Server, api: ls.LitAPI, *, limit: int, slots: int, deadline: float, limit_name: str) -> None:
        self._handler, self._server = RegularRequestHandler(api, server), server
        self._limit, self._deadline, self._limit_name = limit, deadline, limit_name
        self._slots = asyncio.Semaphore(slots)
        self._abandoned: set[asyncio.Task[None]] = set()
        self.in_flight = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[float]:
        """Hold one of the lane's places, from reading the body to the answer; give the time at which the request is late.

        Raises Problem 503 when the lane is full.
        """
        if self.in_flight >= self._limit:
            detail = f"{self._limit} requests are already waiting ({self._limit_name}); try again in a second"
            raise Problem(503, detail, headers={"Retry-After": "1"})
        self.in_flight += 1
        try:
            yield time.monotonic() + self._deadline
        finally:
            self.in_flight -= 1

    async def submit(self, payload: Any, request: Request, late: float) -> Any:
        """Return the worker's answer to ``payload``.

        Raises Problem: 504 at ``late``, 499 when the client has gone, 500 when the worker failed.
        """
        await self._wait(self._slots.acquire, request, late)
        held = True
        uid = ""
        try:
            uid, _ = await self._handler._submit_request(payload)
            item = ResponseBufferItem(asyncio.Event())
            self._server.response_buffer[uid] = item
            try:
                await self._wait(item.event.wait, request, late, lost=self._worker_is_down)
            except Abandoned:
                held = False  # the worker may be at it: its slot is free when it answers, or has died
                task = asyncio.create_task(self._outlive(uid, item))
                self._abandoned.add(task)
                task.add_done_callback(self._abandoned.discard)
                raise
            answer, status = item.response
            if status == LitAPIStatus.ERROR:
                raise Problem(500, "the model failed on this request; the server's log has the cause")
            return answer
        finally:
            if held:
                self._server.response_buffer.pop(uid, None)
                self._slots.release()

    def _worker_is_down(self) -> bool:
        return not self._server.ready(self._handler.lit_api)

    async def _wait(
        self, what: Callable[[], Coroutine[Any, Any, Any]], request: Request, late: float, lost: Callable[[], bool] = lambda: False
    ) -> None:
        look = time.monotonic() + LOOK
        task = asyncio.ensure_future(what())
        try:
            while not task.done():
                left = late - time.monotonic()
                if left <= 0:
                    raise Abandoned(504, f"no answer within {self._deadline:g} s; try again, or ask for less", headers={"Retry-After": "1"})
                await asyncio.wait({task}, timeout=min(POLL, left))
                if not task.done() and await request.is_disconnected():
                    raise Abandoned(499, "the client closed the connection")
                if time.monotonic() >= look and not task.done():
                    look = time.monotonic() + LOOK
                    if lost():
                        raise Problem(503, "the worker died on this request and is starting again; try again", headers={"Retry-After": "3"})
        except BaseException:
            if not task.cancel() and what == self._slots.acquire:
                self._slots.release()  # the slot came just as the client left
            raise

    async def _outlive(self, uid: str, item: ResponseBufferItem) -> None:
        end = time.monotonic() + self._deadline
        while not item.event.is_set() and time.monotonic() < end and not self._worker_is_down():
            await asyncio.sleep(LOOK)
        self._server.response_buffer.pop(uid, None)
        self._slots.release()


def run(server: Server, host: str, port: int, greeting: str) -> None:
    """Serve until SIGINT or SIGTERM, then leave no process behind; print ``greeting`` when every worker is ready.

    LitServe orphans its workers on SIGTERM and, as PID 1, ignores it; here both signals end it the same way.
    """
    owner = os.getpid()
    server.greeting = greeting

    def stop(*_: object) -> None:
        if os.getpid() == owner:
            signal.setitimer(signal.ITIMER_REAL, 2.0)
            raise KeyboardInterrupt
        raise SystemExit(0)  # the forked HTTP process: uvicorn has shut down and raises its signal once more

    def again(*_: object) -> None:
        if not server.stopping:
            stop()  # Python drops an exception that a signal raises in a destructor or a callback

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, again)
    try:
        server.run(
            http="h11",  # httptools takes headers without a limit
            host=host,
            port=port,
            num_api_servers=1,
            log_level="warning",
            pretty_logs=False,
            generate_client_file=False,
            access_log=False,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=64 * 1024,
        )
    except KeyboardInterrupt:
        log.info("stopped while starting")
    finally:
        server.stopping = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for child in mp.active_children():
            child.terminate()
            child.join(timeout=5)
            if child.is_alive():
                child.kill()
    if server.failed:
        raise EngineError(server.failed)


def check_address(host: str, port: int) -> None:
    """Raise EngineError when LitServe cannot listen there, before any worker is started."""
    if not 1024 <= port <= 65535:
        raise EngineError(f"port must be 1024 to 65535, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise EngineError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port, or make serve PORT=..."
        ) from error
