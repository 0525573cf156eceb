"""Files that options name: a pipe would hold whoever opens it, and a device is none to replace."""

import errno
import os
import stat
from pathlib import Path


def open_regular(file: Path, flags: int) -> int:
    """Return a descriptor of a regular file, made with mode 0600 for O_CREAT; raise OSError for anything else, at once."""
    descriptor = os.open(file, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return descriptor
