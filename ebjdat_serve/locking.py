"""One process at a time: flock, and a marker file where the file system has no flock, as some network file systems have none.

And a mark on a folder that is in use, shared by all that use it: a shared flock, for which no file is written.
"""

import errno
import fcntl
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


def hold(folder: Path) -> int | None:
    """Return a descriptor that marks ``folder`` as served until it is closed, if only by the process's death; None without locks."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def is_held(folder: Path) -> bool:
    """Return whether a running server serves the bundle in ``folder``, as far as its file system can tell."""
    probe = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks here, so nobody can hold one
    finally:
        os.close(probe)
    return False
