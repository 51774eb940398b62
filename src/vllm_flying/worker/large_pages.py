"""A file's memory, mapped so that the kernel can keep it in large pages, and put there where it keeps other memory so.

May import torch. With transparent huge pages always on, a buffer of vLLM's own would get them unasked; files in memory
get them only when asked, by MADV_COLLAPSE, and only where address and file are aligned alike.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch

LARGE_PAGE = 2 << 20
THP_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Linux's numbers, which Python's mmap module doesn't name.
MAP_FIXED, MAP_NORESERVE, MADV_COLLAPSE = 0x10, 0x4000, 25
MAP_FAILED = ctypes.c_void_p(-1).value


def wants_large_pages(setting: Path = THP_SETTING) -> bool:
    """Whether memory that nobody asks for anything gets large pages."""
    try:
        return "[always]" in setting.read_text()
    except OSError:
        return False


def map_aligned(fd: int, num_bytes: int) -> torch.Tensor:
    """The file's bytes, shared, from a boundary of large pages on; mapped until the process ends."""
    libc = _libc()
    reserved = libc.mmap(
        None, num_bytes + LARGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
    )
    begin = None if reserved == MAP_FAILED else -(-reserved // LARGE_PAGE) * LARGE_PAGE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if begin is None or libc.mmap(begin, num_bytes, protection, mmap.MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(begin), dtype=torch.int8)


def use_large_pages(buffer: torch.Tensor) -> None:
    """Put all whole large pages of a buffer from `map_aligned` into such. A kernel that can't leaves it as it is."""
    _libc().madvise(buffer.data_ptr(), buffer.numel() // LARGE_PAGE * LARGE_PAGE, MADV_COLLAPSE)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
