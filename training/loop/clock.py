"""Time limits, and durations as text."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """The deadline of training; Ctrl-C and SIGTERM end it after the current step."""

    def __init__(self, minutes: float = math.inf) -> None:
        self.deadline, self.interrupted = time.monotonic() + 60 * minutes, False
        self.stage_end = self.deadline

    def allot(self, share: float) -> None:
        """Limit the current stage to a share of the time left."""
        now = time.monotonic()
        self.stage_end = now + share * (self.deadline - now)

    def interrupt(self, *_: object) -> None:
        """Handle a signal: end after the current step."""
        self.interrupted = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM within the block; the usual handlers are restored at its end."""
        here = threading.current_thread() is threading.main_thread()
        usual = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)} if here else {}
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def over(self) -> bool:
        """Return whether to stop now."""
        return self.interrupted or time.monotonic() >= self.stage_end


def duration(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}" if minutes >= 60 else f"{minutes}:{second:02}"
