"""The C heap kept between steps: by default glibc returns a step's tensors to the system and faults them in again."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER_TRIM = -1
_TOP_PAD_BYTES = 2**26


def keep_freed_memory() -> None:
    """For a process that trains on the CPU: freed tensors of any size stay its own. Calling it again changes nothing.

    The process holds on to its peak between steps, and the peak grows by what the heap fragments (a few per cent).
    Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
        mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
