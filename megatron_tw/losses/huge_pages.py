"""Huge pages for large buffers on a CPU: their first use costs a page fault a 2 MiB, not one a 4 KiB.

Linux gives them to memory that asks (`madvise`, the default setting of /sys/kernel/mm/transparent_hugepage/enabled in
many distributions). It is a hint: where it is not known or refused, all goes on with small pages.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LEAST_BYTES = 64 << 20
"""Above glibc's largest threshold of 32 MiB for memory maps of their own: the advice ends with the buffer."""


def advise_huge_pages(buffer: Tensor) -> Tensor:
    """The buffer itself. Asks for huge pages where it is large, on a CPU, and not touched yet."""
    # A subclass is no memory of its own: a fake tensor, for one.
    if type(buffer) is torch.Tensor and buffer.device.type == "cpu" and buffer.nbytes >= LEAST_BYTES:
        start = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _advise()(start, buffer.data_ptr() + buffer.nbytes - start)
    return buffer


@functools.cache
def _advise() -> Callable[[int, int], None]:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return lambda start, length: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda start, length: madvise(start, length, mmap.MADV_HUGEPAGE)
