"""The stateless ops: check the arguments once, choose a backend, call it.

Same names, arguments and results as in `reference`, where the formulas stand. None of them is
differentiable; `fastlora.lora_linear` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backends import choose
from .backends.tuned import preferred
from .quant import BLOCKSIZES, QuantState, as_quant_state, packed_bytes
from .reference import Projection

_Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_Trio = tuple[Tensor | None, Tensor | None, Tensor | None]


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + bias + scaling * S B^T`; see `reference.lora_linear_fwd`.

    Raises:
        ValueError: a shape, or the seed, does not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    _check_weight(x, weight, lora_B)
    _check_common(x, bias, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "lora_linear_fwd",
        x.device.type,
        backend,
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        index=x.device.index,
    )
    return b.lora_linear_fwd(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
    *,
    backend: str | None = None,
) -> _Grads:
    """`(dx, dA, dB, dbias)` of `lora_linear_fwd`; see `reference.lora_linear_bwd`.

    Raises:
        ValueError: a shape, or the seed, does not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    _check_weight(x, weight, lora_B)
    _check_common(x, None, lora_A, lora_B, dropout_p, seed)
    _check_backward(dy, x, lora_B, S)
    b = choose(
        "lora_linear_bwd",
        x.device.type,
        backend,
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        index=x.device.index,
    )
    return b.lora_linear_bwd(dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, needs)


def qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`lora_linear_fwd` with `W = dequantize_4bit(weight)`; see `reference.qlora_linear_fwd`.

    Raises:
        ValueError: a shape, the quant_state or the seed does not fit. TypeError: a dtype does not.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    state = as_quant_state(quant_state)
    weight = _check_packed(x, weight, state, lora_B)
    _check_common(x, bias, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "qlora_linear_fwd",
        x.device.type,
        backend,
        prefer=preferred("qlora_linear_fwd", x, compute_dtype or x.dtype, *lora_B.shape),
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        compute_dtype=compute_dtype,
        index=x.device.index,
    )
    return b.qlora_linear_fwd(
        x, weight, state, bias, lora_A, lora_B, scaling, dropout_p, seed, compute_dtype
    )


def qlora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
    *,
    backend: str | None = None,
) -> _Grads:
    """`(dx, dA, dB, dbias)` of `qlora_linear_fwd`; see `reference.qlora_linear_bwd`.

    Raises:
        ValueError: a shape, the quant_state or the seed does not fit. TypeError: a dtype does not.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    state = as_quant_state(quant_state)
    weight = _check_packed(x, weight, state, lora_B)
    _check_common(x, None, lora_A, lora_B, dropout_p, seed)
    _check_backward(dy, x, lora_B, S)
    b = choose(
        "qlora_linear_bwd",
        x.device.type,
        backend,
        prefer=preferred("qlora_linear_bwd", x, compute_dtype or x.dtype, *lora_B.shape),
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        compute_dtype=compute_dtype,
        index=x.device.index,
    )
    return b.qlora_linear_bwd(
        dy, x, weight, state, lora_A, lora_B, S, scaling, dropout_p, seed, compute_dtype, needs
    )


def shared_linear_fwd(
    x: Tensor, projections: Sequence[Projection], *, backend: str | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Several LoRA linears of one x: all y_i, all S_i; see `reference.shared_linear_fwd`.

    Raises:
        ValueError: a shape or a seed does not fit; no projection, or dense and 4-bit ones mixed.
        TypeError: a dtype does not fit, or differs from that of the first projection.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    projections = _check_projections(x, projections)
    b = _choose("fwd", x, projections, backend)
    return b.shared_linear_fwd(x, projections)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    Ss: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, tuple[_Trio, ...]]:
    """`dx` and each `(dA, dB, dbias)`; see `reference.shared_linear_bwd`.

    Raises:
        ValueError: a shape, a number of arguments or a seed does not fit.
        TypeError: a dtype does not fit, or differs from that of the first projection.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    projections = _check_projections(x, projections)
    for name, given in (("dys", dys), ("Ss", Ss), ("needs", needs)):
        if len(given) != len(projections):
            raise ValueError(
                f"{name} must have {len(projections)} entries, one for each projection, "
                f"got {len(given)}"
            )
    for dy, p, S in zip(dys, projections, Ss, strict=True):
        if dy is not None:
            _check_backward(dy, x, p.lora_B, S)
    b = _choose("bwd", x, projections, backend)
    return b.shared_linear_bwd(dys, x, projections, Ss, need_dx, needs)


