"""Jobs that are drawn by chains: bounded by each client's chains and by estimated seconds, and given to a worker at once."""

import math
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Protocol

from ebjdat_serve.fairness import may_hold, work_until_done
from ebjdat_serve.scheduling import FAIRNESS_QUOTA, size_class
from ebjdat_serve.server import ipc
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.request_queue import PendingRequest, RequestQueue, WorkerConnection

WAIT_WINDOW = 60.0
"""Seconds over which the longest wait of a chain is kept."""
BUSY = "the server has too much to draw; try again after the seconds in Retry-After, or ask for less"
"""A refusal that does not tell the load."""


class ChainJob(Protocol):
    """Payload of this queue: a number of chains, and their chain-steps."""

    @property
    def n(self) -> int:
        """Chains."""

    @property
    def work(self) -> int:
        """Chain-steps."""


@dataclass
class Work:
    """A job that a worker has: whose it is, its size class, and the chain-steps left."""

    client: str
    size_class: int
    left: int


class GenerateQueue(RequestQueue):
    """Gives each job to a worker at once, where its chains join the others; admission bounds the chains and the work in progress.

    A client has ``max_chains`` while no other has any; all clients share twice as many, as they do slots.
    """

    kind = "generate"

    def __init__(self, *, workers: int, size: int, deadline: float, worker_timeout: float, max_chains: int, max_backlog: float) -> None:
        super().__init__(workers=workers, size=size, deadline=deadline, worker_timeout=worker_timeout)
        self._max_chains, self._max_backlog = max_chains, max_backlog
        self._work: dict[int, Work] = {}  # by message number
        self._rates: dict[int, float] = {}  # chain-steps per second, by pid
        self._longest_waits: deque[tuple[float, float]] = deque()
        self._parked: list[PendingRequest] = []
        self.steps = 0  # chain-steps that workers have told of

    @property
    def rate(self) -> float:
        """Chain-steps per second of all workers together; 0 while unknown."""
        return sum(self._rates.get(worker.pid, 0.0) for worker in self.workers)

    @property
    def chains(self) -> int:
        """Chains in progress; a finished stream has none, however slowly its client reads."""
        return self._chains().total()

    @property
    def work(self) -> int:
        """Chain-steps left."""
        return sum(work.left for work in self._work.values())

    @property
    def longest_wait(self) -> float:
        """Longest wait of a chain for a step in the last minute, in seconds."""
        while self._longest_waits and self._longest_waits[0][0] < time.monotonic() - WAIT_WINDOW:
            self._longest_waits.popleft()
        return max((seconds for _, seconds in self._longest_waits), default=0.0)

    def admit(self, client: str, job: ChainJob) -> None:
        """Raise Problem 429 when ``client`` has too many chains, or its work with this job's could not be done in the allowed time."""
        chains = self._chains()
        if not may_hold(chains, client, job.n, 2 * self._max_chains):
            own, others = chains[client], chains.total() - chains[client]
            most = self._max_chains - math.ceil(others / 2)
            detail = f"{own} of your chains are running and at most {most} may now (serve --generate-chains)"
            headers = {"Retry-After": str(self.retry_after())}
            raise Problem(429, f"{detail}; try again later, or ask for fewer", headers=headers, public=BUSY)
        if self.work and self.rate and (seconds := self._estimate(client, job)) > self._max_backlog:
            wait = max(1, min(60, math.ceil(seconds - self._max_backlog)))
            detail = (
                f"it would take about {seconds:.0f} s with {self.work} chain-steps to go, more than {self._max_backlog:g} s "
                f"(serve --generate-backlog); try again in {wait} s, or ask for less"
            )
            raise Problem(429, detail, headers={"Retry-After": str(wait)}, public=BUSY)

    def _chains(self) -> Counter[str]:
        """Return the chains in progress by client."""
        chains = Counter[str]()
        for pending in self.pending:
            if not pending.future.done():
                chains[pending.client] += pending.payload.n
        return chains

    def _estimate(self, client: str, job: ChainJob) -> float:
        """Return the seconds until a job would be done.

        Of the client's own jobs, only those of its size or less delay it; each other client is served as much meanwhile, or all it has.
        """
        left, ahead = Counter[str](), 0
        for work in self._work.values():
            left[work.client] += work.left
            ahead += work.left if work.client == client and work.size_class <= size_class(job.work) else 0
        own = min(left.pop(client, 0) + job.work, int((1 + FAIRNESS_QUOTA) * (ahead + job.work)))
        return work_until_done(left, client, own) / self.rate

    def retry_after(self) -> int:
        """Return in about how many seconds half of the work will be done."""
        return max(1, min(60, math.ceil(self.work / self.rate / 2))) if self.rate else 1

    def enqueue(self, pending: PendingRequest) -> None:
        """Give the job to the worker with the least work, or keep it until there is one."""
        able = [worker for worker in self.workers if pending.key in worker.loaded]
        if not able:
            self._parked.append(pending)
            return
        worker = min(able, key=lambda worker: sum(self._work[number].left for number in worker.in_flight))
        number, work = next(self._numbers), pending.payload.work
        worker.in_flight[number] = [pending]
        self._work[number] = Work(pending.client, size_class(work), work)
        worker.send(ipc.Request(number, pending.key, pending.operation, pending.payload, pending.client))

    def withdraw(self, pending: PendingRequest) -> None:
        """Have the worker drop the job's chains at its next step, if it still has them."""
        if pending in self._parked:
            self._parked.remove(pending)
        for worker in self.workers:
            for number in [number for number, requests in worker.in_flight.items() if pending in requests]:
                del worker.in_flight[number]
                self._work.pop(number, None)
                worker.send(ipc.Cancel(number))

    def resolve(self, requests: list[PendingRequest], value: Any) -> None:
        """Give the job its result."""
        for pending in requests:
            pending.resolve(value)

    def worker_ready(self, worker: WorkerConnection) -> None:
        """Give the worker the jobs that waited for one."""
        parked, self._parked = self._parked, []
        for pending in parked:
            self.enqueue(pending)

    def handle(self, worker: WorkerConnection, message: Any) -> None:
        """Handle a result, a preview or stats."""
        match message:
            case ipc.Preview(number, value):
                for pending in worker.in_flight.get(number, []):
                    pending.preview = value
                    pending.changed.set()
            case ipc.Stats(rate, left, longest_wait, steps):
                self._rates[worker.pid] = rate
                self.steps += steps
                self._longest_waits.append((time.monotonic(), longest_wait))
                for number, steps in left.items():
                    if number in self._work:
                        self._work[number].left = steps
            case ipc.Response(number) | ipc.UnknownOperation(number, _):
                self._work.pop(number, None)
                super().handle(worker, message)

    def size(self, pending: PendingRequest) -> int:
        """Return the chains of a request."""
        chains: int = pending.payload.n
        return chains

    def preview_taken(self, pending: PendingRequest) -> None:
        """Tell the worker that the client has received the last preview."""
        for worker in self.workers:
            for number, requests in worker.in_flight.items():
                if pending in requests:
                    worker.send(ipc.PreviewTaken(number))

    def worker_lost(self, worker: WorkerConnection) -> None:
        """Forget the work of a dead worker."""
        super().worker_lost(worker)
        self._rates.pop(worker.pid, None)
        for number in worker.in_flight:
            self._work.pop(number, None)
