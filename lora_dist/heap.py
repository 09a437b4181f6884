"""The C heap kept between steps: by default glibc returns a step's tensors to the system and faults them in again."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 2**25
_TOP_PAD = 2**26
_NEVER_TRIM = -1


def keep_freed_memory() -> None:
    """For a process that trains on the CPU: freed tensors up to 32 MiB stay its own. Calling it again changes nothing.

    The peak stays what it was; between steps the process holds on to it. Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
        mallopt(_M_TOP_PAD, _TOP_PAD)
