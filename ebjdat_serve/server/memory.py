"""How glibc's allocator treats large blocks."""

import ctypes

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
