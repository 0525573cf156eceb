"""Wrong keys: answered later the more of them come from one client, and logged without the key, in a bounded number of lines."""

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

log = logging.getLogger("ebjdat_serve")
FREE = 5
"""Wrong keys of one client that are answered at once."""
FORGIVEN = 10.0
"""Seconds after which one of them is forgotten."""
FIRST_DELAY, LONGEST_DELAY = 0.1, 3.2
"""Seconds by which the answer after the free ones is held back, twice as long each time, up to so many."""
HELD, HELD_PER_CLIENT = 64, 4
"""Answers held back at a time; others are refused at once with 429, so that they hold no connection."""
CLIENTS = 4096
"""Clients remembered; who has not failed for longest is forgotten first."""
LOG_SECONDS = 60.0
"""Seconds between two lines on one client."""
LINES, LINE_SECONDS = 10, 6.0
"""Lines on all clients together: so many at once, then one in so many seconds."""


@dataclass
class _Record:
    level: float = 0.0  # failures not yet forgiven
    at: float = 0.0  # when that was
    held: int = 0
    unsaid: int = 0  # failures since the last line
    said: float = float("-inf")


class AuthFailures:
    """Slows clients that send wrong keys. Whoever sends a right one is never asked, so never slowed, at whatever address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._held = 0
        self._lines, self._lines_at, self._unnamed = float(LINES), clock(), 0

    def __len__(self) -> int:
        return len(self._records)

    def failed(self, client: str) -> float:
        """Count and log a wrong key from ``client``; return the seconds by which to hold back its answer."""
        now = self._clock()
        record = self._records.setdefault(client, _Record(at=now))
        self._records.move_to_end(client)
        if len(self._records) > CLIENTS:
            self._records.popitem(last=False)
        record.level = max(0.0, record.level - (now - record.at) / FORGIVEN) + 1
        record.at = now
        self._log(client, record, now)
        excess = record.level - FREE
        return 0.0 if excess <= 0 else min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(excess - 1, 10))

    @contextlib.contextmanager
    def holding(self, client: str) -> Iterator[bool]:
        """Give whether an answer to ``client`` may be held back while the block runs; otherwise it is refused at once."""
        record = self._records.get(client) or _Record()
        if self._held >= HELD or record.held >= HELD_PER_CLIENT:
            yield False
            return
        self._held += 1
        record.held += 1
        try:
            yield True
        finally:
            self._held -= 1
            record.held -= 1

    def _log(self, client: str, record: _Record, now: float) -> None:
        record.unsaid += 1
        if now - record.said < LOG_SECONDS:
            return
        self._lines = min(float(LINES), self._lines + (now - self._lines_at) / LINE_SECONDS)
        self._lines_at = now
        if self._lines < 1:
            self._unnamed += 1
            return
        self._lines -= 1
        more = f"; {self._unnamed} more from clients that are not named" if self._unnamed else ""
        log.warning("%d wrong API key%s from %s%s", record.unsaid, "" if record.unsaid == 1 else "s", client, more)
        record.unsaid, record.said, self._unnamed = 0, now, 0
