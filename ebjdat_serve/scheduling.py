"""Which chains take the next Langevin step: requests join and leave a running batch, short ones overtake long ones, none starves."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.engines import Engine
from ebjdat_serve.sgld import Chains

FAIR = 0.5
"""Chain-steps given to whoever waited longest, for each one given to whoever has least left: a third of the machine."""
ALIKE = 2.0
"""A request joins another's turn on a CPU, which it slows down, when it has at most so many times the work left."""
TURN = 0.02
"""Seconds that a turn should take at most: on a GPU, where a step is short, it holds several."""


@dataclass(frozen=True)
class Policy:
    """How an engine likes its batches: ``width`` chains at most; ``linear`` where a step takes time in proportion to its chains."""

    width: int
    linear: bool

    @staticmethod
    def of(engine: Engine) -> "Policy":
        """Return small batches for a CPU, full ones for a GPU."""
        on_cpu = engine.provider == "CPUExecutionProvider" or engine.provider.endswith(" cpu")
        return Policy(4, True) if on_cpu else Policy(256, False)


@dataclass(eq=False)
class Request:
    """Chains that are answered together: all take ``steps`` steps and are then ``done``."""

    engine: Engine
    chains: Chains
    steps: int
    turn: NDArray[np.int64] = field(init=False)  # (n,) when each chain last took a step, in the scheduler's count of turns

    def __post_init__(self) -> None:
        self.turn = np.zeros(len(self.chains.label), np.int64)

    @property
    def left(self) -> int:
        """Chain-steps still to take."""
        return int((self.steps - self.chains.step).sum())

    def walking(self) -> NDArray[np.int64]:
        """Return the rows that have steps to take, the longest waiting first."""
        rows = np.flatnonzero(self.chains.step < self.steps)
        return rows[np.argsort(self.turn[rows], kind="stable")]


@dataclass(frozen=True)
class Moved:
    """Rows of a request that took ``steps`` steps each in a turn; ``arrived`` are those that took their last."""

    request: Request
    rows: NDArray[np.int64]
    steps: int
    arrived: NDArray[np.int64]


class Scheduler:
    """Shares an engine among requests, a turn at a time.

    A turn is one batch of at most ``width`` chains moved by one step, or by several where they are short. It goes to the request with the
    fewest chain-steps left; but for each chain-step given so, FAIR of one is owed to the chains that have waited longest, whoever's
    they are. With N chains none waits longer than about N (1 + 1 / FAIR) / rate seconds for its next step, rate in chain-steps a second.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.requests: list[Request] = []
        self._turn = 0
        self._owed = 0.0
        self._step_seconds: dict[int, float] = {}

    def join(self, request: Request) -> None:
        """Let the chains of ``request`` take part from the next turn on."""
        # a newcomer has not waited: it may not claim the turns owed to those that have
        request.turn[:] = self._turn
        self.requests.append(request)

    def leave(self, request: Request) -> None:
        """Take ``request`` out; its chains take no further step."""
        self.requests.remove(request)

    def advance(self) -> list[Moved]:
        """Take one turn; return what moved. Requests whose chains all arrived have left."""
        chosen = self._choose()
        engine = chosen[0][0].engine
        batch = Chains.join([request.chains.rows(rows) for request, rows in chosen])
        most = min(int(request.steps - request.chains.step[rows].max()) for request, rows in chosen)
        steps = 1 if Policy.of(engine).linear else min(most, self._several(len(batch.label)))
        began = self._clock()
        moved = engine.advance(batch, steps)
        self._step_seconds[len(batch.label)] = (self._clock() - began) / steps
        self._turn += 1
        return list(self._scatter(chosen, moved, steps))

    def _choose(self) -> list[tuple[Request, NDArray[np.int64]]]:
        """Return the rows of the next turn by request, all of one engine."""
        order = sorted(self.requests, key=lambda request: request.left)
        policy = Policy.of(order[0].engine)
        if len(order) > 1:
            waited = self._longest(policy.width)
            if self._owed >= len(waited):
                self._owed -= len(waited)
                return _by_request(waited)
        chosen, room = [], policy.width
        for request in order:
            if request.engine is not order[0].engine or (policy.linear and request.left > ALIKE * order[0].left):
                continue
            rows = request.walking()[:room]
            chosen.append((request, rows))
            room -= len(rows)
            if not room:
                break
        self._owed = min(self._owed + FAIR * (policy.width - room), float(policy.width))
        return chosen

    def _longest(self, width: int) -> list[tuple[Request, int]]:
        """Return the chains that have waited longest, at most ``width`` of one engine."""
        waiting = [(int(request.turn[row]), i, int(row)) for i, request in enumerate(self.requests) for row in request.walking()]
        waiting.sort()
        engine = self.requests[waiting[0][1]].engine
        return [(self.requests[i], row) for _, i, row in waiting if self.requests[i].engine is engine][:width]

    def _several(self, n: int) -> int:
        """Return how many steps of n chains fit into a turn."""
        seconds = self._step_seconds.get(n)
        return 1 if not seconds else max(1, int(TURN / seconds))

    def _scatter(self, chosen: list[tuple[Request, NDArray[np.int64]]], moved: Chains, steps: int) -> Iterator[Moved]:
        start = 0
        for request, rows in chosen:
            part = moved.rows(slice(start, start + len(rows)))
            start += len(rows)
            request.chains.image[rows], request.chains.step[rows] = part.image, part.step
            request.turn[rows] = self._turn
            if not len(request.walking()):
                self.requests.remove(request)
            yield Moved(request, rows, steps, rows[part.step == request.steps])


def _by_request(chains: list[tuple[Request, int]]) -> list[tuple[Request, NDArray[np.int64]]]:
    rows: dict[Request, list[int]] = {}
    for request, row in chains:
        rows.setdefault(request, []).append(row)
    return [(request, np.asarray(found)) for request, found in rows.items()]
