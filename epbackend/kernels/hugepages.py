"""Ask Linux to hold a range of memory in 2 MiB pages, so that walking it needs few address translations.

MADV_COLLAPSE (Linux 6.1) moves what is already written; older kernels refuse it, which costs speed and nothing else.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

HUGE_PAGE = 1 << 21
MADV_COLLAPSE = 25


def use_huge_pages(address: int, nbytes: int) -> None:
    """Cover [address, address + nbytes) with huge pages, if it is at least one long.

    The range is rounded outwards: experts' matrices lie side by side in memory, and inwards would leave out the seams.
    """
    madvise = _madvise()
    if madvise is None or nbytes < HUGE_PAGE:
        return
    first = address // HUGE_PAGE * HUGE_PAGE
    last = -(-(address + nbytes) // HUGE_PAGE) * HUGE_PAGE
    madvise(first, last - first, MADV_COLLAPSE)


@cache
def _madvise():
    """The C library's madvise, or None where there is no Linux."""
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
