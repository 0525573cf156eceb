"""Memory of processes: how glibc's allocator treats large blocks, and what a process takes."""

import contextlib
import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
LARGE, KEPT = 2**20, 2**22
"""Bytes of a block that is mapped by itself, and freed bytes at the end of the heap that stay: else each array of 224 x 224 pixels would
come from the system anew, page by page."""


def return_large_blocks() -> None:
    """Make glibc map LARGE blocks separately, so that freeing one returns it to the system, and keep KEPT bytes of the others.

    By default glibc raises that threshold whenever a larger block is freed: large bodies, one after the other, grew the HTTP process
    to 780 MB. A threshold that is fixed fixes the other one too, at 128 KiB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)


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
