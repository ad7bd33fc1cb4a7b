"""The process's memory: what a computation frees, the next one gets, in huge pages."""

import ctypes
import os

# mallopt(3), madvise(2)
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MADV_HUGEPAGE = 14


def keep_freed() -> None:
    """Has glibc's malloc keep freed memory for the next allocation instead of giving it back to the system.

    A program on CPU allocates all that it computes in as one block, gigabytes for a training step, and frees it behind
    each call. Left alone, malloc maps and unmaps that block each time, and the kernel clears every page of it anew:
    a third of a training step's time. To be called before JAX computes anything, because a thread keeps the arena that
    it began with. One small program gains nothing: filling a mask takes 30 MB more by it. Where malloc is not glibc's,
    or huge pages are not to be had, what is missing is not done.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - raises where this is not glibc
    except (OSError, TypeError, AttributeError):
        return
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    # What the heap will grow into gets huge pages: the addresses alone are taken here, no memory.
    page = os.sysconf("SC_PAGE_SIZE")
    size = page * os.sysconf("SC_PHYS_PAGES") // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(size):
        libc.madvise(-(-block // page) * page, size - 2 * page, _MADV_HUGEPAGE)
        libc.free(block)
