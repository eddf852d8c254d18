"""How much the libraries below may keep in memory beside the weights, in a process that serves.

Decides two of their settings; whoever starts the process may set them otherwise. Knows nothing of
requests and models.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_MOST_KERNELS = "64"
_ARENAS = "MALLOC_ARENA_MAX"
_M_ARENA_MAX = -8  # of glibc's malloc.h


def keep_little() -> None:
    """Have freed memory given back; call it before torch is imported and threads are started.

    oneDNN keeps a kernel for each of the last 1,024 sizes of matrices, and torch as many again.
    Requests are of all sizes: 300 of them, at the widths of Qwen3-Reranker-0.6B, took 0.6 GB, and
    0.2 GB with 64 kernels. The first layer of a pack whose size is not kept takes about 1.6 ms more
    (`benchmarks/kernels.py`). With AMX kernels take longer to compile and sizes are rounded, so
    that there are few.

    glibc gives each thread a heap of its own, whose free memory no other thread can use: 0.2 GB.
    """
    if not _has_amx():
        for name in _KERNELS:
            os.environ.setdefault(name, _MOST_KERNELS)
    if sys.platform == "linux" and _ARENAS not in os.environ:
        with contextlib.suppress(AttributeError):  # another libc
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _has_amx() -> bool:
    # torch would tell, but is not to be imported yet.
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
