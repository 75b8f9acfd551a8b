"""Checks of arguments that several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer import Layer
from ..quant import FORMATS, NESTED_BLOCKSIZE, QUANT_TYPES, QuantState, as_quant_state, packed_bytes

# fp64 is the reference's, for checks.
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_layer(x: Tensor, layer: Layer) -> Layer:
    """One linear layer against x; returned with fastlora's quant state and the weight's bytes."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be fp32, bf16 or fp16, got {x.dtype}")
    if layer.quant_state is not None:
        layer, shape = _check_4bit(x, layer, as_quant_state(layer.quant_state))
    else:
        shape = _check_dense(x, layer.weight, layer.compute_dtype)
    N, K = shape
    A, B, bias = layer.lora_A, layer.lora_B, layer.bias
    a_shape, b_shape = A.shape, B.shape
    if b_shape[:1] != (N,):
        raise ValueError(f"lora_B must be [{N}, R] to match weight, got {tuple(b_shape)}")
    if len(a_shape) != 2 or a_shape[1] != K:
        raise ValueError(f"lora_A must be [R, {K}] to match x, got {tuple(a_shape)}")
    if b_shape != (N, a_shape[0]):
        raise ValueError(f"lora_B must be [N, {a_shape[0]}] to match lora_A, got {tuple(b_shape)}")
    if bias is not None:
        if bias.shape != (N,):
            raise ValueError(f"bias must be [{N}], got {tuple(bias.shape)}")
        check_devices("x's", x.device, ("bias", bias))
    check_adapter(x, layer)
    return layer


def _check_dense(x: Tensor, weight: Tensor, compute_dtype: torch.dtype | None) -> torch.Size:
    """A dense weight against x; returns its shape."""
    shape = weight.shape
    if len(shape) != 2 or x.dim() != 2 or shape[1] != x.shape[1]:
        raise ValueError(
            f"x must be [M, K] and weight [N, K], got {tuple(x.shape)} and {tuple(shape)}"
        )
    dtype = x.dtype if compute_dtype is None else compute_dtype
    if weight.dtype != dtype:
        whose = "x's dtype" if compute_dtype is None else "compute_dtype"
        raise TypeError(f"weight must have {whose} {dtype}, got {weight.dtype}")
    if dtype != x.dtype and x.dtype != torch.float32:
        raise TypeError(f"compute_dtype of a dense weight must be x's {x.dtype}, got {dtype}")
    if weight.device != x.device:
        check_devices("x's", x.device, ("weight", weight))
    return shape


def _check_4bit(x: Tensor, layer: Layer, state: QuantState) -> tuple[Layer, torch.Size]:
    """A packed weight against x; returns the layer with its bytes, and the weight's shape."""
    shape = state.shape
    if x.dim() != 2 or len(shape) != 2 or shape[1] != x.shape[1]:
        raise ValueError(
            "x must be [M, K] and quant_state.shape (N, K), "
            f"got {tuple(x.shape)} and {tuple(shape)}"
        )
    weight = check_stored("x's", x.device, layer.weight, state)
    return layer._replace(weight=weight, quant_state=state), shape


