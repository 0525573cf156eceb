"""How glibc's allocator treats large blocks."""

import ctypes

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
