"""Arguments that would read past memory, or lose something silently: refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import ops, reference
from fastlora.backends import native
from fastlora.layer import Layer

needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)
IDS, SEED = torch.zeros(3, dtype=torch.long), torch.tensor([4])
HUGE = torch.zeros(1, 1).expand(1, 2**62)


def freed(tensor: Tensor, kept: int = 0) -> Tensor:
    """A tensor whose storage has lost its memory, as sharding and offloading free it."""
    tensor.untyped_storage().resize_(kept)
    return tensor


def view_of_freed(kept: int) -> Tensor:
    """The last rows of a matrix of which the first bytes are left."""
    whole = torch.zeros(9, 8)
    rows = whole[5:]
    freed(whole, kept)
    return rows


def flat(weight: Tensor, A: Tensor, B: Tensor, **fields: Any) -> tuple[Any, ...]:
    """A layer as the registered ops take it."""
    dense = dict.fromkeys(("absmax", "code", "nested_absmax", "nested_code", "nested_offset"))
    rest = {"blocksize": 0, "compute_dtype": None, "bias": None}
    rest |= {"A": A, "B": B, "scaling": 1.0, "dropout_p": 0.0, "seed": None}
    return (weight, *(dense | rest | fields).values())


def linear(x: Tensor | None = None, weight: Tensor | None = None, **fields: Any) -> Any:
    x, weight = (torch.zeros(*s) if t is None else t for t, s in ((x, (3, 8)), (weight, (4, 8))))
    A = fields.pop("A", torch.zeros(2, 8))
    layer = flat(weight, A, torch.zeros(4, 2), **fields)
    return torch.ops.fastlora.lora_linear_fwd(x, *layer)


def embedding(table: Tensor, A: Tensor | None = None) -> Any:
    A = torch.zeros(2, 5) if A is None else A
    return torch.ops.fastlora.lora_embedding_fwd(IDS, table, A, torch.zeros(4, 2), 1.0, 1.0)


def norm(weight: Tensor, A: Tensor, **fields: Any) -> Any:
    return torch.ops.fastlora.dora_norm(*flat(weight, A, torch.zeros(4, 2), **fields))


def packed_norm() -> Any:
    layer = flat(
        torch.zeros(16, dtype=torch.uint8),
        HUGE,
        torch.zeros(4, 1),
        absmax=torch.zeros(1),
        code=torch.zeros(16),
        blocksize=64,
        compute_dtype=torch.float32,
    )
    return torch.ops.fastlora.dora_norm(*layer)


REGISTERED: dict[str, tuple[Callable[[], Any], str]] = {
    "freed weight": (lambda: linear(weight=freed(torch.zeros(4, 8))), "has lost its memory"),
    "freed x": (lambda: linear(freed(torch.zeros(3, 8))), "has lost its memory"),
    "half a weight": (lambda: linear(weight=freed(torch.zeros(4, 8), 64)), "64 bytes of 128"),
    "freed columns of a weight": (
        lambda: linear(weight=freed(torch.zeros(4, 16)[:, ::2])),
        "has lost its memory",
    ),
    "freed columns of x": (lambda: linear(freed(torch.zeros(8, 3).T)), "has lost its memory"),
    "freed lora_A, turned": (
        lambda: linear(A=freed(torch.zeros(8, 2).T)),
        "has lost its memory",
    ),
    "a view of a cut weight": (
        lambda: linear(weight=view_of_freed(160)),
        "160 bytes of 288",
    ),
    "freed seed": (
        lambda: linear(dropout_p=0.5, seed=freed(torch.tensor([4]))),
        "has lost its memory",
    ),
    "x of one dimension": (lambda: linear(torch.zeros(8)), "x must be a matrix, got 1 dim"),
    "x of none": (lambda: linear(torch.tensor(8.0)), "x must be a matrix, got 0 dim"),
    "meta weight": (lambda: linear(weight=torch.zeros(4, 8, device="meta")), "one device"),
    "meta seed": (lambda: linear(dropout_p=0.5, seed=SEED.to("meta")), "one device, got cpu, meta"),
    "empty table of three dimensions": (
        lambda: embedding(torch.zeros(5, 4, 0)),
        "weight must be a matrix, got 3 dim",
    ),
    "table of three dimensions": (
        lambda: embedding(torch.zeros(5, 4, 3)),
        "weight must be a matrix, got 3 dim",
    ),
    "lora_A of no dimension": (
        lambda: embedding(torch.zeros(5, 4), torch.tensor(1.0)),
        "lora_A must be a matrix, got 0 dim",
    ),
    "table without a rank": (
        lambda: torch.ops.fastlora.lora_embedding_fwd(
            IDS, torch.ones(5, 4), torch.zeros(0, 5), torch.zeros(4, 0), 1.0, 1.0
        ),
        "lora_A must have a rank",
    ),
    "norm of three dimensions": (
        lambda: norm(torch.zeros(4, 8, 0), torch.zeros(2, 8)),
        r"weight must be \[4, 8\]",
    ),
    "norm with lora_A of one": (
        lambda: norm(torch.zeros(4, 8), torch.zeros(2)),
        "lora_A must be a matrix, got 1 dim",
    ),
    "more elements than a number counts": (packed_norm, "weight can't be"),
    "magnitude of one dimension": (
        lambda: torch.ops.fastlora.dora_magnitude_fwd(torch.zeros(3), torch.zeros(3), None),
        "z must be a matrix, got 1 dim",
    ),
    "dropout of one dimension": (
        lambda: torch.ops.fastlora.dora_dropout_fwd(torch.zeros(3), 0.5, SEED),
        "x must be a matrix, got 1 dim",
    ),
}


@needs_native
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_ops(name: str) -> None:
    """They are called by compiled graphs and by others than fastlora."""
    call, message = REGISTERED[name]
    with pytest.raises((RuntimeError, ValueError), match=message) as refused:
        call()
    assert ".h:" not in str(refused.value) and ".cpp:" not in str(refused.value)


@needs_native
def test_tensors_without_elements_have_no_memory_to_lose() -> None:
    layer = flat(torch.ones(4, 8), torch.zeros(0, 8), torch.zeros(4, 0))
    y, S = torch.ops.fastlora.lora_linear_fwd(torch.ones(3, 8), *layer)
    assert torch.equal(y, torch.full((3, 4), 8.0)) and S.shape == (3, 0)
    assert torch.ops.fastlora.lora_linear_fwd(torch.ones(0, 8), *layer)[0].shape == (0, 4)


@needs_native
def test_a_layer_whose_weight_is_freed() -> None:
    """The public op, too, as after FSDP has taken a weight away."""
    layer = Layer(freed(torch.zeros(4, 8)), torch.zeros(2, 8), torch.zeros(4, 2), 1.0)
    with pytest.raises(RuntimeError, match="has lost its memory"):
        ops.lora_linear_fwd(torch.zeros(3, 8), layer, backend="native")


WEIGHT, A, B = torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)


@pytest.mark.parametrize(
    ("x", "scaling", "error", "message"),
    [
        (torch.zeros(3, 8, dtype=torch.complex64), 1.0, TypeError, "x must be fp32, bf16 or fp16"),
        (torch.zeros(3, 8, dtype=torch.int64), 1.0, TypeError, "x must be fp32, bf16 or fp16"),
        (torch.tensor(1.0), 1.0, ValueError, r"x must be \[\.\.\., K\], got a tensor without"),
        (torch.zeros(3, 8).numpy(), 1.0, TypeError, "x must be a tensor, got ndarray"),
        (
            torch.zeros(3, 8),
            torch.tensor(1.0, requires_grad=True),
            TypeError,
            "scaling must be a number, got a tensor that wants a gradient",
        ),
    ],
    ids=["complex", "integers", "no dimension", "numpy", "trained scaling"],
)
def test_lora_linear(x: Any, scaling: Any, error: type[Exception], message: str) -> None:
    weight = WEIGHT.to(x.dtype) if isinstance(x, Tensor) and x.dim() else WEIGHT
    with pytest.raises(error, match=message):
        fastlora.lora_linear(x, weight, None, A, B, scaling)


PACKED, STATE = reference.quantize_4bit(torch.randn(4, 4096), compress_statistics=True)
PLAIN_PACKED, PLAIN = reference.quantize_4bit(torch.randn(4, 64))
INNER: Any = STATE.state2


@pytest.mark.parametrize(
    ("packed", "state", "message"),
    [
        (PACKED, replace(STATE, quant_type="int4"), "quant_type must be one of .*, got 'int4'"),
        (PACKED, replace(STATE, blocksize=0), "blocksize must be a power of two .*, got 0"),
        (PACKED, replace(STATE, blocksize=48), "blocksize must be a power of two .*, got 48"),
        (
            PACKED,
            replace(STATE, state2=replace(INNER, blocksize=0)),
            "state2.blocksize must be 256, got 0",
        ),
        (
            PACKED,
            replace(STATE, state2=replace(INNER, blocksize=16)),
            "state2.blocksize must be 256, got 16",
        ),
        (PLAIN_PACKED, replace(PLAIN, code=PLAIN.code[:15]), r"code must be fp32 \[16\]"),
        (PLAIN_PACKED, replace(PLAIN, code=PLAIN.code.half()), r"code must be fp32 \[16\]"),
        (PLAIN_PACKED, replace(PLAIN, absmax=PLAIN.absmax.half()), "absmax must be torch.float32"),
        (
            PLAIN_PACKED,
            replace(PLAIN, absmax=torch.stack([PLAIN.absmax] * 2, 1)[:, 0]),
            r"and contiguous, got torch.float32 with strides \(2,\)",
        ),
        (PACKED, replace(STATE, state2=None), "absmax must be torch.float32 without state2"),
        (PLAIN_PACKED, PLAIN.to("meta"), "tensors must be on packed's device cpu, got meta"),
        (PLAIN_PACKED.to("meta"), PLAIN, "tensors must be on packed's device meta, got cpu"),
    ],
)
def test_quant_states(packed: Tensor, state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastlora.dequantize_4bit(packed, state)


def test_out_that_overlaps_what_is_read() -> None:
    memory = torch.zeros(256)
    packed = memory.view(torch.uint8)[:128].view(-1, 1)
    packed.copy_(PLAIN_PACKED)
    with pytest.raises(ValueError, match="out must not share memory with packed"):
        fastlora.dequantize_4bit(packed, PLAIN, torch.float32, out=memory.view(4, 64))
    beside = torch.zeros(288)
    packed = beside.view(torch.uint8)[1024:].view(-1, 1)
    packed.copy_(PLAIN_PACKED)
    got = fastlora.dequantize_4bit(packed, PLAIN, torch.float32, out=beside[:256].view(4, 64))
    assert torch.equal(got, reference.dequantize_4bit(PLAIN_PACKED, PLAIN, torch.float32))
