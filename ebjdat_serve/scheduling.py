"""Which chains take the next Langevin step: requests join and leave a running batch, short ones overtake long ones, none starves."""

import heapq
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.engines import Engine, Floats
from ebjdat_serve.sgld import Chains

FAIR = 1.0
"""Chain-steps given to whoever waited longest, for each one given to the shortest request."""
CLASS = 4.0
"""Requests whose work differs by less than about this factor count as equally long."""
TURN = 0.02
"""Seconds that a turn should take at most: on a GPU, where a step is short, it holds several."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Policy:
    """How an engine likes its batches: ``width`` chains at most; ``linear`` where a step takes time in proportion to its chains."""

    width: int
    linear: bool

    @staticmethod
    def of(engine: Engine) -> "Policy":
        """Return small batches for a CPU, full ones for a GPU."""
        on_cpu = engine.provider == "CPUExecutionProvider" or engine.provider.endswith(" cpu")
        return Policy(8, True) if on_cpu else Policy(256, False)


def length(work: int) -> int:
    """Return how long so many chain-steps are, in powers of CLASS."""
    return int(math.log(max(1, work), CLASS))


@dataclass(eq=False)
class Request:
    """Chains that are answered together: all take ``steps`` steps."""

    engine: Engine
    chains: Chains
    steps: int
    left: int = field(init=False)  # chain-steps still to take
    length: int = field(init=False)  # how long it is, in powers of CLASS
    turn: Rows = field(init=False)  # (n,) the turn in which each chain last took a step
    moved: NDArray[np.float64] = field(init=False)  # (n,) and when, in seconds of the scheduler's clock

    def __post_init__(self) -> None:
        n = len(self.chains.label)
        self.left = n * self.steps - int(self.chains.step.sum())
        self.length = length(self.left)
        self.turn, self.moved = np.zeros(n, np.int64), np.zeros(n)

    def walking(self) -> Rows:
        """Return the rows that have steps to take, the longest waiting first."""
        if len(self.turn) == 1:
            return np.zeros(1, np.int64)  # the one row there is: a request that has arrived has left
        rows = np.flatnonzero(self.chains.step < self.steps)
        return rows if len(rows) < 2 else rows[self.turn[rows].argsort(kind="stable")]


@dataclass(frozen=True)
class Moved:
    """Rows of a request that took ``steps`` steps each in a turn; ``arrived`` are those that took their last."""

    request: Request
    rows: Rows
    steps: int
    arrived: Rows


class Scheduler:
    """Shares an engine among requests, a turn at a time.

    A turn is one batch of at most ``width`` chains moved by one step, or by several where they are short. Chains of the shortest requests
    lead it, among equally long ones those with the fewest steps left; and for each that leads FAIR ride along: those that have waited
    longest, whoever's they are. So a short request overtakes long ones in at most 1 + FAIR times the time it takes alone, and with N chains
    none waits longer for its next step than about N (1 + 1 / FAIR) / rate seconds, rate in chain-steps a second; as many times
    that as models have chains under way.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.requests: list[Request] = []
        self.longest = 0.0  # seconds that any chain waited between two steps; whoever reports it sets it back
        self._turn = 0
        self._owed = 0.0  # the part of a rider that is left over from the last turn
        self._step_seconds: dict[int, float] = {}

    def join(self, request: Request) -> None:
        """Let the chains of ``request`` take part from the next turn on."""
        # a newcomer has not waited: it may not claim what is owed to those that have
        request.turn[:] = self._turn
        request.moved[:] = self._clock()
        self.requests.append(request)

    def leave(self, request: Request) -> None:
        """Take ``request`` out; its chains take no further step."""
        self.requests.remove(request)

    def advance(self) -> list[Moved]:
        """Take one turn; return what moved. Requests whose chains all arrived have left."""
        chosen = self._choose()
        engine = chosen[0][0].engine
        batch = Chains.join([request.chains if len(request.turn) == 1 else request.chains.rows(rows) for request, rows in chosen])
        steps = 1
        if not Policy.of(engine).linear:
            most = min(int(request.steps - request.chains.step[rows].max()) for request, rows in chosen)
            steps = min(most, self._several(len(batch.label)))
        began = self._clock()
        image = engine.advance(batch, steps).image
        self._step_seconds[len(batch.label)] = (self._clock() - began) / steps
        self._turn += 1
        return list(self._scatter(chosen, image, steps))

    def _choose(self) -> list[tuple[Request, Rows]]:
        """Return the rows of the next turn by request, all of one engine; several engines take turns."""
        engines = list(dict.fromkeys(id(request.engine) for request in self.requests))
        order = [request for request in self.requests if id(request.engine) == engines[self._turn % len(engines)]]
        order.sort(key=lambda request: (request.length, request.left))
        policy = Policy.of(order[0].engine)
        walking = {request: request.walking().tolist() for request in order}
        lead: dict[Request, list[int]] = {}
        room = max(1, int(policy.width / (1 + FAIR)))
        for request in order:
            if not room or (policy.linear and request.length > order[0].length):
                break
            lead[request] = walking[request][:room]
            room -= len(lead[request])
        leading = sum(map(len, lead.values()))
        # what nobody is there to take is not saved up: it would fill a later turn with riders
        riders, self._owed = divmod(self._owed + FAIR * leading, 1.0)
        behind = (
            (int(request.turn[row]), -request.left, i, row)
            for i, request in enumerate(order)
            for row in walking[request][len(lead.get(request, ())) :]
        )
        for *_, i, row in heapq.nsmallest(min(int(riders), policy.width - leading), behind):
            lead.setdefault(order[i], []).append(row)
        return [(request, np.asarray(rows)) for request, rows in lead.items()]

    def _several(self, n: int) -> int:
        """Return how many steps of n chains fit into a turn."""
        seconds = self._step_seconds.get(n)
        return 1 if not seconds else max(1, int(TURN / seconds))

    def _scatter(self, chosen: list[tuple[Request, Rows]], image: Floats, steps: int) -> Iterator[Moved]:
        start, now = 0, self._clock()
        for request, rows in chosen:
            self.longest = max(self.longest, now - float(request.moved[rows].min()))
            chains, n = request.chains, len(rows)
            chains.image[rows] = image[start : start + n]
            chains.step[rows] += steps
            request.moved[rows], request.turn[rows] = now, self._turn
            request.left -= steps * n
            start += n
            if not request.left:
                self.requests.remove(request)
            yield Moved(request, rows, steps, rows[chains.step[rows] == request.steps])
