"""The emulated instructions against the PTX ISA's own words, not against kernels that use them.

Source: PTX ISA 9.0, sections on `mma.m16n8k16`, `ldmatrix`, `prmt`, `cvt`. Elements are numbered as
there: a0 to a7 and b0 to b3 of a thread, two to a register; groupID = lane / 4,
threadID_in_group = lane % 4.
"""

from __future__ import annotations

import ctypes
import random

import pytest
import torch
from torch import Tensor

from tests import emulated

DTYPES = {False: torch.bfloat16, True: torch.float16}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulated.load()


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def a_place(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane // 4, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)


def b_place(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane // 4, lane % 4
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def c_place(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane // 4, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


@pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
def test_multiply_add(library: ctypes.CDLL, half: bool) -> None:
    """With distinct integers, whose products and sums are exact, one wrong element shows."""
    A = torch.randint(-8, 9, (16, 16)).to(DTYPES[half])
    B = torch.randint(-8, 9, (16, 8)).to(DTYPES[half])
    C = torch.randint(-99, 99, (16, 8)).float()
    a = torch.stack([torch.stack([A[a_place(lane, i)] for i in range(8)]) for lane in range(32)])
    b = torch.stack([torch.stack([B[b_place(lane, i)] for i in range(4)]) for lane in range(32)])
    d = torch.stack([torch.stack([C[c_place(lane, i)] for i in range(4)]) for lane in range(32)])
    library.simt_multiply_add(ctypes.c_bool(half), pointer(d), pointer(a), pointer(b))
    want = C + A.float() @ B.float()
    for lane in range(32):
        for i in range(4):
            assert d[lane, i] == want[c_place(lane, i)], (lane, i)


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(library: ctypes.CDLL, transposed: bool) -> None:
    """Thread t gets (t / 4, 2 (t % 4)) and the next of each matrix, or of its transpose."""
    memory = torch.arange(8 * 64, dtype=torch.int16).view(8, 64)  # four matrices beside each other
    r = torch.zeros(32, 4, 2, dtype=torch.int16)
    library.simt_load_matrices(ctypes.c_bool(transposed), pointer(r), pointer(memory))
    for matrix in range(4):
        elements = memory[:, 8 * matrix : 8 * matrix + 8]
        elements = elements.T if transposed else elements
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            assert r[lane, matrix].tolist() == elements[row, column : column + 2].tolist()


def test_permute(library: ctypes.CDLL) -> None:
    """Bytes b7 .. b0 are {b, a}; the nibble's top bit asks for eight copies of the byte's sign."""
    library.simt_permute.restype = ctypes.c_uint32
    for _ in range(2000):
        a, b, selector = (random.getrandbits(32) for _ in range(3))
        data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        want = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = data[nibble & 7]
            want.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        assert library.simt_permute(a, b, selector) == int.from_bytes(bytes(want), "little")


@pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
def test_conversions(library: ctypes.CDLL, half: bool) -> None:
    """Every 16-bit number to fp32; numbers of every magnitude back, rounded as torch does."""
    dtype = DTYPES[half]
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    to_float, kind = library.simt_to_float, ctypes.c_bool(half)
    wide = torch.tensor([to_float(kind, ctypes.c_uint16(i & 0xFFFF)) for i in bits.tolist()])
    assert torch.equal(wide.nan_to_num(7.0), bits.view(dtype).float().nan_to_num(7.0))

    library.simt_pack.restype = ctypes.c_uint32
    values = torch.randint(-(2**31), 2**31, (20000,), dtype=torch.int64).to(torch.int32)
    values = torch.cat([values.view(torch.float32), torch.randn(20000), torch.randn(20000) * 1e-6])
    ties = (wide[:-1].double() + wide[1:].double()).div(2).float()  # midway between neighbours
    values = torch.cat([values, ties[::7]])
    for low, high in values[: len(values) // 2 * 2].view(-1, 2).tolist():
        word = library.simt_pack(kind, ctypes.c_float(low), ctypes.c_float(high))
        want = torch.tensor([low, high]).to(dtype)
        got = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
        assert torch.equal(got.view(dtype).nan_to_num(7.0), want.nan_to_num(7.0)), (low, high)
