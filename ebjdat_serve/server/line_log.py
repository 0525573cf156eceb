"""Lines written by a thread of their own: a disk or a reader that stalls never keeps the event loop."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from ebjdat_serve.errors import EbjdatError, cause

log = logging.getLogger("ebjdat_serve")
WAITING = 20_000
"""Lines that wait at most; what comes then is lost, and counted."""
GATHER_SECONDS = 0.05
"""Time in which lines gather before they are written: a thread that wakes for each takes the interpreter from the event loop each time."""


class LineLog:
    """Gives lines to ``write`` in a thread; ``lost`` counts those that it could not take."""

    def __init__(self, write: Callable[[str], None], name: str) -> None:
        self._write, self._name = write, name
        self._lines: deque[str] = deque()
        self._come, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = 0

    def put(self, line: str) -> None:
        """Have a line written."""
        if self._thread is None:  # not before the HTTP process was forked
            self._thread = threading.Thread(target=self._run, daemon=True, name=self._name)
            self._thread.start()
        if len(self._lines) >= WAITING or self._closing.is_set():
            self.lost += 1
            return
        self._lines.append(line)
        if not self._come.is_set():
            self._come.set()

    def close(self, seconds: float = 2.0) -> None:
        """Have what waits written, and end the thread, within so many seconds."""
        if self._thread is not None:
            self._lines.append("")
            self._closing.set()
            self._come.set()
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            self._come.wait()
            self._closing.wait(GATHER_SECONDS)
            self._come.clear()
            while self._lines:
                line = self._lines.popleft()
                if not line:
                    return
                try:
                    self._write(line)
                except (OSError, ValueError) as error:
                    if not self.lost:
                        log.error("%s: a line is lost, and others may be (/metrics counts them): %s", self._name, cause(error))
                    self.lost += 1


class Rotating(RotatingFileHandler):
    """A file that only its owner may read, replaced when it is full, and an error where a line cannot be written."""

    def _open(self) -> "os.PathLike[str] | object":  # type: ignore[override]
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=lambda path, flags: os.open(path, flags, 0o600))

    def write(self, line: str) -> None:
        """Write a line; raise OSError where that fails."""
        record = logging.LogRecord("", logging.INFO, "", 0, line, None, None)
        if self.shouldRollover(record):
            self.doRollover()
        assert self.stream
        self.stream.write(f"{line}\n")
        self.stream.flush()


def rotating(file: Path, size: int, files: int) -> LineLog:
    """Return a log in ``file``, replaced at ``size`` bytes, ``files`` earlier ones kept; raise EbjdatError where it cannot be."""
    try:
        handler = Rotating(file, maxBytes=size, backupCount=files, encoding="utf-8")
    except OSError as error:
        raise EbjdatError(f"the audit log {file} cannot be written: {cause(error)}") from error
    return LineLog(handler.write, f"the audit log {file}")
