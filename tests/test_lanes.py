"""What waits in the HTTP process: admission by estimated seconds, batches by bundle, what is given back."""

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from ebjdat_serve.server.answer.problems import Problem
from ebjdat_serve.server.ipc import Answer, Job, Loaded, Pace
from ebjdat_serve.server.queues.generate_queue import GenerateLane
from ebjdat_serve.server.queues.request_queue import ClassifyLane, Item, Peer
from ebjdat_serve.sgld import Sampler


@dataclass
class Writer:
    """A wire that goes nowhere."""

    sent: list[bytes] = field(default_factory=list)

    def write(self, data):
        self.sent.append(data)

    def is_closing(self):
        return False


def peer(*keys):
    return Peer(1, Writer(), loaded={key: Loaded(key, {}) for key in keys})


def job(n, steps):
    return Job(0, n, Sampler(steps, 0.25, 2.0, 0.005), seed=0)


def item(payload, key="k"):
    return Item(key, payload, None, time.monotonic() + 60)


def test_a_long_job_is_refused_where_a_short_one_that_overtakes_is_not():
    async def run():
        lane = GenerateLane(workers=1, deadline=120.0, worker_timeout=30.0, chains=128, backlog=60.0)
        worker = peer("k")
        lane.peers.append(worker)
        lane.heard(worker, Pace(100.0, {}))  # chain-steps a second
        lane.admit(job(8, 1000))  # when nothing is under way, whatever the limits of a request allow
        lane.enter(item(job(8, 1000)))
        assert lane.work == 8000
        lane.admit(job(1, 20))
        with pytest.raises(Problem) as refused:
            lane.admit(job(8, 900))
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) == 60  # it would be 92
        (number,) = worker.owes
        lane.heard(worker, Pace(100.0, {number: 1000}))
        lane.admit(job(4, 900))
        with pytest.raises(Problem, match="at most 128"):
            lane.admit(job(129, 1))

    asyncio.run(run())


def test_a_bundle_that_no_worker_has_open_keeps_nobody_waiting():
    async def run():
        lane = ClassifyLane(workers=1, deadline=10.0, worker_timeout=30.0, max_batch=4)
        worker = peer("new")
        lane.peers.append(worker)
        pixels = np.zeros((1, 2, 2, 3), np.uint8)
        old, new = item(pixels, "old"), [item(pixels, "new") for _ in range(6)]
        for one in [old, *new]:
            lane.enter(one)
        await asyncio.sleep(0)
        assert [len(items) for items in worker.owes.values()] == [4, 2]  # two batches, none larger than a batch may be
        assert old not in [one for items in worker.owes.values() for one in items]
        lane.heard(worker, Answer(next(iter(worker.owes)), FakeVerdicts(4)))
        assert [one.future.done() for one in new] == [True] * 4 + [False] * 2
        worker.loaded["old"] = Loaded("old", {})
        lane.joined(worker)
        await asyncio.sleep(0)
        assert old in [one for items in worker.owes.values() for one in items]

    asyncio.run(run())


@dataclass
class FakeVerdicts:
    n: int

    def rows(self, chosen):
        return chosen
