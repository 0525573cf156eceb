"""Requests that wait for one kind of worker: bounded in all and by client, with a deadline each, cancelled when their client leaves."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from ebjdat_serve.fairness import may_hold
from ebjdat_serve.server import ipc
from ebjdat_serve.server.disconnects import on_disconnect
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.tallies import Newest, QueueTally
from ebjdat_serve.server.trace import Trace

log = logging.getLogger("ebjdat_serve")
LOOK_SECONDS = 0.5
"""Seconds between checks that workers are heard of."""


@dataclass(eq=False)
class PendingRequest:
    """A request that waits for its result.

    ``key`` is the bundle it was read for, ``client`` is who it is counted for, ``deadline`` is a time of time.monotonic().
    """

    key: str
    operation: str
    payload: Any
    request: Request
    client: str
    deadline: float
    future: "asyncio.Future[Any]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float = field(default_factory=time.monotonic)
    preview: Any = None  # the newest, None when the client has it
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set when there is a preview or the result

    @property
    def trace(self) -> Trace | None:
        """What is noted of the request; None for one that came by no connection."""
        found: Trace | None = getattr(self.request, "scope", {}).get("trace")
        return found

    def took(self, seconds: float) -> float:
        """Note that a worker computed for so many seconds; return how many the request waited."""
        waited = max(0.0, time.monotonic() - self.since - seconds)
        if self.trace:
            self.trace.compute, self.trace.queue = seconds, waited
        return waited

    def resolve(self, value: Any) -> None:
        """End the wait with a result, unless it has ended."""
        if not self.future.done():
            self.future.set_result(value)
        self.changed.set()

    def fail(self, problem: Problem) -> None:
        """End the wait with an error, unless it has ended."""
        if not self.future.done():
            self.future.set_exception(problem)
        self.changed.set()


@dataclass(eq=False)
class WorkerConnection:
    """A connected worker: the bundles it has open, and the requests that each message sent to it answers, by the message's number."""

    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    loaded: dict[str, ipc.ModelLoaded] = field(default_factory=dict)
    in_flight: dict[int, list[PendingRequest]] = field(default_factory=dict)
    last_heard: float = field(default_factory=time.monotonic)

    def send(self, message: object) -> None:
        """Send a message; the reader of a worker that has gone finds that out."""
        if not self.writer.is_closing():
            self.writer.writelines(ipc.encode(message))


