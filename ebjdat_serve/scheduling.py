"""Continuous batching of Langevin chains: groups join and leave between steps, short ones overtake long ones, none starves."""

import heapq
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.engines import Engine, Floats
from ebjdat_serve.sgld import Chains

FAIRNESS_QUOTA = 1.0
"""Chain-steps reserved for the chains that waited longest, per chain-step given to the shortest group."""
SIZE_RATIO = 4.0
"""Ratio of the work of one size class to that of the class below."""
TURN_SECONDS = 0.02
"""Longest turn, in seconds: on a GPU, where a step is short, a turn holds several."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Policy:
    """Batching for an engine: at most ``width`` chains; ``linear`` if the time of a step is proportional to its chains."""

    width: int
    linear: bool

    @staticmethod
    def of(engine: Engine) -> "Policy":
        """Return small batches for a CPU, full ones for a GPU."""
        on_cpu = engine.provider == "CPUExecutionProvider" or engine.provider.endswith(" cpu")
        return Policy(8, True) if on_cpu else Policy(256, False)


def size_class(work: int) -> int:
    """Return the size class of ``work`` chain-steps: its logarithm to the base SIZE_RATIO, rounded down."""
    return int(math.log(max(1, work), SIZE_RATIO))


@dataclass(eq=False)
class ChainGroup:
    """The chains of one job, each of which takes ``steps`` steps."""

    engine: Engine
    chains: Chains
    steps: int
    left: int = field(init=False)  # chain-steps still to take
    size_class: int = field(init=False)
    turn: Rows = field(init=False)  # (n,) turn in which each chain last took a step
    moved: NDArray[np.float64] = field(init=False)  # (n,) time of that step, in seconds of the scheduler's clock

    def __post_init__(self) -> None:
        n = len(self.chains.label)
        self.left = n * self.steps - int(self.chains.step.sum())
        self.size_class = size_class(self.left)
        self.turn, self.moved = np.zeros(n, np.int64), np.zeros(n)

    def unfinished(self) -> Rows:
        """Return the rows that have steps left, the longest waiting first."""
        if len(self.turn) == 1:
            return np.zeros(1, np.int64)  # its only row: a finished group has left
        rows = np.flatnonzero(self.chains.step < self.steps)
        return rows if len(rows) < 2 else rows[self.turn[rows].argsort(kind="stable")]


@dataclass(frozen=True)
class Moved:
    """Rows of a group that took ``steps`` steps each in a turn; ``finished`` are those that took their last."""

    group: ChainGroup
    rows: Rows
    steps: int
    finished: Rows


class Scheduler:
    """Shares an engine among groups of chains, a turn at a time.

    A turn is one batch of at most ``width`` chains moved by one step, or by several where steps are short. Chains of the smallest size
    class lead it, those with the fewest steps left first. For each leading chain, the FAIRNESS_QUOTA chains that have waited longest are
    added, from any group. So a short group overtakes long ones in at most 1 + FAIRNESS_QUOTA times the time it takes alone, and with
    N chains none waits longer for its next step than about N (1 + 1 / FAIRNESS_QUOTA) / rate seconds, rate in chain-steps per second,
    times the number of engines in use.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.groups: list[ChainGroup] = []
        self.longest_wait = 0.0  # longest time, in seconds, that a chain waited between two steps; reset by the caller that reports it
        self._turn = 0
        self._quota = 0.0  # fraction of a chain left over from the last turn's quota
        self._step_seconds: dict[int, float] = {}

    def join(self, group: ChainGroup) -> None:
        """Add ``group`` from the next turn on."""
        # a new group has not waited: the fairness quota is for groups that have
        group.turn[:] = self._turn
        group.moved[:] = self._clock()
        self.groups.append(group)

    def leave(self, group: ChainGroup) -> None:
        """Remove ``group``: its chains take no further step."""
        self.groups.remove(group)

    def advance(self) -> list[Moved]:
        """Take one turn and return what moved; groups whose chains are all finished are removed."""
        chosen = self._choose()
        engine = chosen[0][0].engine
        batch = Chains.join([group.chains if len(group.turn) == 1 else group.chains.rows(rows) for group, rows in chosen])
        steps = 1
        if not Policy.of(engine).linear:
            most = min(int(group.steps - group.chains.step[rows].max()) for group, rows in chosen)
            steps = min(most, self._steps_per_turn(len(batch.label)))
        began = self._clock()
        image = engine.advance(batch, steps).image
        self._step_seconds[len(batch.label)] = (self._clock() - began) / steps
        self._turn += 1
        return list(self._scatter(chosen, image, steps))

    def _choose(self) -> list[tuple[ChainGroup, Rows]]:
        """Return the rows of the next turn by group, all of one engine; several engines take turns."""
        engines = list(dict.fromkeys(id(group.engine) for group in self.groups))
        order = [group for group in self.groups if id(group.engine) == engines[self._turn % len(engines)]]
        order.sort(key=lambda group: (group.size_class, group.left))
        policy = Policy.of(order[0].engine)
        unfinished = {group: group.unfinished().tolist() for group in order}
        lead: dict[ChainGroup, list[int]] = {}
        room = max(1, int(policy.width / (1 + FAIRNESS_QUOTA)))
        for group in order:
            if not room or (policy.linear and group.size_class > order[0].size_class):
                break
            lead[group] = unfinished[group][:room]
            room -= len(lead[group])
        leading = sum(map(len, lead.values()))
        # an unused quota is not saved up: it would fill a later turn with long chains
        quota, self._quota = divmod(self._quota + FAIRNESS_QUOTA * leading, 1.0)
        waiting = (
            (int(group.turn[row]), -group.left, i, row)
            for i, group in enumerate(order)
            for row in unfinished[group][len(lead.get(group, ())) :]
        )
        for *_, i, row in heapq.nsmallest(min(int(quota), policy.width - leading), waiting):
            lead.setdefault(order[i], []).append(row)
        return [(group, np.asarray(rows)) for group, rows in lead.items()]

    def _steps_per_turn(self, n: int) -> int:
        """Return the number of steps of n chains that fit into a turn."""
        seconds = self._step_seconds.get(n)
        return 1 if not seconds else max(1, int(TURN_SECONDS / seconds))

    def _scatter(self, chosen: list[tuple[ChainGroup, Rows]], image: Floats, steps: int) -> Iterator[Moved]:
        start, now = 0, self._clock()
        for group, rows in chosen:
            self.longest_wait = max(self.longest_wait, now - float(group.moved[rows].min()))
            chains, n = group.chains, len(rows)
            chains.image[rows] = image[start : start + n]
            chains.step[rows] += steps
            group.moved[rows], group.turn[rows] = now, self._turn
            group.left -= steps * n
            start += n
            if not group.left:
                self.groups.remove(group)
            yield Moved(group, rows, steps, rows[chains.step[rows] == group.steps])
