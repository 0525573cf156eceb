"""Memory of processes: how glibc's allocator treats large blocks, and what a process takes."""

import contextlib
import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


def return_large_blocks() -> None:
    """Make glibc map blocks of 1 MiB and more separately, so that freeing one returns it to the system.

    By default glibc raises that threshold whenever a larger block is freed: large bodies, one after the other, grew the HTTP process
    to 780 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**20)


def memory_of(pids: Iterable[int]) -> int | None:
    """Return the bytes of memory that processes take together, of what is shared with others their part; None where nobody tells."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just died
            try:
                said = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            except PermissionError:
                return None
            if found := re.search(r"^Pss:\s+(\d+) kB", said, re.MULTILINE):
                total += 1024 * int(found[1])
    return total or None
