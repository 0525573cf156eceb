"""Exclusive locks between processes, and a shared flock that marks a folder as in use.

The exclusive lock is a flock, or a marker file where the file system, as some network file systems, has no flock.
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
def exclusive_lock(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on ``file``; wait for the process that holds it unless ``wait`` is false.

    Without flock the lock is a marker file named after ``file``; one left behind by a dead process of this machine is taken over.
    Raises Held, OSError.
    """
    if not file.parent.is_dir():  # filelock would create it
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
        gone = f", or remove {marker} if the process that created it is gone" if isinstance(lock, SoftFileLock) else ""
        raise Held(f"another process holds {file.parent}: wait for it{gone}") from error
    try:
        yield
    finally:
        lock.release()


def hold(folder: Path) -> int | None:
    """Return a descriptor that marks ``folder`` as served until it is closed or the process dies; None without flock."""
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


@contextmanager
def changing(file: Path) -> Iterator[None]:
    """Hold ``file``, which no change replaces, by a flock while what lies beside it is changed; nothing is held where it has none.

    Raises Held where another process holds it.
    """
    try:
        held = os.open(file, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Held(f"another command is changing {file.parent}: wait for it") from error
        except OSError:  # no flock here
            pass
        yield
    finally:
        os.close(held)


def abandoned(folder: Path) -> bool:
    """Return whether no running process holds ``folder``; false where the file system has no flock, and nobody can know."""
    probe = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(probe)
    return True


def is_held(folder: Path) -> bool:
    """Return whether a running server serves the bundle in ``folder``; false where the file system has no flock."""
    probe = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no flock here, so none can be held
    finally:
        os.close(probe)
    return False
