"""Continuous batching of Langevin chains: clients share the engine, short groups overtake long ones, none starves."""

import heapq
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.batch import Batch
from ebjdat_serve.client_shares import ClientShares
from ebjdat_serve.engines import Engine, on_cpu
from ebjdat_serve.sgld import Chains

FAIRNESS_QUOTA = 1.0
"""Chain-steps reserved for the chains that waited longest, per chain-step given to the shortest group."""
SIZE_RATIO = 4.0
"""Ratio of the work of one size class to that of the class below."""
TURN_SECONDS = 0.02
"""Longest turn, in seconds: on a GPU, where a step is short, a turn holds several."""

Rows = NDArray[np.int64]
Rowwise = TypeVar("Rowwise", bound=Batch)


@dataclass(frozen=True)
class Policy:
    """Batching for an engine: at most ``width`` chains; ``linear`` if the time of a step is proportional to its chains."""

    width: int
    linear: bool

    @staticmethod
    def of(engine: Engine) -> "Policy":
        """Return small batches for a CPU, full ones for a GPU."""
        return Policy(8, True) if on_cpu(engine) else Policy(256, False)


def size_class(work: int) -> int:
    """Return the size class of ``work`` chain-steps: its logarithm to the base SIZE_RATIO, rounded down."""
    return int(math.log(max(1, work), SIZE_RATIO))


@dataclass(eq=False)
class Group(ABC, Generic[Rowwise]):
    """The rows of one job, each of which takes ``steps`` steps at most. Groups of one type are moved together, by its ``advance``."""

    engine: Engine
    chains: Rowwise
    steps: int
    client: str = ""  # whose share of the engine they use
    left: int = field(init=False)  # chain-steps still to take
    size_class: int = field(init=False)
    turn: Rows = field(init=False)  # (n,) turn in which each chain last took a step
    moved: NDArray[np.float64] = field(init=False)  # (n,) time of that step, in seconds of the scheduler's clock

    cost: ClassVar[int] = 1
    """Chain-steps that a step of one row counts for."""

    @staticmethod
    @abstractmethod
    def advance(engine: Engine, batch: Rowwise, steps: int) -> Rowwise:
        """Return ``batch`` after ``steps`` steps of each row; one that needs no more of them has taken all its steps then."""

    def __post_init__(self) -> None:
        n = len(self.chains)
        self.left = self.cost * (n * self.steps - int(self.chains.step.sum()))
        self.size_class = size_class(self.left)
        self.turn, self.moved = np.zeros(n, np.int64), np.zeros(n)

    def unfinished(self) -> Rows:
        """Return the rows that have steps left, the longest waiting first."""
        if len(self.turn) == 1:
            return np.zeros(1, np.int64)  # its only row: a finished group has left
        rows = np.flatnonzero(self.chains.step < self.steps)
        return rows if len(rows) < 2 else rows[self.turn[rows].argsort(kind="stable")]


class ChainGroup(Group[Chains]):
    """The Langevin chains of one job."""

    @staticmethod
    def advance(engine: Engine, batch: Chains, steps: int) -> Chains:
        """Return ``batch`` after ``steps`` Langevin steps."""
        return engine.advance(batch, steps)


RowsLeft = dict[Group[Any], list[int]]
"""Unfinished rows by group, those that waited longest first."""
Shape = tuple[tuple[type[Group[Any]], int], ...]
"""How many rows of each kind of group a turn moves."""


def leaders(groups: list[Group[Any]], unfinished: RowsLeft, n: int) -> RowsLeft:
    """Return ``n`` rows, of the first groups first, or all if there are fewer."""
    lead: RowsLeft = {}
    for group in groups:
        if not n:
            break
        lead[group] = unfinished[group][:n]
        n -= len(lead[group])
    return lead


def with_longest_waiting(lead: RowsLeft, groups: list[Group[Any]], unfinished: RowsLeft, n: int) -> RowsLeft:
    """Return ``lead`` with the ``n`` rows beside those that waited longest, of whichever group."""
    waiting = (
        (int(group.turn[row]), -group.left, i, row)
        for i, group in enumerate(groups)
        for row in unfinished[group][len(lead.get(group, ())) :]
    )
    for *_, i, row in heapq.nsmallest(n, waiting):
        lead.setdefault(groups[i], []).append(row)
    return lead


@dataclass(frozen=True)
class Moved:
    """Rows of a group that took ``steps`` steps each in a turn; ``finished`` are those that took their last."""

    group: Group[Any]
    rows: Rows
    steps: int
    finished: Rows

    @property
    def work(self) -> int:
        """Chain-steps that the turn was worth."""
        return self.group.cost * self.steps * len(self.rows)


