"""When training must end."""

import math
import signal
import threading
import time
from typing import Any


class Clock:
    """When training must end: at its deadline, or as soon as the step is done after Ctrl-C or SIGTERM."""

    def __init__(self, minutes: float = math.inf) -> None:
        self.deadline, self.interrupted = time.monotonic() + 60 * minutes, False
        self.stage_end = self.deadline
        self.usual: dict[signal.Signals, Any] = {}

    def allot(self, share: float) -> None:
        """Give the stage at hand a share of the time that is left, so that those after it get theirs."""
        now = time.monotonic()
        self.stage_end = now + share * (self.deadline - now)

    def interrupt(self, *_: object) -> None:
        """Take note of a signal."""
        self.interrupted = True

    def listen(self) -> None:
        """Let Ctrl-C and SIGTERM end training after the step at hand; outside training they act as usual."""
        if threading.current_thread() is threading.main_thread():
            self.usual = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}

    def deafen(self) -> None:
        """Give the signals back."""
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        self.usual = {}

    def over(self) -> bool:
        """Return whether to stop now."""
        return self.interrupted or time.monotonic() >= self.stage_end
