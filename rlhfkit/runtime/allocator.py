"""Memory of the C library on CPUs."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
GIB = 2**30
# Of oneDNN's products, which it compiles for each shape. A pass needs some twenty, and lines of tokens are rarely of
# one length: the 1,024 that it keeps by itself are of no use, and take half a GiB in bf16.
PRODUCTS_KEPT = 128


def keep_freed_memory() -> bool:
    """Have glibc keep what PyTorch frees instead of giving it back to the system after every layer.

    Tensors of some megabytes are otherwise mapped afresh each time, and the system clears every page of them: a third
    of the processor time of a training step on a CPU (see docs/performance.md). Returns whether it was done.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_KEPT))
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, GIB), (M_TOP_PAD, 64 * 2**20))
    return all(libc.mallopt(name, value) for name, value in wanted)
