"""One kind of worker as the HTTP process sees it: requests wait here, bounded, with a deadline, and cancelled with their client."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import Request

from ebjdat_serve.server.answer.problems import Problem
from ebjdat_serve.server.ipc import Answer, Ask, Loaded, Preview, Verdicts, pack

log = logging.getLogger("ebjdat_serve")
POLL = 0.1
"""Seconds between looks at whether clients are still there."""
DEPTH = 2
"""Batches under way in one worker: it finds the next when it has finished one."""


@dataclass(eq=False)
class Item:
    """A request that waits for its answer; ``key`` is the bundle it was read for."""

    key: str
    payload: Any
    request: Request
    late: float
    future: "asyncio.Future[Any]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float = field(default_factory=time.monotonic)
    preview: "Preview | None" = None  # the newest
    shown: asyncio.Event = field(default_factory=asyncio.Event)  # set when there is something to show, or it is over

    def answer(self, value: Any) -> None:
        """End the wait with a value, unless it has ended."""
        if not self.future.done():
            self.future.set_result(value)
        self.shown.set()

    def fail(self, problem: Problem) -> None:
        """End the wait with an error, unless it has ended."""
        if not self.future.done():
            self.future.set_exception(problem)
        self.shown.set()


@dataclass(eq=False)
class Peer:
    """A worker at the other end of a wire: the bundles it has open, and the items it owes, by the number of the message."""

    pid: int
    writer: asyncio.StreamWriter
    loaded: dict[str, Loaded] = field(default_factory=dict)
    owes: dict[int, list[Item]] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)

    def send(self, message: object) -> None:
        """Send a message; a worker that has gone is found out by its reader."""
        if not self.writer.is_closing():
            self.writer.write(pack(message))


class Lane(ABC):
    """What both lanes share: places, deadlines, clients that leave, workers that die or hang."""

    def __init__(self, name: str, *, workers: int, deadline: float, worker_timeout: float) -> None:
        self.name, self.workers, self.deadline, self.worker_timeout = name, workers, deadline, worker_timeout
        self.peers: list[Peer] = []
        self.items: set[Item] = set()
        self.in_flight = 0
        self.uses: Counter[str] = Counter()  # requests that read, wait or are worded for a bundle
        self.closed = ""
        self._numbers = itertools.count(1)

    def ready(self, key: str) -> bool:
        """Return whether every worker has the bundle open."""
        return sum(key in peer.loaded for peer in self.peers) >= self.workers

    def check_room(self, limit: int, limit_name: str) -> None:
        """Raise Problem 503 when there is no place."""
        if self.in_flight >= limit:
            detail = f"{limit} requests are already waiting ({limit_name}); try again in a second"
            raise Problem(503, detail, headers={"Retry-After": "1"})

    @contextlib.contextmanager
    def place(self, limit: int, limit_name: str, key: str) -> Iterator[float]:
        """Hold one of ``limit`` places, from the body's being there to the answer, and the bundle ``key``; give the time of the deadline.

        Raises Problem 503 when the lane is full.
        """
        self.check_room(limit, limit_name)
        self.in_flight += 1
        self.uses[key] += 1
        try:
            yield time.monotonic() + self.deadline
        finally:
            self.in_flight -= 1
            self.uses[key] -= 1

    @contextlib.contextmanager
    def entered(self, item: Item) -> Iterator[None]:
        """Take ``item`` in until the block ends: it fails at its deadline, and is taken back should nobody wait any more."""
        if self.closed:
            raise Problem(503, self.closed, headers={"Retry-After": "5"})
        late = Problem(
            504, f"no answer within {self.deadline:g} s; try again, or ask for less", headers={"Retry-After": str(self.retry_after())}
        )
        timer = asyncio.get_running_loop().call_later(max(0.0, item.late - time.monotonic()), item.fail, late)
        self.items.add(item)
        item.future.add_done_callback(lambda _: self.leave(item))  # a stream that nobody reads on is over all the same
        try:
            self.enter(item)
            yield
        finally:
            timer.cancel()
            self.items.discard(item)
            if not item.future.cancel() and not item.future.cancelled():
                item.future.exception()  # it has been seen, whoever waited

    async def submit(self, key: str, payload: Any, request: Request, late: float) -> Any:
        """Return the worker's answer to ``payload``.

        Raises Problem: 504 at ``late``, 499 when the client has gone, 503 when the worker died on it.
        """
        item = Item(key, payload, request, late)
        with self.entered(item):
            return await item.future

    @abstractmethod
    def enter(self, item: Item) -> None:
        """Give a new item to a worker, or keep it until one has time."""

    @abstractmethod
    def leave(self, item: Item) -> None:
        """Take back what can be taken back of an item that is over; it may have been answered."""

    def retry_after(self) -> int:
        """Return in how many seconds it is worth trying again."""
        return 1

    @abstractmethod
    def joined(self, peer: Peer) -> None:
        """Start to use a worker that has just opened a bundle."""

    def heard(self, peer: Peer, message: Any) -> None:
        """Take in a worker's message."""
        if isinstance(message, Answer):
            self.answered(peer.owes.pop(message.number, []), message.value)

    @abstractmethod
    def answered(self, items: list[Item], value: Any) -> None:
        """Hand out the answer to the items of one message."""

    def lost(self, peer: Peer) -> None:
        """Tell those whose requests the worker had that it died; those it had not got wait for the next."""
        self.peers.remove(peer)
        for item in itertools.chain(*peer.owes.values()):
            item.fail(Problem(503, "the worker died on this request and is starting again; try again", headers={"Retry-After": "3"}))

    def close(self, why: str) -> None:
        """Answer everyone who waits with 503, and everyone to come."""
        self.closed = why
        for item in list(self.items):
            item.fail(Problem(503, why, headers={"Retry-After": "5"}))

    async def watch(self) -> None:
        """Look after clients that leave and workers that hang, for ever."""
        while True:
            await asyncio.sleep(POLL if self.items else 5 * POLL)
            now = time.monotonic()
            for item in list(self.items):
                if now - item.since > POLL and await item.request.is_disconnected():
                    item.fail(Problem(499, "the client closed the connection"))
            for peer in self.peers:
                if not peer.owes:
                    peer.heard = now
                elif (silent := now - peer.heard) > self.worker_timeout:
                    log.error("the %s worker %d has not said a word for %.0f s: killed, another will start", self.name, peer.pid, silent)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(peer.pid, signal.SIGKILL)
                    peer.heard = now


