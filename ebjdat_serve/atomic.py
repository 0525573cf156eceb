"""Atomic file replacement: write to a temporary file in the same folder, then rename, so that no reader or kill leaves half a file."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``file``; on success it replaces ``file``, on an error it is removed.

    A link is replaced, not followed. ``shared``: other processes may replace ``file`` at the same time, so the temporary name contains
    the process id, and a killed process leaves it behind; otherwise the next call removes it. Raises OSError.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part" if shared else f".{file.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def undone(file: Path) -> Iterator[None]:
    """Put ``file`` back as it was where what is done with it fails, on a full disk, say: a manifest that lists another is of no bundle."""
    before = file.with_name(f".{file.name}.before")
    if there := file.is_file():
        with replacing(before) as copy:
            shutil.copy2(file, copy)
    try:
        yield
    except BaseException:
        if there:
            os.replace(before, file)
        elif file.is_file():
            file.unlink()
        raise
    before.unlink(missing_ok=True)
