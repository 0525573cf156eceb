"""Lines written by a thread of their own: a disk or a reader that stalls never keeps the event loop."""

import contextlib
import errno
import logging
import os
import select
import stat
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from multiprocessing.util import Finalize
from pathlib import Path

from ebjdat_serve.errors import EbjdatError, cause
from ebjdat_serve.server.regular_files import open_regular

log = logging.getLogger("ebjdat_serve")
WAITING = 20_000
"""Lines that wait at most; what comes then is lost, and counted."""
GATHER_SECONDS = 0.05
"""Time in which lines gather before they are written: a thread that wakes for each takes the interpreter from the event loop each time."""
CLOSE_SECONDS = 2.0
"""Time in which what waits at the end is written, or is not."""
STDERR = 2
OWNERS = 0o600
"""Mode of a file that its owner alone may read and write."""


class LineLog:
    """Gives lines to ``write`` in a thread; ``lost`` counts those that it could not take, which is also logged once if it is ``told``."""

    def __init__(self, write: Callable[[str], None], name: str, *, told: bool = True) -> None:
        self._waiting = Waiting(write, name, told)

    @property
    def lost(self) -> int:
        """How many lines could not be written."""
        return self._waiting.lost

    def lose(self) -> None:
        """Count a line that there never was."""
        self._waiting.lost += 1

    def put(self, line: str) -> None:
        """Have a line written."""
        if self._waiting.process != os.getpid():
            self._waiting = self._waiting.anew()  # forked: the thread stayed in the other process, with what waits there
        if self._waiting.begin():
            # a process that multiprocessing started runs no atexit; what is called holds what waits and not this, which could never go
            Finalize(self, self._waiting.close, exitpriority=0)
        self._waiting.put(line)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Have what waits written, and end the thread, within so many seconds; the end of the process does it, too."""
        self._waiting.close(seconds)


class Waiting:
    """The lines of a LineLog and the thread that writes them, which does not hold the LineLog: one that nobody holds is closed."""

    def __init__(self, write: Callable[[str], None], name: str, told: bool, lost: int = 0) -> None:
        self._write, self._name, self._told, self.lost = write, name, told, lost
        self._lines: deque[str] = deque()  # the first may be half written
        self._come, self._closing, self._over = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.process = os.getpid()

    def anew(self) -> "Waiting":
        """Return the same without lines and without a thread."""
        return Waiting(self._write, self._name, self._told, self.lost)

    def begin(self) -> bool:
        """Start the thread; return whether there was none."""
        if self._thread is not None:
            return False
        self._thread = threading.Thread(target=self._run, daemon=True, name=self._name)
        self._thread.start()
        return True

    def put(self, line: str) -> None:
        """Have a line written."""
        if len(self._lines) >= WAITING or self._closing.is_set():
            self.lost += 1
            return
        self._lines.append(line)
        if not self._come.is_set():
            self._come.set()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Have what waits written within so many seconds; count what is not, and say so."""
        thread = self._thread
        if thread is None or self.process != os.getpid() or self._closing.is_set():
            return
        self._closing.set()
        self._come.set()
        if thread is not threading.current_thread():  # which may be the one that collects the LineLog
            thread.join(seconds)
            self._over.set()
            if left := len(self._lines):
                self.lost += left
                say(f"{self._name}: {left:,} lines are lost, which could not be written within {seconds:g} s at the end")

    def _run(self) -> None:
        while not self._over.is_set():
            self._come.wait()
            closing = self._closing.wait(GATHER_SECONDS)
            self._come.clear()
            while self._lines and not self._over.is_set():
                try:
                    self._write(self._lines[0])
                except (OSError, ValueError) as error:
                    if self._told and not self.lost:
                        log.error("%s: a line is lost, and others may be (/metrics counts them): %s", self._name, cause(error))
                    self.lost += 1
                self._lines.popleft()
            if closing:
                return


def say(text: str) -> None:
    """Write a line to standard error, if that can be done without waiting for its reader."""
    with contextlib.suppress(OSError, ValueError):  # closed, or none
        if select.select([], [STDERR], [], 0)[1]:
            os.write(STDERR, f"{text}\n".encode())


class ThreadedHandler(logging.Handler):
    """Writes records to a descriptor by a thread: whoever logs never waits for whoever reads."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.lines = LineLog(partial(write_whole, descriptor), "the log", told=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written; logging's own way to tell of one that has no text would wait for a reader."""
        try:
            self.lines.put(self.format(record))
        except Exception:  # noqa: BLE001 (a text of anybody's may raise what it likes, and who logs goes on)
            self.lines.lose()


def log_by_thread() -> None:
    """Have a thread write the log of this process, and one in each process that it forks, where it was written to a stream."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler):
            threaded = ThreadedHandler(handler.stream.fileno())
            threaded.setFormatter(handler.formatter)
            root.removeHandler(handler)
            root.addHandler(threaded)


def log_lines_lost() -> int:
    """Return how many lines of this process's log could not be written."""
    return sum(handler.lines.lost for handler in logging.getLogger().handlers if isinstance(handler, ThreadedHandler))


def write_whole(descriptor: int, line: str) -> None:
    """Write a line past Python's streams, whose locks a thread that waits would hold until the process ends."""
    data = f"{line}\n".encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(descriptor, data) :]


class LineFile:
    """A file of lines that only its owner may read, replaced when it is full; what another program moved or removed is made anew."""

    def __init__(self, file: Path, size: int, files: int) -> None:
        """``size``: bytes at which the file is replaced, of which ``files`` earlier ones are kept. Raises OSError."""
        self._file, self._size, self._kept = file, size, files
        self._open()

    def _open(self) -> None:
        try:
            self._descriptor = open_regular(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "it is a link; name the file itself") from error
            raise
        if stat.S_IMODE(os.fstat(self._descriptor).st_mode) != OWNERS:  # a file system without modes is no reason to end
            os.fchmod(self._descriptor, OWNERS)

    def write(self, line: str) -> None:
        """Write a line, or none of it; raise OSError where that fails."""
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        if not self._is_there():
            self._reopen()
        before = os.fstat(self._descriptor).st_size
        if before and before + len(data) > self._size:
            self._replace()
            before = 0
        if os.write(self._descriptor, data) < len(data):
            os.ftruncate(self._descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self._file), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _reopen(self) -> None:
        earlier = self._descriptor
        self._open()
        os.close(earlier)

    def _replace(self) -> None:
        names = [self._file, *(self._file.with_name(f"{self._file.name}.{n}") for n in range(1, self._kept + 1))]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.replace(older)
        self._reopen()


def rotating(file: Path, size: int, files: int) -> LineLog:
    """Return a log in ``file``, replaced at ``size`` bytes, ``files`` earlier ones kept; raise EbjdatError where it cannot be."""
    try:
        lines = LineFile(file, size, files)
    except OSError as error:
        raise EbjdatError(f"the audit log {file} cannot be written: {cause(error)}") from error
    return LineLog(lines.write, f"the audit log {file}")
