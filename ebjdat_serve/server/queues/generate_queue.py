"""Drawings as the HTTP process sees them: bounded by chains and by estimated seconds, handed to a worker at once."""

import math
import time
from collections import deque
from typing import Any

from ebjdat_serve.scheduling import FAIRNESS_QUOTA, size_class
from ebjdat_serve.server.answer.problems import Problem
from ebjdat_serve.server.ipc import Answer, Ask, Cancel, Job, Pace, Preview, Show
from ebjdat_serve.server.queues.request_queue import Item, Lane, Peer


class GenerateLane(Lane):
    """Jobs go to their worker at once, where their chains join the others; what may go is bounded by chains and by estimated seconds."""

    def __init__(self, *, workers: int, deadline: float, worker_timeout: float, chains: int, backlog: float) -> None:
        super().__init__("generate", workers=workers, deadline=deadline, worker_timeout=worker_timeout)
        self._chains, self._backlog = chains, backlog
        self._left: dict[int, int] = {}
        self._longest: deque[tuple[float, float]] = deque()
        self._lengths: dict[int, int] = {}
        self._rates: dict[int, float] = {}
        self._parked: list[Item] = []

    @property
    def rate(self) -> float:
        """Chain-steps a second of all workers together; 0 while unknown."""
        return sum(self._rates.get(peer.pid, 0.0) for peer in self.peers)

    @property
    def chains(self) -> int:
        """Chains under way; a stream whose client reads slowly has none any more when they have arrived."""
        return sum(item.payload.n for item in self.items if not item.future.done())

    @property
    def work(self) -> int:
        """Chain-steps left."""
        return sum(self._left.values())

    def admit(self, job: Job) -> None:
        """Raise Problem 429 when there are too many chains, or more work than can be done in the time that is allowed."""
        if self.chains + job.n > self._chains:
            detail = f"{self.chains} chains are running and at most {self._chains} may (generate_chains)"
            raise Problem(429, f"{detail}; try again later, or ask for fewer", headers={"Retry-After": str(self.retry_after())})
        if self.work and self.rate and (seconds := self._estimate(job)) > self._backlog:
            detail = (
                f"it would take about {seconds:.0f} s with {self.work} chain-steps to go, more than {self._backlog:g} s (generate_backlog)"
            )
            wait = max(1, min(60, math.ceil(seconds - self._backlog)))
            raise Problem(429, f"{detail}; try again in {wait} s, or ask for less", headers={"Retry-After": str(wait)})

    def _estimate(self, job: Job) -> float:
        """Return the seconds until a job would be done: it shares the machine with all, but waits for jobs as short as itself only."""
        ahead = sum(left for number, left in self._left.items() if self._lengths[number] <= size_class(job.work))
        return min(self.work + job.work, (1 + FAIRNESS_QUOTA) * (ahead + job.work)) / self.rate

    @property
    def longest(self) -> float:
        """Seconds that a chain waited longest for a step in the last minute."""
        while self._longest and self._longest[0][0] < time.monotonic() - 60:
            self._longest.popleft()
        return max((seconds for _, seconds in self._longest), default=0.0)

    def retry_after(self) -> int:
        """Return in about how many seconds half of what is under way will be done."""
        return max(1, min(60, math.ceil(self.work / self.rate / 2))) if self.rate else 1

    def enter(self, item: Item) -> None:
        """Give the job to the worker with the least to do, or keep it until there is one."""
        able = [peer for peer in self.peers if item.key in peer.loaded]
        if not able:
            self._parked.append(item)
            return
        peer = min(able, key=lambda peer: sum(self._left.get(number, 0) for number in peer.owes))
        number = next(self._numbers)
        peer.owes[number] = [item]
        self._left[number], self._lengths[number] = item.payload.work, size_class(item.payload.work)
        peer.send(Ask(number, item.key, item.payload))

    def leave(self, item: Item) -> None:
        """Have the worker drop the job's chains at its next step, if it still has them."""
        if item in self._parked:
            self._parked.remove(item)
        for peer in self.peers:
            for number in [number for number, owed in peer.owes.items() if item in owed]:
                del peer.owes[number]
                self._over(number)
                peer.send(Cancel(number))

    def joined(self, peer: Peer) -> None:
        """Give the new worker what waited for one."""
        parked, self._parked = self._parked, []
        for item in parked:
            self.enter(item)

    def heard(self, peer: Peer, message: Any) -> None:
        """Take in an answer, a preview or how fast chains move."""
        match message:
            case Preview(number):
                for item in peer.owes.get(number, []):
                    item.preview = message
                    item.shown.set()
            case Pace(rate, left, longest):
                self._rates[peer.pid] = rate
                self._longest.append((time.monotonic(), longest))
                self._left |= {number: work for number, work in left.items() if number in self._left}
            case Answer(number):
                self._over(number)
                super().heard(peer, message)

    def answered(self, items: list[Item], value: Any) -> None:
        """Hand out the images of a job."""
        for item in items:
            item.answer(value)

    def lost(self, peer: Peer) -> None:
        """Forget what the worker was to do."""
        super().lost(peer)
        self._rates.pop(peer.pid, None)
        for number in peer.owes:
            self._over(number)

    def _over(self, number: int) -> None:
        self._left.pop(number, None)
        self._lengths.pop(number, None)

    def seen(self, item: Item) -> None:
        """Tell the worker that the client has taken the last preview, and may be shown another."""
        for peer in self.peers:
            for number, owed in peer.owes.items():
                if item in owed:
                    peer.send(Show(number))
