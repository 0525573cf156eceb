"""One process at a time: flock, and a marker file where the file system has no flock, as some network file systems have none."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ebjdat_serve.errors import EbjdatError

NO_FLOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})


class Held(EbjdatError):
    """Another process holds the lock."""


@contextmanager
def alone(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold ``file`` as a lock, after the process that has it unless ``wait`` is false.

    Without flock a file beside it, named after it, stands for the lock; one that a process of this machine left behind when it died is
    taken over. Raises Held, OSError.
    """
    if not file.parent.is_dir():  # filelock would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file.parent))
    marker = file.with_name(f"{file.name}.held")
    lock: BaseFileLock = FileLock(file, blocking=wait, fallback_to_soft=False)
    try:
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            lock = SoftFileLock(marker, blocking=wait)
            lock.acquire()
    except Timeout as error:
        gone = f", or remove {marker} if no process is left that made it" if isinstance(lock, SoftFileLock) else ""
        raise Held(f"another process holds {file.parent}: wait for it{gone}") from error
    try:
        yield
    finally:
        lock.release()
