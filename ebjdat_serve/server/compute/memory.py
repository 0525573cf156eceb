"""What glibc's allocator does with large blocks."""

import ctypes

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


def give_back_large_blocks() -> None:
    """Have glibc map blocks of 1 MiB and more apart, and so return them when they are freed.

    By itself it stops doing so once it has freed large ones: large bodies, one after the other, then grew the HTTP process to 780 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**20)
