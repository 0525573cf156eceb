"""How many chains of each client take the next step: equal shares, and a client that has used little of late goes first."""

import heapq
from collections.abc import Mapping

CLIENT_QUOTA = 1 / 3
"""Chain-steps of other clients for each chain-step of the clients that are behind; one that leads takes a third longer by them."""
CREDIT = 5
"""Width of a batch by which a client that was idle starts behind the others, and so goes first."""


REMEMBERED = 1000
"""Turns after which a client that had no chains in any of them is forgotten, and has its credit again."""


class ClientShares:
    """Divides turns between clients by the chain-steps that each was served, in virtual time.

    The clients that were served least lead a turn, with equally many chains each; CLIENT_QUOTA chains of the others, those served least
    first, ride along for each. Clients that have work all the time come to be level, so that all of them lead and each has an equal
    share, however many chains it has. One that comes after a pause starts CREDIT widths behind, and leads alone until it has used that.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._turn, self._last = 0, dict[str, int]()  # the last turn in which a client had chains, longest ago first
        self._now = 0.0  # what a client that has work all the time was served
        self._quota = 0.0  # the fraction of a chain left over from the last turn

    def split(self, chains: Mapping[str, int], width: int, linear: bool) -> dict[str, int]:
        """Return how many of its ``chains`` each client may move in the next turn, of ``width`` at most; clients with none are left out.

        ``linear``: the time of a turn is in proportion to its chains, so a turn is not filled with chains of those who are ahead.
        """
        self._enter(chains, width)
        if len(chains) == 1:
            shares = {client: min(n, width) for client, n in chains.items()}
        elif linear:
            shares = self._lead(chains, width)
        else:
            shares = self._fill(chains, width, {})
        short = [self._served[client] for client, n in chains.items() if shares.get(client, 0) < n]
        self._now = max(self._now, min(short, default=max(self._served[client] for client in chains)))
        return shares

    def charge(self, client: str, steps: float) -> None:
        """Count chain-steps that ``client`` was served."""
        self._served[client] += steps

    def _enter(self, chains: Mapping[str, int], width: int) -> None:
        """Let nobody be further behind than CREDIT widths or further ahead than one; forget who is gone, once that gives it no more."""
        behind, ahead = self._now - CREDIT * width, self._now + width
        self._turn += 1
        for client in chains:
            self._last.pop(client, None)
            self._last[client] = self._turn
        # the clock of the shares stands still while nobody has work all the time
        while (oldest := next(iter(self._last))) not in chains and self._last[oldest] <= self._turn - REMEMBERED:
            del self._last[oldest]
            self._served.pop(oldest, None)
        self._served = {client: min(ahead, served) for client, served in self._served.items() if served > behind or client in chains}
        for client in chains:
            self._served[client] = max(behind, self._served.get(client, behind))

    def _lead(self, chains: Mapping[str, int], width: int) -> dict[str, int]:
        """Return equally many chains for each client that is behind, and the quota for the others."""
        order = sorted(chains, key=self._served.__getitem__)
        behind = max(self._now - width, self._served[order[0]] + width)
        leaders = [client for client in order if self._served[client] <= behind]
        others = {client: chains[client] for client in order[len(leaders) :]}
        quota = min(CLIENT_QUOTA, len(others) / len(leaders))  # for each chain that leads; who is ahead never gets more than who is behind
        room = max(1, int(width / (1 + quota)))
        each = max(1, min(room // len(leaders), *(chains[client] for client in leaders)))
        shares = dict.fromkeys(leaders[:room], each)
        leading = sum(shares.values())
        riders, self._quota = divmod(self._quota + quota * leading, 1.0)
        return self._fill(others, min(int(riders), width - leading), shares)

    def _fill(self, chains: Mapping[str, int], room: int, shares: dict[str, int]) -> dict[str, int]:
        """Give ``room`` places one after the other, each to the client that was served least."""
        waiting = [(self._served[client], client) for client in chains]
        heapq.heapify(waiting)
        for _ in range(min(room, sum(chains.values()))):
            served, client = waiting[0]
            shares[client] = shares.get(client, 0) + 1
            if shares[client] < chains[client]:
                heapq.heapreplace(waiting, (served + 1, client))
            else:
                heapq.heappop(waiting)
        return shares