class ClassifyLane(Lane):
    """Whoever waits when a worker has time shares one forward."""

    def __init__(self, *, workers: int, deadline: float, worker_timeout: float, max_batch: int) -> None:
        super().__init__("classify", workers=workers, deadline=deadline, worker_timeout=worker_timeout)
        self._waiting: deque[Item] = deque()
        self._max_batch = max_batch
        self._pumping = False

    def enter(self, item: Item) -> None:
        """Wait for a worker, at least until the event loop has read what else has come."""
        self._waiting.append(item)
        self._pump_soon()

    def leave(self, item: Item) -> None:
        """Forget the item; a batch under way is computed to its end, some milliseconds."""
        if item in self._waiting:
            self._waiting.remove(item)
            self._pump_soon()

    def joined(self, peer: Peer) -> None:
        """Give the new worker what waits."""
        self._pump_soon()

    def answered(self, items: list[Item], value: Verdicts) -> None:
        """Cut the batch's answer into its items'."""
        start = 0
        for item in items:
            item.answer(value.rows(slice(start, start := start + len(item.payload))))
        self._pump_soon()

    def lost(self, peer: Peer) -> None:
        """Go on with the other workers."""
        super().lost(peer)
        self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        for key in dict.fromkeys(item.key for item in self._waiting):  # a bundle that no worker has open keeps nobody else waiting
            while waiting := [item for item in self._waiting if item.key == key]:
                able = [peer for peer in self.peers if key in peer.loaded and len(peer.owes) < DEPTH]
                if not able:
                    break
                peer = min(able, key=lambda peer: len(peer.owes))
                number, batch = next(self._numbers), self._batch(waiting)
                peer.owes[number] = batch
                peer.send(Ask(number, key, np.concatenate([item.payload for item in batch]) if len(batch) > 1 else batch[0].payload))

    def _batch(self, waiting: list[Item]) -> list[Item]:
        """Take as many items as one batch holds, at least one."""
        size, n = len(waiting[0].payload), 1
        while n < len(waiting) and size + len(waiting[n].payload) <= self._max_batch:
            size, n = size + len(waiting[n].payload), n + 1
        taken = set(map(id, waiting[:n]))
        self._waiting = deque(item for item in self._waiting if id(item) not in taken)
        return waiting[:n]
