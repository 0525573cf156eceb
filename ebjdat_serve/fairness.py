"""Sharing between clients: a queue that serves them in turn by cost, what one may hold of a buffer, and when its work will be done.

Start-time fair queueing (Goyal, Vin, Cheng 1996) for queues, dynamic thresholds (Choudhury, Hahne 1998) for buffers.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class _Backlog(Generic[Item]):
    """What waits of one client, by number, and the virtual time at which its next item starts."""

    start: float
    items: OrderedDict[int, tuple[Item, float]] = field(default_factory=OrderedDict)


class FairQueue(Generic[Item]):
    """A queue that serves clients in turn: over any time in which two wait, what they are served differs by two items' costs at most.

    How many items a client has waiting makes no difference, and within a client the first to come is the first served. A client that
    had nothing waiting starts level with those who wait: it is owed nothing for that time, and has what they have waiting before it but
    for about one item each. Operations take O(log clients); memory is in proportion to items.

    Virtual time is that of weighted fair queueing, cost / clients: with the start of the item last served, as Goyal's has it, an endless
    row of clients that send one item each would keep out those that have had one.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Backlog[Item]] = {}
        self._order: list[tuple[float, int, str]] = []  # a heap of (start, number of the first item, client), stale ones among them
        self._owner: dict[int, str] = {}
        self._finished: dict[str, float] = {}  # clients with nothing waiting that are ahead of the virtual time
        self._now = 0.0  # virtual time: what each of those that wait has been served
        self._number = 0

    def __len__(self) -> int:
        return len(self._owner)

    def push(self, client: str, item: Item, cost: float = 1.0) -> int:
        """Add an item of ``cost`` above 0, in any unit; return the number by which it can be removed."""
        if not 0 < cost < math.inf:
            raise ValueError(f"a cost must be above 0 and finite, not {cost}")
        self._number += 1
        backlog = self._clients.get(client)
        if backlog is None:
            backlog = self._clients[client] = _Backlog(max(self._now, self._finished.pop(client, 0.0)))
            heapq.heappush(self._order, (backlog.start, self._number, client))
        backlog.items[self._number] = (item, cost)
        self._owner[self._number] = client
        return self._number

    def peek(self) -> Item | None:
        """Return the item that pop would, None if nothing waits."""
        client = self._first()
        return None if client is None else next(iter(self._clients[client].items.values()))[0]

    def pop(self) -> Item:
        """Return the next item, and charge its client; raise IndexError if nothing waits."""
        client = self._first()
        if client is None:
            raise IndexError("nothing waits")
        heapq.heappop(self._order)
        backlog = self._clients[client]
        number, (item, cost) = backlog.items.popitem(last=False)
        del self._owner[number]
        self._now = max(backlog.start, self._now + cost / len(self._clients))
        backlog.start += cost
        self._again(client, backlog)
        return item

    def remove(self, number: int) -> bool:
        """Take back an item that has not been served, free of charge; return whether it was still waiting."""
        client = self._owner.pop(number, None)
        if client is None:
            return False
        backlog = self._clients[client]
        first = next(iter(backlog.items)) == number
        del backlog.items[number]
        if first:  # its place in the order is stale now
            self._again(client, backlog)
        return True

    def charge(self, client: str, cost: float) -> None:
        """Correct what ``client`` was charged by ``cost``, which may be negative: a decoder knows its cost when it is done."""
        backlog = self._clients.get(client)
        if backlog is not None:
            backlog.start += max(cost, min(0.0, self._now - backlog.start))  # not below level
            self._again(client, backlog)
        elif self._owner:
            self._finished[client] = max(self._now, self._finished.get(client, self._now) + cost)

    def _first(self) -> str | None:
        """Return the client whose turn it is, and drop stale places before it."""
        while self._order:
            start, number, client = self._order[0]
            backlog = self._clients.get(client)
            if backlog is not None and backlog.start == start and next(iter(backlog.items)) == number:
                return client
            heapq.heappop(self._order)
        return None

    def _again(self, client: str, backlog: _Backlog[Item]) -> None:
        """Give a client a new place in the order, or let it go until it has something waiting again."""
        if backlog.items:
            heapq.heappush(self._order, (backlog.start, next(iter(backlog.items)), client))
        else:
            del self._clients[client]
            self._finished[client] = backlog.start
        if not self._owner:
            self._finished.clear()  # nobody waits, so nobody is ahead of anybody
            self._order.clear()
            self._now = 0.0
        elif len(self._finished) > 2 * len(self._clients) + 16:
            self._finished = {name: time for name, time in self._finished.items() if time > self._now}
        if len(self._order) > 4 * len(self._clients) + 16:
            self._order = [(each.start, next(iter(each.items)), name) for name, each in self._clients.items()]
            heapq.heapify(self._order)


def may_hold(held: Mapping[str, int], client: str, n: int, size: int) -> bool:
    """Return whether ``client`` may have ``n`` more of a buffer of ``size``, of which clients have ``held``.

    What it has may not exceed what is then left free: one client takes half of the buffer at most, each of k as many again a (k + 1)-th,
    and there is always a place for one who has nothing.
    """
    free = size - sum(held.values()) - n
    return held.get(client, 0) + n <= free or (free >= 0 and not held.get(client, 0) and n == 1)


def work_until_done(left: Mapping[str, int], client: str, work: int) -> int:
    """Return the work until ``work`` more of ``client`` is done where clients with ``left`` each to do are served equally.

    By then no other has been served more than ``client``, nor more than it has.
    """
    own = left.get(client, 0) + work
    return own + sum(min(others, own) for name, others in left.items() if name != client)