def grouped_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`lora_linear_fwd` on each expert's rows; see `reference.grouped_lora_linear_fwd`.

    Raises:
        ValueError: a shape, the offsets or the seed do not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    _check_stack(x, x.shape[-1], weight, lora_A, lora_B)
    offsets = _check_offsets(offsets, x.shape[0], lora_A)
    _check_adapter(x, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "grouped_lora_linear_fwd",
        x.device.type,
        backend,
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        dropout_p=dropout_p,
        index=x.device.index,
    )
    return b.grouped_lora_linear_fwd(x, weight, offsets, lora_A, lora_B, scaling, dropout_p, seed)


def grouped_lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    *,
    backend: str | None = None,
) -> _Trio:
    """`(dx, dA, dB)` of `grouped_lora_linear_fwd`; see `reference.grouped_lora_linear_bwd`.

    Raises:
        ValueError: a shape, the offsets or the seed do not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    K = weight.shape[-1]
    _check_grouped_backward(dy, x, lora_A, lora_B, S, needs, K)
    _check_stack(dy, K, weight, lora_A, lora_B)
    offsets = _check_offsets(offsets, dy.shape[0], lora_A)
    _check_adapter(dy, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "grouped_lora_linear_bwd",
        dy.device.type,
        backend,
        dtype=dy.dtype,
        adapter_dtype=lora_A.dtype,
        dropout_p=dropout_p,
        index=dy.device.index,
    )
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    return b.grouped_lora_linear_bwd(dy, x, weight, offsets, *lora, needs)


def grouped_qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`qlora_linear_fwd` on each expert's rows; see `reference.grouped_qlora_linear_fwd`.

    Raises:
        ValueError: a shape, the quant_state, the offsets or the seed do not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    state = as_quant_state(quant_state)
    weight = _check_packed_stack(x, x.shape[-1], weight, state, lora_A, lora_B)
    offsets = _check_offsets(offsets, x.shape[0], lora_A)
    _check_adapter(x, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "grouped_qlora_linear_fwd",
        x.device.type,
        backend,
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        compute_dtype=compute_dtype,
        dropout_p=dropout_p,
        index=x.device.index,
    )
    lora = (lora_A, lora_B, scaling, dropout_p, seed)
    return b.grouped_qlora_linear_fwd(x, weight, state, offsets, *lora, compute_dtype)


def grouped_qlora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    *,
    backend: str | None = None,
) -> _Trio:
    """`(dx, dA, dB)` of `grouped_qlora_linear_fwd`; see `reference.grouped_qlora_linear_bwd`.

    Raises:
        ValueError: a shape, the quant_state, the offsets or the seed do not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    state = as_quant_state(quant_state)
    K = int(state.shape[-1])
    _check_grouped_backward(dy, x, lora_A, lora_B, S, needs, K)
    weight = _check_packed_stack(dy, K, weight, state, lora_A, lora_B)
    offsets = _check_offsets(offsets, dy.shape[0], lora_A)
    _check_adapter(dy, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "grouped_qlora_linear_bwd",
        dy.device.type,
        backend,
        dtype=dy.dtype,
        adapter_dtype=lora_A.dtype,
        compute_dtype=compute_dtype,
        dropout_p=dropout_p,
        index=dy.device.index,
    )
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    return b.grouped_qlora_linear_bwd(dy, x, weight, state, offsets, *lora, compute_dtype, needs)


def quantize_4bit(
    weight: Tensor,
    blocksize: int = 64,
    quant_type: str = "nf4",
    compress_statistics: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, QuantState]:
    """Packed 4-bit codes and quant state of `weight`; see `reference.quantize_4bit`.

    Raises:
        ValueError: unknown blocksize or quant_type. TypeError: weight is not fp32, bf16 or fp16.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight must be fp32, bf16 or fp16, got {weight.dtype}")
    place = weight.device
    b = choose("quantize_4bit", place.type, backend, dtype=weight.dtype, index=place.index)
    return b.quantize_4bit(weight, blocksize, quant_type, compress_statistics)


def dequantize_4bit(
    packed: Tensor,
    quant_state: QuantState,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`code[q] * absmax` in `dtype`; see `reference.dequantize_4bit`.

    Args:
        out: tensor of quant_state.shape and the output dtype, written and returned. Reusing one
            spares the page faults of fresh memory.

    Raises:
        ValueError: packed or out has the wrong size. TypeError: out has the wrong dtype.
    """
    state = as_quant_state(quant_state)
    dtype = dtype or (out.dtype if out is not None else state.dtype)
    packed = packed_bytes(packed)
    _check_bytes(packed, state)
    if out is not None and (tuple(out.shape) != tuple(state.shape) or not out.is_contiguous()):
        raise ValueError(
            f"out must be contiguous with shape {tuple(state.shape)}, got shape "
            f"{tuple(out.shape)} with strides {out.stride()}"
        )
    if out is not None and out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
    place = packed.device
    b = choose("dequantize_4bit", place.type, backend, dtype=dtype, index=place.index)
    return b.dequantize_4bit(packed, state, dtype, out)