def check_bytes(packed: Tensor, state: QuantState) -> None:
    """Checks a quant state, and the number of bytes and of absmax against it."""
    _check_state(state)
    elements = 1
    for size in state.shape:
        elements *= size
    if packed.numel() != (elements + 1) // 2:
        raise ValueError(
            f"weight must hold {(elements + 1) // 2} bytes for shape {tuple(state.shape)}, "
            f"got {packed.numel()}"
        )
    blocks = -(-elements // state.blocksize)
    if state.absmax.numel() != blocks:
        raise ValueError(
            f"quant_state.absmax must hold {blocks} values for blocksize {state.blocksize}, "
            f"got {state.absmax.numel()}"
        )


def _check_state(state: QuantState) -> None:
    """A quant state as a kernel reads it; its tensors' sizes follow from the weight's."""
    if state.quant_type not in FORMATS:
        raise ValueError(
            f"quant_state.quant_type must be one of {QUANT_TYPES}, got {state.quant_type!r}"
        )
    blocksize, inner = state.blocksize, state.state2
    if blocksize < 32 or blocksize & (blocksize - 1):
        raise ValueError(
            f"quant_state.blocksize must be a power of two of at least 32, got {blocksize}"
        )
    if inner is not None and inner.blocksize != NESTED_BLOCKSIZE:
        raise ValueError(
            f"quant_state.state2.blocksize must be {NESTED_BLOCKSIZE}, got {inner.blocksize}"
        )
    if inner is not None:
        scales = -(-state.absmax.numel() // NESTED_BLOCKSIZE)
        # One by one: every call of a 4-bit layer asks.
        if (
            inner.absmax.numel() != scales
            or inner.code.numel() != 256
            or state.offset is None
            or state.offset.numel() != 1
            or not inner.absmax.dtype == inner.code.dtype == state.offset.dtype == torch.float32
        ):
            raise ValueError(
                f"quant_state must have {scales} nested scales, 256 nested codes and an offset, in "
                "fp32"
            )
    absmax, code = state.absmax, state.code
    if code.dtype != torch.float32 or code.numel() != 16:
        raise ValueError(
            f"quant_state.code must be fp32 [16], got {code.dtype} {tuple(code.shape)}"
        )
    dtype = torch.float32 if inner is None else torch.uint8
    if absmax.dtype != dtype or not absmax.is_contiguous():
        what = "without" if inner is None else "with"
        raise ValueError(
            f"quant_state.absmax must be {dtype} {what} state2, and contiguous, got {absmax.dtype} "
            f"with strides {absmax.stride()}"
        )


def check_stored(whose: str, device: torch.device, weight: Tensor, state: QuantState) -> Tensor:
    """The bytes of a packed weight, flat, after checking them against the state, and both for
    `device`, which is that of x or of what `whose` names.
    """
    parts = [("quant_state's tensors", tensor) for tensor in state.tensors()]
    check_devices(whose, device, ("weight", weight), *parts)
    packed = packed_bytes(weight)
    check_bytes(packed, state)
    return packed


def check_adapter(x: Tensor, layer: Layer) -> None:
    """Dtypes, devices and dropout; the shapes have been checked."""
    A, B, p, seed = layer.lora_A, layer.lora_B, layer.dropout_p, layer.seed
    check_adapter_dtypes("x's", x.dtype, A, B)
    device = x.device
    if A.device != device or B.device != device or seed is not None:
        check_devices("x's", device, ("lora_A", A), ("lora_B", B), ("seed", seed))
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {p}")
    if p > 0.0 and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64):
        got = "None" if seed is None else f"{tuple(seed.shape)} in {seed.dtype}"
        raise ValueError(
            f"seed must be an int64 tensor of one element when dropout_p > 0, got {got}"
        )


def check_backward(dy: Tensor, x: Tensor, layer: Layer, S: Tensor) -> None:
    """Checks the arguments that the backward has in addition to the forward's."""
    M, (N, R) = x.shape[0], layer.lora_B.shape
    if tuple(dy.shape) != (M, N):
        raise ValueError(f"dy must be [{M}, {N}], got {tuple(dy.shape)}")
    if dy.dtype != x.dtype:
        raise TypeError(f"dy must have x's dtype {x.dtype}, got {dy.dtype}")
    if tuple(S.shape) != (M, R):
        raise ValueError(f"S must be [{M}, {R}], got {tuple(S.shape)}")
    check_devices("x's", x.device, ("dy", dy), ("S", S))


def check_adapter_dtypes(whose: str, dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor) -> None:
    """The dtypes of an adapter beside `dtype`, which is that of x or of what `whose` names."""
    if lora_A.dtype not in (dtype, torch.float32):
        raise TypeError(f"lora_A must be fp32 or {whose} dtype {dtype}, got {lora_A.dtype}")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B must have lora_A's dtype {lora_A.dtype}, got {lora_B.dtype}")


def check_devices(whose: str, device: torch.device, *tensors: tuple[str, Tensor | None]) -> None:
    """Named tensors on `device`, which is that of x or of what `whose` names."""
    for name, tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {whose} device {device}, got {tensor.device}")


def check_apart(name: str, written: Tensor, *read: tuple[str, Tensor | None]) -> None:
    """A contiguous tensor that is written shares no memory with named ones that are read."""
    if torch.compiler.is_compiling():
        return
    begin = written.data_ptr()
    end = begin + written.nbytes
    for other, tensor in read:
        if (
            tensor is not None
            and tensor.data_ptr() < end
            and begin < tensor.data_ptr() + tensor.nbytes
        ):
            raise ValueError(f"{name} must not share memory with {other}")
