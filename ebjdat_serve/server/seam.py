"""The one place that knows LitServe's private names (0.2.19): queues in, answers out, a loop that sleeps, clean exits.

Each private name used here has a contract test in tests/test_seam.py; reference measurements are in docs/decisions/0004.
"""

import asyncio
import contextlib
import logging
import multiprocessing as mp
import os
import signal
import socket
import time
from collections.abc import Callable
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

    greeting = ""

    def __init__(self, apis: list[ls.LitAPI], register: Callable[["Server"], None], *, accelerator: str, timeout: float) -> None:
        self._register = register
        super().__init__(apis, accelerator=accelerator, devices=1, timeout=timeout, restart_workers=True)

    def register_endpoints(self) -> None:
        """Put our routes on the app instead of LitServe's."""
        self._register(self)

    def verify_worker_status(self) -> None:
        """Wait until all workers are ready; raise EngineError when one fails or dies during set-up."""
        while True:
            states = list(self.workers_setup_status.values())
            if all(state == WorkerSetupStatus.READY for state in states):
                print(self.greeting, flush=True)
                return
            if any(state == WorkerSetupStatus.ERROR for state in states) or not all(w.is_alive() for w in self.inference_workers):
                raise EngineError("a worker failed to start; its error is above")
            time.sleep(0.02)

    def ready(self) -> bool:
        """Return whether every worker is ready."""
        try:
            states = list(self.workers_setup_status.values())
        except (ConnectionError, EOFError):  # the manager is gone: the server is going down
            return False
        return bool(states) and all(state == WorkerSetupStatus.READY for state in states)


class Lane:
    """One worker kind's queue as the HTTP process sees it: bounded, with a deadline, and cancelled with its client."""

    def __init__(self, server: Server, api: ls.LitAPI, *, limit: int, deadline: float, limit_name: str) -> None:
        self._handler, self._server = RegularRequestHandler(api, server), server
        self._limit, self._deadline, self._limit_name = limit, deadline, limit_name
        self.in_flight = 0

    async def submit(self, payload: Any, request: Request) -> Any:
        """Return the worker's answer to ``payload``.

        Raises Problem: 503 when the lane is full, 504 at the deadline, 499 when the client has gone, 500 when the worker failed.
        """
        if self.in_flight >= self._limit:
            raise Problem(
                503, f"{self._limit} requests are already waiting ({self._limit_name}); try again in a second", headers={"Retry-After": "1"}
            )
        self.in_flight += 1
        uid = ""
        end = time.monotonic() + self._deadline
        try:
            uid, _ = await self._handler._submit_request(payload)
            answered = asyncio.Event()
            self._server.response_buffer[uid] = ResponseBufferItem(answered)
            while not answered.is_set():
                left = end - time.monotonic()
                if left <= 0:
                    raise Problem(504, f"no answer within {self._deadline:g} s; try again, or ask for less", headers={"Retry-After": "1"})
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answered.wait(), min(POLL, left))
                if not answered.is_set() and await request.is_disconnected():
                    raise Problem(499, "the client closed the connection")
            answer, status = self._server.response_buffer[uid].response
            if status == LitAPIStatus.ERROR:
                raise Problem(500, "the model failed on this request; the server's log has the cause")
            return answer
        finally:
            self.in_flight -= 1
            self._server.response_buffer.pop(uid, None)


def run(server: Server, host: str, port: int, greeting: str) -> None:
    """Serve until SIGINT or SIGTERM, then leave no process behind; print ``greeting`` when every worker is ready.

    LitServe orphans its workers on SIGTERM and, as PID 1, ignores it; here both signals end it the same way.
    """
    owner = os.getpid()
    server.greeting = greeting

    def stop(*_: object) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        raise SystemExit(0)  # the forked HTTP process: uvicorn has shut down and raises its signal once more

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        server.run(
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
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for child in mp.active_children():
            child.terminate()
            child.join(timeout=5)
            if child.is_alive():
                child.kill()


def check_address(host: str, port: int) -> None:
    """Raise EngineError when LitServe cannot listen there, before any worker is started."""
    if not 1024 <= port <= 65535:
        raise EngineError(f"port must be 1024 to 65535, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port, or make serve PORT=..."
            ) from error
