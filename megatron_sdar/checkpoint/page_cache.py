"""Giving the system's file cache back what a conversion will not read again.

A conversion reads and writes more than the machine's memory. Left alone, the cache fills up with
it, every new page must first be taken from something else, and other programs lose theirs.
"""

from __future__ import annotations

import os


def forget_pages(descriptor: int, offset: int = 0, num_bytes: int = 0) -> None:
    """Drop the cached pages of a range of a file (0 bytes: to its end), if they are on disk.

    Does nothing where the system has no such call.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)
