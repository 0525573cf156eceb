"""What one client may ask for: requests per second, and requests, unfinished bodies and chains at a time."""

import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.settings import Settings

Counted = Literal["requests", "bodies", "chains"]
OPTIONS = {name: f"serve --client-{name}" for name in ("rate", "requests", "bodies", "chains")}
CLIENTS = 10_000
"""Clients remembered beyond those that have something under way."""


@dataclass(frozen=True)
class ClientLimits:
    """Limits of one client, None for none; ``own`` names those that its key sets."""

    rate: float | None = None  # requests per second
    burst: int | None = None  # requests at once after a pause; None: those of two seconds
    requests: int | None = None  # under way, and so the next two
    bodies: int | None = None  # being received
    chains: int | None = None
    own: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("rate", "burst", "requests", "bodies", "chains"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, not {value}")

    def of_key(self, *, rate: float | None, burst: int | None, concurrency: int | None) -> "ClientLimits":
        """Return these limits with those that a key sets."""
        changes: dict[str, float | int | None] = {}
        if rate is not None:
            changes |= {"rate": rate, "burst": burst}
        elif burst is not None:
            changes["burst"] = burst
        if concurrency is not None:
            changes["requests"] = concurrency
        return replace(self, **changes, own=frozenset(changes)) if changes else self  # type: ignore[arg-type]

    @property
    def on_requests(self) -> bool:
        """Whether requests or their bodies are limited."""
        return not (self.rate is None and self.requests is None and self.bodies is None)

    @property
    def tolerance(self) -> float:
        """Seconds by which a request may be ahead of its turn: those of a burst, less the request itself."""
        if self.rate is None:
            return 0.0
        burst = max(1, math.ceil(2 * self.rate)) if self.burst is None else self.burst
        return (burst - 1) / self.rate


BEYOND_LOOPBACK = ClientLimits(rate=50.0, requests=32, bodies=16, chains=64)
"""The limits beyond loopback: a client may take all the server has for a second or two, and one drawing of the largest size."""


def limits_of(settings: Settings) -> ClientLimits:
    """Return the limits of a client whose key sets none; unless they are set, none where only this machine's programs are clients."""
    default, s = BEYOND_LOOPBACK if settings.exposed else ClientLimits(), settings
    return ClientLimits(
        rate=default.rate if s.client_rate is None else s.client_rate or None,
        requests=default.requests if s.client_requests is None else s.client_requests or None,
        bodies=default.bodies if s.client_bodies is None else s.client_bodies or None,
        chains=default.chains and max(default.chains, s.max_samples) if s.client_chains is None else s.client_chains or None,
    )


@dataclass
class _Client:
    due: float = 0.0  # when the next request would be due at an even rate: ahead of now by what was taken at once (GCRA)
    under_way: dict[Counted, int] = field(default_factory=dict)


class ClientCounts:
    """Counts what clients do, and refuses with 429 what is beyond their limits.

    A client is forgotten when it has nothing under way and could take its whole burst again, so nothing is lost by it. Beyond CLIENTS,
    those that were heard of least recently are forgotten before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._clients: OrderedDict[str, _Client] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clients)

    def request(self, client: str, limits: ClientLimits) -> None:
        """Count a request; raise Problem 429 when they come faster than ``limits`` allow. A refused one does not count."""
        if limits.rate is None:
            return
        now = self._clock()
        state = self._state(client, now)
        due = max(state.due, now)
        early = due - now - limits.tolerance
        if early > 1e-9:
            option = _option("rate", limits)
            detail = f"{client} sends more than {limits.rate:g} requests per second, and may not ({option}); try again in {early:.1f} s"
            raise _refusal(detail, early)
        state.due = due + 1 / limits.rate

    @contextlib.contextmanager
    def held(self, client: str, what: Counted, limits: ClientLimits, n: int = 1) -> Iterator[None]:
        """Count ``n`` of ``what`` until the block ends; raise Problem 429 when they are more than ``limits`` allow."""
        state, most = self._state(client, self._clock()), getattr(limits, what)
        under_way = state.under_way.get(what, 0)
        if most is not None and under_way + n > most:
            if n > most:
                raise Problem(422, f"{client} may have {most} {what} at a time, and asks for {n} at once ({_option(what, limits)})")
            asked, less = (f" and asks for {n} more", ", or ask for fewer") if n > 1 else ("", "")
            detail = (
                f"{client} has {under_way} {what} under way{asked}, and may have {most} ({_option(what, limits)}); try again later{less}"
            )
            raise _refusal(detail, 1.0)
        state.under_way[what] = under_way + n
        try:
            yield
        finally:
            if left := state.under_way[what] - n:
                state.under_way[what] = left
            else:
                del state.under_way[what]

    def _state(self, client: str, now: float) -> _Client:
        if client in self._clients:
            self._clients.move_to_end(client)
            return self._clients[client]
        for _ in range(2):  # one comes and up to two go, so those that may go do not pile up
            self._forget_oldest(now)
        return self._clients.setdefault(client, _Client())

    def _forget_oldest(self, now: float) -> None:
        if not self._clients:
            return
        oldest, state = next(iter(self._clients.items()))
        if state.under_way:
            self._clients.move_to_end(oldest)
        elif state.due <= now or len(self._clients) >= CLIENTS:
            del self._clients[oldest]


def _option(name: str, limits: ClientLimits) -> str:
    return f"{'rate' if name == 'rate' else 'concurrency'} of its key" if name in limits.own else OPTIONS[name]


def _refusal(detail: str, seconds: float) -> Problem:
    return Problem(429, detail, headers={"Retry-After": str(max(1, min(60, math.ceil(seconds))))})
