"""torch.ops.fastlora.* with arguments that don't fit: an error, or what the fake promises.

A valid call has up to three of its arguments replaced: by tensors of other sizes, dtypes, strides
and devices, by views, by tensors whose storage was freed or cut. The memory of every tensor lies
beside a page that can't be read, so that a read out of bounds ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given
from hypothesis import strategies as st

from fastlora import reference
from fastlora.backends import native
from fastlora.backends.schemas import flatten
from fastlora.layer import Layer
from tests.fuzz.budget import budget
from tests.fuzz.guard import guarded

pytestmark = [
    pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason())),
    pytest.mark.filterwarnings("ignore"),
]
OPS: Any = torch.ops.fastlora
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 65, 128])
DTYPES = st.sampled_from(
    ["float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool", "complex64"]
).map(lambda name: getattr(torch, name))
LAYOUTS = ("whole", "turned", "strided", "shifted", "spread", "freed", "cut", "meta")


@st.composite
def tensors(draw: st.DrawFn, layouts: tuple[str, ...] = LAYOUTS) -> Tensor:
    """A tensor of up to four dimensions, in any layout, that may have lost its memory."""
    shape = draw(st.lists(SIZES, max_size=4).map(tuple))
    layout = draw(st.sampled_from(layouts))
    base = torch.ones(shape).to(draw(DTYPES))
    if layout not in ("freed", "cut", "meta"):
        base = guarded(base, draw(st.booleans()))
    elif base.dim() > 1 and draw(st.booleans()):
        base = base.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "turned" and base.dim() > 1:
        return guarded(base.transpose(0, -1)).transpose(0, -1)
    if layout == "strided" and base.dim():
        return guarded(torch.cat([base, base], -1))[..., ::2]
    if layout == "shifted" and base.dim() and len(base):
        return guarded(torch.cat([base, base]))[1 : len(base) + 1]
    if layout == "spread" and base.dim():
        return base[..., :1].expand(shape) if shape[-1] else base
    if layout == "freed":
        base.untyped_storage().resize_(0)
    if layout == "cut":
        base.untyped_storage().resize_(base.untyped_storage().nbytes() // 2)
    return base.to("meta") if layout == "meta" else base


def others(value: Any) -> st.SearchStrategy[Any]:
    """What may take the place of an argument."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from([-(2**63), -1, 0, 1, 16, 31, 32, 48, 64, 2**40, 2**62, 2**63 - 1])
    if isinstance(value, float):
        return st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5, 1e300, float("inf"), float("nan")])
    if isinstance(value, torch.dtype):
        return DTYPES
    # Where torch expects no tensor it prints what it got, which must have its memory for that.
    return st.one_of(tensors(LAYOUTS[:5]), st.none()) if value is None else tensors()


def layer(M: int, N: int, K: int, R: int, dtype: torch.dtype, four_bit: bool) -> Layer:
    weight, state = torch.randn(N, K).to(dtype), None
    if four_bit:
        weight, state = reference.quantize_4bit(torch.randn(N, K), 64, compress_statistics=M % 2)
    adapters = torch.randn(R, K), torch.randn(N, R)
    compute = dtype if four_bit else None
    bias = torch.randn(N).to(dtype)
    return Layer(weight, *adapters, 0.5, bias, state, compute, 0.1, torch.tensor([M]))


def linear_fwd(M: int, N: int, K: int, R: int, dtype: Any, four_bit: bool) -> tuple[Any, ...]:
    return torch.randn(M, K).to(dtype), *flatten(layer(M, N, K, R, dtype, four_bit))


def linear_bwd(M: int, N: int, K: int, R: int, dtype: Any, four_bit: bool) -> tuple[Any, ...]:
    dy, S = torch.randn(M, N).to(dtype), torch.randn(M, R)
    return dy, *linear_fwd(M, N, K, R, dtype, four_bit), S, True, True, True, True


def stack(M: int, N: int, K: int, R: int, dtype: Any, four_bit: bool) -> tuple[Any, ...]:
    one = layer(M, N, K, R, dtype, False)
    many = one._replace(
        weight=one.weight[None], lora_A=one.lora_A[None], lora_B=one.lora_B[None], bias=None
    )
    return torch.randn(M, K).to(dtype), *flatten(many), torch.tensor([M])


def packed(N: int, K: int) -> tuple[Any, ...]:
    data, state = reference.quantize_4bit(torch.randn(N, K), 64)
    return data, state.absmax, state.code, None, None, None, 64


CALLS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "lora_linear_fwd": linear_fwd,
    "lora_linear_bwd": linear_bwd,
    "grouped_lora_linear_fwd": stack,
    "dora_norm": lambda *a: linear_fwd(*a)[1:],
    "dora_magnitude_fwd": lambda M, N, K, R, dtype, q: (
        torch.randn(M, N).to(dtype), torch.randn(N), torch.randn(M, N).to(dtype)
    ),
    "dora_magnitude_bwd": lambda M, N, K, R, dtype, q: (
        *(torch.randn(M, N).to(dtype) for _ in range(2)), torch.randn(N), True, True, True
    ),
    "dora_dropout_fwd": lambda M, N, K, R, dtype, q: (
        torch.randn(M, K).to(dtype), 0.3, torch.tensor([3])
    ),
    "dora_dropout_bwd": lambda M, N, K, R, dtype, q: (
        *(torch.randn(M, K).to(dtype) for _ in range(2)), 0.3, torch.tensor([3])
    ),
    "lora_embedding_fwd": lambda M, N, K, R, dtype, q: (
        torch.arange(M) % K, torch.randn(K, N).to(dtype), torch.randn(R, K), torch.randn(N, R),
        0.5, 1.0,
    ),
    "lora_embedding_bwd": lambda M, N, K, R, dtype, q: (
        torch.randn(M, N).to(dtype), torch.arange(M) % K, torch.randn(R, K), torch.randn(N, R),
        0.5, -1, True, True,
    ),
    "quantize_4bit": lambda M, N, K, R, dtype, q: (
        torch.randn(N, K).to(dtype), torch.linspace(-1, 1, 15), torch.arange(16).byte(), 64
    ),
    "dequantize_4bit_out": lambda M, N, K, R, dtype, q: (
        *packed(N, K), torch.empty(N, K).to(dtype)
    ),
}  # fmt: skip


def described(result: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    flat = [] if result is None else [result] if isinstance(result, Tensor) else result
    return [(tuple(t.shape), t.dtype) for t in flat]


@given(data=st.data(), name=st.sampled_from(sorted(CALLS)))
@budget(in_ci=400)
def test_arguments(data: st.DataObject, name: str) -> None:
    sizes = data.draw(st.tuples(*[st.sampled_from([1, 2, 5, 33, 64])] * 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    arguments = [
        guarded(a, data.draw(st.booleans())) if isinstance(a, Tensor) else a
        for a in CALLS[name](*sizes, dtype, data.draw(st.booleans()))
    ]
    places = st.lists(st.integers(0, len(arguments) - 1), max_size=3, unique=True)
    replaced = data.draw(places)
    for place in replaced:
        arguments[place] = data.draw(others(arguments[place]))
    op = getattr(OPS, name)
    try:
        result = op(*arguments)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, OverflowError):
        assert replaced, "a valid call was refused"
        return
    if any(isinstance(a, Tensor) and a.numel() == 1 for a in (arguments[i] for i in replaced)):
        return  # torch takes it as a number, if it is on the CPU
    given_ = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    assert described(result) == described(op(*given_))
