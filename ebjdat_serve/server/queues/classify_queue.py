"""Images that wait for a forward pass: requests for the same operation and bundle share a batch."""

import asyncio
from collections import deque
from typing import Any

import numpy as np

from ebjdat_serve.server import ipc
from ebjdat_serve.server.queues.request_queue import PendingRequest, RequestQueue, WorkerConnection

DEPTH = 2
"""Batches in flight per worker, so that the next is there when one is finished."""


class ClassifyQueue(RequestQueue):
    """Batches whatever waits when a worker is free; payload and response are arrays, or indexed like one, with a row per image."""

    kind = "classify"

    def __init__(self, *, workers: int, size: int, deadline: float, worker_timeout: float, max_batch: int) -> None:
        super().__init__(workers=workers, size=size, deadline=deadline, worker_timeout=worker_timeout)
        self._waiting: deque[PendingRequest] = deque()
        self._max_batch = max_batch
        self._scheduled = False

    def enqueue(self, pending: PendingRequest) -> None:
        """Wait at least until the event loop has read what else has come."""
        self._waiting.append(pending)
        self._schedule()

    def withdraw(self, pending: PendingRequest) -> None:
        """Drop a request that waits; a batch in flight is computed to its end, some milliseconds."""
        if pending in self._waiting:
            self._waiting.remove(pending)
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
        for key, operation in dict.fromkeys((pending.key, pending.operation) for pending in self._waiting):
            while waiting := [pending for pending in self._waiting if (pending.key, pending.operation) == (key, operation)]:
                free = [worker for worker in self.workers if key in worker.loaded and len(worker.in_flight) < DEPTH]
                if not free:
                    break
                worker = min(free, key=lambda worker: len(worker.in_flight))
                number, batch = next(self._numbers), self._batch(waiting)
                worker.in_flight[number] = batch
                images = np.concatenate([pending.payload for pending in batch]) if len(batch) > 1 else batch[0].payload
                worker.send(ipc.Request(number, key, operation, images))

    def _batch(self, waiting: list[PendingRequest]) -> list[PendingRequest]:
        """Take as many requests as one batch holds, at least one."""
        size, n = len(waiting[0].payload), 1
        while n < len(waiting) and size + len(waiting[n].payload) <= self._max_batch:
            size, n = size + len(waiting[n].payload), n + 1
        taken = set(map(id, waiting[:n]))
        self._waiting = deque(pending for pending in self._waiting if id(pending) not in taken)
        return waiting[:n]