class Scheduler:
    """Shares an engine among groups of chains, a turn at a time.

    A turn is at most ``width`` chains moved by one step, or by several where steps are short, in one batch for each type of group. What
    is said of chains here holds for the rows of any group. ClientShares divides a turn between clients.

    Of the chains of one client, those of the smallest size class lead, those with the fewest steps left first. For each leading chain, the
    FAIRNESS_QUOTA chains that have waited longest are added, from any of the client's groups. So with one client, a short group overtakes
    long ones in at most 1 + FAIRNESS_QUOTA times the time it takes alone, and with N chains none waits longer for its next step than about
    N (1 + 1 / FAIRNESS_QUOTA) / rate seconds, rate in chain-steps per second, times the number of engines in use.

    With C clients that always have work, that is C times as long, N being the chains of the client itself; where others return from pauses
    all the time and so lead, 1 + 1 / CLIENT_QUOTA times that.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.groups: list[Group[Any]] = []
        self.longest_wait = 0.0  # longest time, in seconds, that a chain waited between two steps; reset by the caller that reports it
        self._turn = 0
        self._shares = ClientShares()
        self._quota: dict[str, float] = {}  # by client, the fraction of a chain left over from the last turn's quota
        self._step_seconds: dict[Shape, float] = {}

    def join(self, group: Group[Any]) -> None:
        """Add ``group`` from the next turn on."""
        # a new group has not waited: the fairness quota is for groups that have
        group.turn[:] = self._turn
        group.moved[:] = self._clock()
        self.groups.append(group)

    def leave(self, group: Group[Any]) -> None:
        """Remove ``group``: its chains take no further step."""
        self.groups.remove(group)

    def advance(self) -> list[Moved]:
        """Take one turn and return what moved; groups whose chains are all finished are removed."""
        chosen = self._choose()
        kinds: dict[type[Group[Any]], list[tuple[Group[Any], Rows]]] = {}
        for group, rows in chosen:
            kinds.setdefault(type(group), []).append((group, rows))
        shape = tuple((kind, sum(len(rows) for _, rows in part)) for kind, part in kinds.items())
        steps = 1
        if not Policy.of(chosen[0][0].engine).linear:
            most = min(int(group.steps - group.chains.step[rows].max()) for group, rows in chosen)
            steps = min(most, self._steps_per_turn(shape))
        began = self._clock()
        moved = [self._advance(kind, part, steps) for kind, part in kinds.items()]
        self._step_seconds[shape] = (self._clock() - began) / steps
        self._turn += 1
        return [one for part, batch in zip(kinds.values(), moved, strict=True) for one in self._scatter(part, batch, steps)]

    def _advance(self, kind: type[Group[Any]], chosen: list[tuple[Group[Any], Rows]], steps: int) -> Batch:
        """Return the rows of groups of one kind, in one batch, after ``steps`` steps."""
        parts = [group.chains if len(group.turn) == 1 else group.chains.rows(rows) for group, rows in chosen]
        moved: Batch = kind.advance(chosen[0][0].engine, type(parts[0]).join(parts), steps)
        return moved

    def _choose(self) -> list[tuple[Group[Any], Rows]]:
        """Return the rows of the next turn by group, all of one engine; several engines take turns."""
        engines = list(dict.fromkeys(id(group.engine) for group in self.groups))
        order = [group for group in self.groups if id(group.engine) == engines[self._turn % len(engines)]]
        self._quota = {client: self._quota[client] for client in {group.client for group in self.groups} if client in self._quota}
        policy = Policy.of(order[0].engine)
        clients: dict[str, list[Group[Any]]] = {}
        for group in sorted(order, key=lambda group: (group.size_class, group.left)):
            clients.setdefault(group.client, []).append(group)
        unfinished = {group: group.unfinished().tolist() for group in order}
        chains = {client: sum(len(unfinished[group]) for group in groups) for client, groups in clients.items()}
        shares = self._shares.split(chains, policy.width, policy.linear)
        if len(clients) == 1:
            chosen = self._alone(clients.popitem()[1], unfinished, policy)
        else:
            chosen = {}
            for client, n in shares.items():
                chosen |= self._share(clients[client], unfinished, n)
        return [(group, np.asarray(rows)) for group, rows in chosen.items()]

    def _alone(self, groups: list[Group[Any]], unfinished: RowsLeft, policy: Policy) -> RowsLeft:
        """Return the rows of the next turn where all groups are one client's; ``groups`` are sorted, the shortest first."""
        shortest = [group for group in groups if not policy.linear or group.size_class == groups[0].size_class]
        lead = leaders(shortest, unfinished, max(1, int(policy.width / (1 + FAIRNESS_QUOTA))))
        leading = sum(map(len, lead.values()))
        # an unused quota is not saved up: it would fill a later turn with long chains
        quota = self._whole_quota(groups[0].client, FAIRNESS_QUOTA * leading)
        return with_longest_waiting(lead, groups, unfinished, min(quota, policy.width - leading))

    def _share(self, groups: list[Group[Any]], unfinished: RowsLeft, n: int) -> RowsLeft:
        """Return ``n`` rows of one client among several."""
        quota = self._whole_quota(groups[0].client, n * FAIRNESS_QUOTA / (1 + FAIRNESS_QUOTA))
        lead = leaders(groups, unfinished, n - quota)
        return with_longest_waiting(lead, groups, unfinished, n - sum(map(len, lead.values())))

    def _whole_quota(self, client: str, more: float) -> int:
        """Return the whole chains of a client's quota with ``more``, and keep the fraction for its next turn."""
        whole, self._quota[client] = divmod(self._quota.get(client, 0.0) + more, 1.0)
        return int(whole)

    def _steps_per_turn(self, shape: Shape) -> int:
        """Return the number of steps of so many rows of each kind that fit into a turn."""
        seconds = self._step_seconds.get(shape)
        return 1 if not seconds else max(1, int(TURN_SECONDS / seconds))

    def _scatter(self, chosen: list[tuple[Group[Any], Rows]], batch: Batch, steps: int) -> Iterator[Moved]:
        start, now = 0, self._clock()
        for group, rows in chosen:
            self.longest_wait = max(self.longest_wait, now - float(group.moved[rows].min()))
            chains, n = group.chains, len(rows)
            before = int(chains.step[rows].sum())
            chains.put(rows, batch.rows(slice(start, start + n)))
            group.moved[rows], group.turn[rows] = now, self._turn
            group.left -= group.cost * (int(chains.step[rows].sum()) - before)
            start += n
            if not group.left:
                self.groups.remove(group)
            moved = Moved(group, rows, steps, rows[chains.step[rows] == group.steps])
            self._shares.charge(group.client, moved.work)
            yield moved
