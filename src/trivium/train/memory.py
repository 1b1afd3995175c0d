"""Memory that a step frees stays with the process, so that the next step finds it there (Linux, glibc).

A step on a CPU takes and frees gigabytes. glibc gives large blocks back to the system at once and the rest when 64 MB
lie free at the end of the heap; the next step then gets every page anew, one fault and 4 KB of zeros at a time. At
ALBEF's base size and 8 pairs these are 300,000 to 800,000 faults and 0.7 to 3 seconds of the kernel's time a step.
Kept, there are a handful. The process stays as large as its largest step, which it reaches again each time anyway; on
GPUs torch's own allocator does the same.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
NEVER = 2**31 - 1  # bytes free at the end of the heap before it shrinks, the most that can be said
LARGEST = 2**30  # bytes of a block that is still taken from the heap, not from the system
OLD_LARGEST = 2**25  # the most that older glibc admits


def keep_freed() -> bool:
    """From now on this process keeps what it frees. Whether this system's allocator can be told so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    taken = mallopt(MMAP_THRESHOLD, LARGEST) or mallopt(MMAP_THRESHOLD, OLD_LARGEST)
    return bool(taken and mallopt(TRIM_THRESHOLD, NEVER))
