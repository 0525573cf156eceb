"""Tests of the HTTP process's queues: admission by estimated seconds, batches by bundle and operation, the rows of each request."""

import asyncio
import pickle
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from ebjdat_serve.server import ipc
from ebjdat_serve.server.payloads import GenerateJob
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.classify_queue import ClassifyQueue
from ebjdat_serve.server.queues.generate_queue import GenerateQueue
from ebjdat_serve.server.queues.request_queue import PendingRequest, WorkerConnection
from ebjdat_serve.sgld import Sampler


@dataclass
class Writer:
    """A socket that goes nowhere."""

    sent: list[bytes] = field(default_factory=list)

    def write(self, data):
        self.sent.append(data)

    def is_closing(self):
        return False

    def messages(self):
        return [pickle.loads(data[ipc.LENGTH.size :]) for data in self.sent]


def connected(queue, *keys):
    worker = WorkerConnection(1, None, Writer(), loaded={key: ipc.ModelLoaded(key, {}) for key in keys})
    queue.workers.append(worker)
    return worker


def job(n, steps):
    return GenerateJob(0, n, Sampler(steps, 0.25, 2.0, 0.005), seed=0)


def pending(payload, key="k", operation="predict"):
    return PendingRequest(key, operation, payload, None, time.monotonic() + 60)


def classify_queue(max_batch=4):
    return ClassifyQueue(workers=1, size=256, deadline=10.0, worker_timeout=30.0, max_batch=max_batch)


def test_a_long_job_is_refused_where_a_short_one_that_overtakes_is_not():
    async def run():
        queue = GenerateQueue(workers=1, size=256, deadline=120.0, worker_timeout=30.0, max_chains=128, max_backlog=60.0)
        worker = connected(queue, "k")
        queue.handle(worker, ipc.Stats(100.0, {}))  # chain-steps a second
        queue.admit(job(8, 1000))  # when nothing is in progress, whatever the limits of a request allow
        queue.enqueue(pending(job(8, 1000), operation="generate"))
        assert queue.work == 8000
        queue.admit(job(1, 20))
        with pytest.raises(Problem) as refused:
            queue.admit(job(8, 900))
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) == 60  # it would be 92
        (number,) = worker.in_flight
        queue.handle(worker, ipc.Stats(100.0, {number: 1000}))
        queue.admit(job(4, 900))
        with pytest.raises(Problem, match="at most 128"):
            queue.admit(job(129, 1))

    asyncio.run(run())


def test_a_bundle_that_no_worker_has_open_keeps_nobody_waiting():
    async def run():
        queue = classify_queue()
        worker = connected(queue, "new")
        pixels = np.zeros((1, 2, 2, 3), np.uint8)
        old, new = pending(pixels, "old"), [pending(pixels, "new") for _ in range(6)]
        for one in [old, *new]:
            queue.enqueue(one)
        await asyncio.sleep(0)
        assert [len(requests) for requests in worker.in_flight.values()] == [4, 2]  # two batches, none larger than a batch may be
        assert old not in [one for requests in worker.in_flight.values() for one in requests]
        queue.handle(worker, ipc.Response(next(iter(worker.in_flight)), np.arange(4)))
        assert [one.future.done() for one in new] == [True] * 4 + [False] * 2
        worker.loaded["old"] = ipc.ModelLoaded("old", {})
        queue.worker_ready(worker)
        await asyncio.sleep(0)
        assert old in [one for requests in worker.in_flight.values() for one in requests]

    asyncio.run(run())


def test_a_batch_is_of_one_operation_and_each_request_gets_its_rows():
    async def run():
        queue = classify_queue(max_batch=8)
        worker = connected(queue, "k")
        wanted = [("predict", 1), ("logits", 2), ("predict", 3), ("logits", 1)]
        requests = [pending(np.full((n, 2, 2, 3), i, np.uint8), operation=operation) for i, (operation, n) in enumerate(wanted)]
        for one in requests:
            queue.enqueue(one)
        await asyncio.sleep(0)
        sent = worker.writer.messages()
        assert [(message.operation, message.payload[:, 0, 0, 0].tolist()) for message in sent] == [
            ("predict", [0, 2, 2, 2]),
            ("logits", [1, 1, 3]),
        ]
        for message in sent:
            queue.handle(worker, ipc.Response(message.number, message.payload[:, 0, 0, 0]))
        assert [one.future.result().tolist() for one in requests] == [[0], [1, 1], [2, 2, 2], [3]]

    asyncio.run(run())