# ---- checks ----------------------------------------------------------------------------------


def _check_weight(x: Tensor, weight: Tensor, lora_B: Tensor) -> None:
    if weight.dim() != 2 or x.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"x must be [M, K] and weight [N, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] != lora_B.shape[0]:
        raise ValueError(
            f"lora_B must be [{weight.shape[0]}, R] to match weight, got {tuple(lora_B.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")


def _check_bytes(packed: Tensor, state: QuantState) -> None:
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


def _check_packed(x: Tensor, weight: Tensor, state: QuantState, lora_B: Tensor) -> Tensor:
    """The bytes of a packed weight, flat, after checking them against x and lora_B."""
    shape = tuple(state.shape)
    if x.dim() != 2 or len(shape) != 2 or shape[1] != x.shape[1]:
        raise ValueError(
            f"x must be [M, K] and quant_state.shape (N, K), got {tuple(x.shape)} and {shape}"
        )
    if shape[0] != lora_B.shape[0]:
        raise ValueError(
            f"lora_B must be [{shape[0]}, R] to match weight, got {tuple(lora_B.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    for tensor in state.tensors():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"quant_state's tensors must be on x's device {x.device}, got {tensor.device}"
            )
    packed = packed_bytes(weight)
    _check_bytes(packed, state)
    return packed


