"""Tensors whose memory ends at a page that can't be read: one byte too far ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(tensor: Tensor, at_start: bool = False) -> Tensor:
    """A contiguous copy that ends where such a page begins, or begins where one ends."""
    if tensor.numel() == 0:
        return tensor
    page = mmap.PAGESIZE
    pages = -(-tensor.nbytes // page)
    region = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (address, address + (pages + 1) * page):
        if _libc.mprotect(guard, page, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if at_start else (pages + 1) * page - tensor.nbytes
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)
