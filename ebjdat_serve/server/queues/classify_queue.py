"""Images that wait for a forward pass: requests for the same operation and bundle share a batch, and clients take turns in it."""

import asyncio
from typing import Any

import numpy as np

from ebjdat_serve.fairness import FairQueue
from ebjdat_serve.server import ipc
from ebjdat_serve.server.queues.request_queue import PendingRequest, RequestQueue, WorkerConnection

DEPTH = 2
"""Batches in flight per worker, so that the next is there when one is finished."""
JOINED = 2**20
"""Bytes of a batch that are copied in the event loop."""
Use = tuple[str, str]
"""What a batch is for: a bundle and an operation."""


def together(parts: list[Any]) -> Any:
    """Return the rows of several arrays in one; as they are where that would keep the event loop, for the worker to do it."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if sum(part.nbytes for part in parts) <= JOINED else parts


class ClassifyQueue(RequestQueue):
    """Batches whatever waits when a worker is free; payload and response are arrays, or indexed like one, with a row per image."""

    kind = "classify"

    def __init__(self, *, workers: int, size: int, deadline: float, worker_timeout: float, max_batch: int) -> None:
        super().__init__(workers=workers, size=size, deadline=deadline, worker_timeout=worker_timeout)
        self._waiting: dict[Use, FairQueue[PendingRequest]] = {}  # none is empty
        self._numbers_waiting: dict[PendingRequest, int] = {}  # by which a request is taken back
        self._max_batch = max_batch
        self._scheduled = False

    def enqueue(self, pending: PendingRequest) -> None:
        """Wait at least until the event loop has read what else has come."""
        queue = self._waiting.setdefault((pending.key, pending.operation), FairQueue())
        self._numbers_waiting[pending] = queue.push(pending.client, pending, len(pending.payload))
        self._schedule()

    def withdraw(self, pending: PendingRequest) -> None:
        """Drop a request that waits; a batch in flight is computed to its end, some milliseconds."""
        number = self._numbers_waiting.pop(pending, None)
        if number is not None:
            use = pending.key, pending.operation
            self._waiting[use].remove(number)
            self._drop_if_empty(use)
            self._schedule()

    def resolve(self, requests: list[PendingRequest], value: Any) -> None:
        """Give each request of a batch its rows."""
        start = 0
        for pending in requests:
            pending.resolve(value[start : (start := start + len(pending.payload))])
        self._schedule()

    def worker_ready(self, worker: WorkerConnection) -> None:
        """Give the worker what waits."""
        self._schedule()

    def worker_lost(self, worker: WorkerConnection) -> None:
        """Go on with the other workers."""
        super().worker_lost(worker)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        # by bundle: one that no worker has open keeps nobody else waiting
        while ready := [
            (first.since, use, worker)
            for use, waiting in self._waiting.items()
            if (first := waiting.peek()) and (worker := self._free_worker(use))
        ]:
            _, use, worker = min(ready, key=lambda one: one[0])
            number, batch = next(self._numbers), self._batch(use)
            worker.in_flight[number] = batch
            worker.send(ipc.Request(number, *use, together([pending.payload for pending in batch])))

    def _free_worker(self, use: Use) -> WorkerConnection | None:
        """Return the idlest worker that has the bundle open and takes another batch."""
        free = [worker for worker in self.workers if use[0] in worker.loaded and len(worker.in_flight) < DEPTH]
        return min(free, key=lambda worker: len(worker.in_flight), default=None)

    def _batch(self, use: Use) -> list[PendingRequest]:
        """Take as many requests as one batch holds, at least one."""
        waiting, batch, size = self._waiting[use], list[PendingRequest](), 0
        while (pending := waiting.peek()) and (not batch or size + len(pending.payload) <= self._max_batch):
            batch.append(waiting.pop())
            size += len(pending.payload)
            del self._numbers_waiting[pending]
        self._drop_if_empty(use)
        return batch

    def _drop_if_empty(self, use: Use) -> None:
        if not self._waiting[use]:
            del self._waiting[use]