def _check_common(
    x: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    K, N = x.shape[1], lora_B.shape[0]
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"lora_A must be [R, {K}] to match x, got {tuple(lora_A.shape)}")
    if lora_B.dim() != 2 or lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(
            f"lora_B must be [N, {lora_A.shape[0]}] to match lora_A, got {tuple(lora_B.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"bias must be [{N}], got {tuple(bias.shape)}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias must be on x's device {x.device}, got {bias.device}")
    _check_adapter(x, lora_A, lora_B, dropout_p, seed)


def _check_adapter(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, dropout_p: float, seed: Tensor | None
) -> None:
    """Dtypes, devices and dropout; the shapes have been checked."""
    if lora_A.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"lora_A must be fp32 or x's dtype {x.dtype}, got {lora_A.dtype}")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B must have lora_A's dtype {lora_A.dtype}, got {lora_B.dtype}")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if seed is not None and seed.device != x.device:
        raise ValueError(f"seed must be on x's device {x.device}, got {seed.device}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if dropout_p > 0.0 and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64):
        got = "None" if seed is None else f"{tuple(seed.shape)} in {seed.dtype}"
        raise ValueError(
            f"seed must be an int64 tensor of one element when dropout_p > 0, got {got}"
        )


def _check_projections(x: Tensor, projections: Sequence[Projection]) -> list[Projection]:
    """The projections with flat bytes and fastlora's quant states, after checking all of them."""
    if not projections:
        raise ValueError("projections must name at least one linear, got none")
    checked: list[Projection] = []
    for p in projections:
        if (p.quant_state is None) != (projections[0].quant_state is None):
            raise ValueError("projections must be all dense or all 4-bit, got both")
        if p.quant_state is None:
            _check_weight(x, p.weight, p.lora_B)
        else:
            state = as_quant_state(p.quant_state)
            weight = _check_packed(x, p.weight, state, p.lora_B)
            p = p._replace(weight=weight, quant_state=state)
        _check_common(x, p.bias, p.lora_A, p.lora_B, p.dropout_p, p.seed)
        checked.append(p)
        for name, dtype in _dtypes([p]).items():
            if dtype != (first := _dtypes(checked)[name]):
                raise TypeError(f"{name} must be the same in all projections, {first}, got {dtype}")
    return checked


def _choose(
    direction: str, x: Tensor, projections: Sequence[Projection], backend: str | None
) -> ModuleType:
    """The backend of the single op: one that has it runs several of them, too."""
    first = projections[0]
    what: dict[str, Any] = {"dtype": x.dtype, "index": x.device.index, **_dtypes(projections)}
    if first.quant_state is None:
        return choose(f"lora_linear_{direction}", x.device.type, backend, **what)
    op, dtype = f"qlora_linear_{direction}", first.compute_dtype or x.dtype
    prefer = preferred(op, x, dtype, *first.lora_B.shape)
    return choose(op, x.device.type, backend, prefer=prefer, **what)


def _dtypes(projections: Sequence[Projection]) -> dict[str, torch.dtype | None]:
    """What `choose` asks of projections whose dtypes are those of the first."""
    first = projections[0]
    compute = None if first.quant_state is None else first.compute_dtype
    return {"adapter_dtype": first.lora_A.dtype, "compute_dtype": compute}


def _check_backward(dy: Tensor, x: Tensor, lora_B: Tensor, S: Tensor) -> None:
    M, N, R = x.shape[0], lora_B.shape[0], lora_B.shape[1]
    if tuple(dy.shape) != (M, N):
        raise ValueError(f"dy must be [{M}, {N}], got {tuple(dy.shape)}")
    if dy.dtype != x.dtype:
        raise TypeError(f"dy must have x's dtype {x.dtype}, got {dy.dtype}")
    if tuple(S.shape) != (M, R):
        raise ValueError(f"S must be [{M}, {R}], got {tuple(S.shape)}")
    for name, tensor in (("dy", dy), ("S", S)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _check_stack(x: Tensor, K: int, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """A dense stack against x, or dy, and the in_features K."""
    if weight.dim() != 3 or x.dim() != 2 or weight.shape[2] != K:
        raise ValueError(
            f"x must be [M, K] and weight [E, N, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    _check_experts(tuple(weight.shape), lora_A, lora_B)


def _check_packed_stack(
    x: Tensor, K: int, weight: Tensor, state: QuantState, lora_A: Tensor, lora_B: Tensor
) -> Tensor:
    """The bytes of a packed stack, flat, after checking them against K and the adapters."""
    shape = tuple(state.shape)
    if x.dim() != 2 or len(shape) != 3 or shape[2] != K:
        raise ValueError(f"quant_state.shape must be (E, N, {K}) to match x, got {shape}")
    if (shape[1] * shape[2]) % state.blocksize:
        raise ValueError(
            f"each expert must have whole blocks of {state.blocksize} elements, "
            f"got experts of {shape[1]} x {shape[2]}"
        )
    for tensor in (weight, *state.tensors()):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"weight and quant_state must be on x's device {x.device}, got {tensor.device}"
            )
    packed = packed_bytes(weight)
    _check_bytes(packed, state)
    _check_experts(shape, lora_A, lora_B)
    return packed


def _check_experts(shape: tuple[int, ...], lora_A: Tensor, lora_B: Tensor) -> None:
    E, N, K = shape
    if lora_A.dim() != 3 or (lora_A.shape[0], lora_A.shape[2]) != (E, K):
        raise ValueError(f"lora_A must be [{E}, R, {K}] to match weight, got {tuple(lora_A.shape)}")
    R = lora_A.shape[1]
    if tuple(lora_B.shape) != (E, N, R):
        raise ValueError(f"lora_B must be [{E}, {N}, {R}], got {tuple(lora_B.shape)}")


def _check_offsets(offsets: Tensor, M: int, lora_A: Tensor) -> Tensor:
    """The offsets in int64. Their values are checked on the CPU alone: elsewhere it would wait."""
    E = lora_A.shape[0]
    if tuple(offsets.shape) != (E,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets must be int32 or int64 [{E}], got {tuple(offsets.shape)} in {offsets.dtype}"
        )
    if offsets.device.type == "cpu" and E > 0:
        ends = offsets.tolist()
        if ends[0] < 0 or ends[-1] > M or ends != sorted(ends):
            raise ValueError(f"offsets must ascend from 0 to at most {M}, got {ends}")
    return offsets.to(torch.int64)


def _check_grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    needs: tuple[bool, bool, bool],
    K: int,
) -> None:
    M, N = dy.shape[0], lora_B.shape[1]
    if tuple(dy.shape) != (M, N):
        raise ValueError(f"dy must be [M, {N}], got {tuple(dy.shape)}")
    if (x is None and needs[1]) or (x is not None and tuple(x.shape) != (M, K)):
        got = "None" if x is None else f"{tuple(x.shape)}"
        raise ValueError(f"x must be [{M}, {K}] where dA is needed, got {got}")
    if x is not None and x.dtype != dy.dtype:
        raise TypeError(f"dy must have x's dtype {x.dtype}, got {dy.dtype}")
    R = lora_A.shape[1]
    if (S is None and needs[2]) or (S is not None and tuple(S.shape) != (M, R)):
        got = "None" if S is None else f"{tuple(S.shape)}"
        raise ValueError(f"S must be [{M}, {R}] where dB is needed, got {got}")
