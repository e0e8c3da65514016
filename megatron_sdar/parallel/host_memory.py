"""Memory of a CPU rank: what is freed stays with the process for the next micro-batch.

Activations come and go with every micro-batch. By default glibc maps large tensors anew each time
and gives the free end of its heap back to the system. Every page that comes back costs a fault: on
a virtual machine that was a tenth of a step.
"""

from __future__ import annotations

import ctypes
import sys

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Make malloc keep what is freed until the process ends; False where it cannot (not glibc).

    To be called before memory is used: what is mapped already stays so.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    # The second alone would stop glibc from raising its mmap threshold above 128 KiB.
    nothing_is_mapped = bool(library.mallopt(_M_MMAP_MAX, 0))
    return nothing_is_mapped and bool(library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> bool:
    """Give what is freed so far back to the system once; False where malloc cannot (not glibc)."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "malloc_trim") and bool(library.malloc_trim(0))