class RequestQueue(ABC):
    """What both queues share: slots, deadlines, clients that leave, workers that die or hang.

    A client has ``size`` slots while no other has any. All clients have twice as many together, and each as many as are left free
    (``fairness.may_hold``), so one that takes all it may leaves places for others.
    """

    kind: ipc.Kind

    def __init__(self, *, workers: int, size: int, deadline: float, worker_timeout: float) -> None:
        self._worker_count, self._size, self._deadline, self._worker_timeout = workers, size, deadline, worker_timeout
        self.workers: list[WorkerConnection] = []
        self.pending: set[PendingRequest] = set()
        self.slots: Counter[str] = Counter()  # requests that hold one, by client
        self.uses: Counter[str] = Counter()  # of them, by the bundle they are read for
        self.tallies = Newest[QueueTally]()  # by bundle
        self.restarts = 0
        self.closed = ""
        self._numbers = itertools.count(1)

    def ready(self, key: str) -> bool:
        """Return whether every worker has the bundle open."""
        return sum(key in worker.loaded for worker in self.workers) >= self._worker_count

    @property
    def active(self) -> int:
        """Requests that hold a slot."""
        return self.slots.total()

    def check_room(self, client: str) -> None:
        """Raise Problem 503 when ``client`` has all slots that it may have now."""
        if not may_hold(self.slots, client, 1, 2 * self._size):
            detail = f"{self.slots[client]} of your requests are waiting and no more may (serve --{self.kind}-queue); try again in a second"
            raise Problem(503, detail, headers={"Retry-After": "1"}, public="the server is busy; try again in a second")

    @contextlib.contextmanager
    def slot(self, key: str, client: str) -> Iterator[float]:
        """Hold a slot and the bundle ``key``, from the end of the body to the response; give the deadline.

        Raises Problem 503 when ``client`` has all slots that it may have now.
        """
        self.check_room(client)
        self.slots[client] += 1
        self.uses[key] += 1
        try:
            yield time.monotonic() + self._deadline
        finally:
            self.slots[client] -= 1
            if not self.slots[client]:
                del self.slots[client]
            self.uses[key] -= 1

    @contextlib.contextmanager
    def waiting(self, pending: PendingRequest) -> Iterator[None]:
        """Queue ``pending`` until the block ends.

        It fails at its deadline and when its client leaves, and is withdrawn when nobody waits for it any more.
        """
        if self.closed:
            raise Problem(503, self.closed, headers={"Retry-After": "5"})
        after = str(self.retry_after())  # by what waits now: this request may be all that waits by then

        def overdue() -> None:
            pending.fail(Problem(504, f"no answer within {self._deadline:g} s; try again, or ask for less", headers={"Retry-After": after}))

        timer = asyncio.get_running_loop().call_later(max(0.0, pending.deadline - time.monotonic()), overdue)
        self.pending.add(pending)
        pending.future.add_done_callback(lambda _: self.withdraw(pending))  # also when nobody reads a stream to its end
        try:
            self.enqueue(pending)
            with on_disconnect(pending.request, lambda: pending.fail(Problem(499, "the client closed the connection"))):
                yield
        finally:
            timer.cancel()
            self.pending.discard(pending)
            if not pending.future.cancel() and not pending.future.cancelled():
                pending.future.exception()  # asyncio logs an exception that nobody retrieved

    async def submit(self, pending: PendingRequest) -> Any:
        """Return the result of ``pending``.

        Raises Problem: 504 at its deadline, 499 when the client has left, 503 when the worker died on it.
        """
        with self.waiting(pending):
            return await pending.future

    @abstractmethod
    def enqueue(self, pending: PendingRequest) -> None:
        """Give a new request to a worker, or keep it until one is free."""

    @abstractmethod
    def withdraw(self, pending: PendingRequest) -> None:
        """Drop a request that is over; it may have been answered."""

    @abstractmethod
    def resolve(self, requests: list[PendingRequest], value: Any) -> None:
        """Give each request of one message its part of the response."""

    @abstractmethod
    def worker_ready(self, worker: WorkerConnection) -> None:
        """Give work to a worker that has just opened a bundle, or is free again."""

    def retry_after(self) -> int:
        """Return after how many seconds a refused client should try again."""
        return 1

    async def serve(self, worker: WorkerConnection) -> AsyncIterator[ipc.ModelLoaded | ipc.ModelRefused]:
        """Handle a worker's messages until it is gone, and yield those that are about models.

        Raises asyncio.IncompleteReadError or ConnectionError when the worker has gone.
        """
        while True:
            message = await ipc.receive(worker.reader)
            worker.last_heard = time.monotonic()
            if isinstance(message, ipc.ModelLoaded | ipc.ModelRefused):
                yield message
            else:
                self.handle(worker, message)

    def handle(self, worker: WorkerConnection, message: Any) -> None:
        """Handle a worker's message about a request."""
        match message:
            case ipc.Response(number, value, seconds):
                requests = worker.in_flight.pop(number, [])
                self.count(requests, seconds)
                self.resolve(requests, value)
            case ipc.UnknownOperation(number, operation):
                problem = Problem(500, f"no {self.kind} worker has the operation {operation!r}: list it in the endpoint's operations")
                for pending in worker.in_flight.pop(number, []):
                    pending.fail(problem)
                self.worker_ready(worker)

    def count(self, requests: list[PendingRequest], seconds: float) -> None:
        """Count a message that was answered."""
        if requests:
            tally = self.tallies.of(requests[0].key, QueueTally)
            tally.compute.add(seconds)
            tally.batch.add(sum(self.size(pending) for pending in requests))
            for pending in requests:
                tally.queue.add(pending.took(seconds))

    def size(self, pending: PendingRequest) -> int:
        """Return the images, or chains, of a request."""
        return len(pending.payload)

    def worker_lost(self, worker: WorkerConnection) -> None:
        """Fail the requests that a dead worker had; those that wait go to the next."""
        self.workers.remove(worker)
        self.restarts += not self.closed
        for pending in itertools.chain(*worker.in_flight.values()):
            pending.fail(Problem(503, "the worker died on this request and is starting again; try again", headers={"Retry-After": "3"}))

    def close(self, why: str) -> None:
        """Fail all requests, and those to come, with Problem 503."""
        self.closed = why
        for pending in list(self.pending):
            pending.fail(Problem(503, why, headers={"Retry-After": "5"}))

    async def watch(self) -> None:
        """Kill workers that hang, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for worker in self.workers:
                if not worker.in_flight:
                    worker.last_heard = now
                elif (silent := now - worker.last_heard) > self._worker_timeout:
                    log.error("the %s worker %d has not said a word for %.0f s: killed, another will start", self.kind, worker.pid, silent)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker.pid, signal.SIGKILL)
                    worker.last_heard = now
