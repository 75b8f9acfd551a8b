"""bitsandbytes' 4-bit layers: reading their parts, and keeping weights in the standard layout.

On CPUs with AVX512-BF16, bitsandbytes 0.50 rewrites a `Linear4bit` weight in place at its first
forward in eval mode, into a layout that its inference kernel reads. Nothing undoes that on
`.train()`: the frozen weight then gives no gradient to its input, `dequantize_4bit` and merges
decode the wrong layout, and absmax has been rounded to bf16. `disable_cpu_repacking` prevents it,
`unpack` undoes it if nothing was lost.

bitsandbytes is never imported here: its modules are told by name, so that a model without them
costs no import.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..quant import QuantState, as_quant_state, packed_bytes

_LINEAR_NAMES = ("Linear4bit", "LinearNF4", "LinearFP4")
# Set on a module whose repacking was on before `disable_cpu_repacking`.
_MARK = "_fastlora_repacking_was_on"
# bitsandbytes interleaves the nibbles of this many output rows.
_ROWS = 32
_ADVICE = (
    "Load the model again and call fastlora.accelerate(model), or "
    "fastlora.integrations.bitsandbytes.disable_cpu_repacking(model), before its first forward in "
    "eval mode"
)


def is_linear4bit(module: object) -> bool:
    """True for exactly bitsandbytes' `Linear4bit`, `LinearNF4` and `LinearFP4`, no subclass."""
    kind = type(module)
    return kind.__name__ in _LINEAR_NAMES and kind.__module__ == "bitsandbytes.nn.modules"


def is_params4bit(weight: object) -> bool:
    """True for exactly bitsandbytes' `Params4bit`."""
    kind = type(weight)
    return kind.__name__ == "Params4bit" and kind.__module__ == "bitsandbytes.nn.modules"


def raw_quant_state(linear: nn.Module) -> Any:
    """bitsandbytes' own state of a 4-bit layer, or None before it is quantised.

    The weight's state comes first. FSDP replaces the weight by a plain parameter, which has none;
    the module's own state is then the only one.
    """
    state = getattr(linear._parameters.get("weight"), "quant_state", None)
    return linear.__dict__.get("quant_state") if state is None else state


def compute_dtype(linear: nn.Module, x_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the base product for an input in `x_dtype`, without the side effects of a call.

    A layer built without `compute_dtype` keeps that of its first input, if fp32 or bf16.
    """
    dtype: Any = linear.compute_dtype
    if not linear.compute_type_is_set and x_dtype in (torch.float32, torch.bfloat16):
        dtype = x_dtype
    return x_dtype if dtype is None else dtype


def settle_compute_dtype(linear: Any, x: Tensor) -> None:
    """Sets `compute_dtype` as `Linear4bit.forward` does on the first call."""
    if not linear.compute_type_is_set:
        linear.set_compute_type(x)
        linear.compute_type_is_set = True


def packed(linear: nn.Module) -> tuple[Tensor, QuantState]:
    """The packed weight (`ceil(N K / 2)` bytes, in whatever dtype stores them), and its state.

    Raises:
        ValueError: the layer is not quantised yet, or bitsandbytes has repacked it.
    """
    state, weight = raw_quant_state(linear), linear._parameters["weight"]
    if state is None:
        raise ValueError(
            "linear: expected a quantised Linear4bit, got one without quant_state; move it to its "
            "device first, which quantises it"
        )
    assert weight is not None
    return weight, as_quant_state(state)


def dense_weight(linear: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The decoded weight `[N, K]`; raises as `packed`.

    Args:
        linear: a `Linear4bit`.
        dtype: None takes the one from before quantisation.
    """
    weight, state = packed(linear)
    return ops.dequantize_4bit(weight, state, dtype or state.dtype)


def store(linear: nn.Module, packed: Tensor, state: QuantState) -> None:
    """Overwrites the bytes of a `Linear4bit` with another quantised weight.

    Args:
        linear: a `Linear4bit`, quantised and not repacked.
        packed: uint8, as `ops.quantize_4bit` gives it.
        state: its state, of the shape, blocksize, type and nesting of the layer's own.
    """
    weight, kept = linear._parameters["weight"], copy.copy(raw_quant_state(linear))
    assert weight is not None
    packed_bytes(weight).copy_(packed.reshape(-1))
    kept.absmax, kept.offset = state.absmax, state.offset
    if state.state2 is not None:
        kept.state2 = copy.copy(kept.state2)
        kept.state2.absmax = state.state2.absmax
    set_quant_state(linear, kept)


def set_quant_state(linear: nn.Module, state: Any) -> None:
    """Gives a 4-bit layer another state of bitsandbytes', wherever it has one."""
    # FSDP's plain parameters have no state; the module always has.
    holders: tuple[Any, ...] = (linear._parameters["weight"], linear)
    for holder in holders:
        if getattr(holder, "quant_state", None) is not None:
            holder.quant_state = state


def dense_linear(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` for the place of a `Linear4bit`, in the dtype and on the device of `weight`.

    Args:
        linear: the layer to replace: whether its bias trains, and its mode, are taken over.
        weight: `[N, K]`, used as it is.
        bias: `[N]` in any dtype, or None.
    """
    N, K = weight.shape
    dense = nn.Linear(K, N, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        own = linear._parameters["bias"]
        trains = own is not None and own.requires_grad
        dense.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=trains)
    dense.source_cls = getattr(linear, "source_cls", None)  # type: ignore[assignment]
    return dense.train(linear.training)


def was_conv1d(linear: nn.Module) -> bool:
    """Whether Transformers put the layer into the place of a `Conv1D`, whose weight is `[K, N]`."""
    kind = getattr(linear, "source_cls", None)
    return getattr(kind, "__name__", "") == "Conv1D"


def _as_conv1d(linear: nn.Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    conv: nn.Module = Conv1D(*linear.weight.shape)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
    none = nn.Parameter(linear.weight.new_zeros(len(linear.weight)), requires_grad=False)
    bias = linear._parameters.get("bias")
    conv.bias = none if bias is None else bias
    return conv.train(linear.training)


def make_dense(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Puts a decoded `nn.Linear` into the place of every 4-bit layer, one at a time.

    In a model of `Conv1D` (GPT-2), whose layers Transformers turns for bitsandbytes, they are
    turned back, those too that are dense already.

    Args:
        model: left without the marks of a quantised Transformers model, so that it saves as any
            other.
        dtype: of the weights; None takes the one from before quantisation.

    Returns:
        How many layers it replaced.
    """
    layers = list(linear4bit_modules(model))
    for name, linear in layers:
        dense = dense_linear(linear, dense_weight(linear, dtype), linear._parameters.get("bias"))
        model.set_submodule(name, dense)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and was_conv1d(module):
            model.set_submodule(name, _as_conv1d(module))
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    for name in ("is_loaded_in_4bit", "is_quantized"):
        if name in model.__dict__:
            setattr(model, name, False)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return len(layers)


# ---- repacking for CPU inference --------------------------------------------------------------


def linear4bit_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`(name, module)` of every 4-bit layer in `model`."""
    return ((name, m) for name, m in model.named_modules() if is_linear4bit(m))


def disable_cpu_repacking(model: nn.Module) -> int:
    """Keeps bitsandbytes from rewriting the 4-bit weights of `model` in eval mode.

    Sets its switch, `support_avx512bf16_for_cpu`, to False on every 4-bit layer.

    Returns:
        How many layers had it on.
    """
    count = 0
    for _, module in linear4bit_modules(model):
        if module.__dict__.get("support_avx512bf16_for_cpu"):
            module.__dict__["support_avx512bf16_for_cpu"] = False
            module.__dict__[_MARK] = True
            count += 1
    return count


def restore_cpu_repacking(model: nn.Module) -> int:
    """Undoes `disable_cpu_repacking`. Returns how many layers it switched on again."""
    count = 0
    for _, module in linear4bit_modules(model):
        if module.__dict__.pop(_MARK, False):
            module.__dict__["support_avx512bf16_for_cpu"] = True
            count += 1
    return count


def is_repacked(linear: nn.Module) -> bool:
    """True when bitsandbytes has rewritten the weight, or its absmax, for CPU inference.

    `Linear4bit.state_dict()` turns a repacked weight back, but leaves an absmax that was not nested
    transposed and in bf16; that counts as repacked too.
    """
    state = raw_quant_state(linear)
    if state is None:
        return False
    return getattr(state, "packing_format_for_cpu", False) or state.absmax.dim() == 2


def unpack_reason(linear: nn.Module) -> str | None:
    """Why a repacked weight cannot be restored without loss, in one sentence, or None.

    Repacking moves the nibbles, which is undone exactly, and rounds absmax to bf16. The rounding
    lost nothing where absmax was a bf16 number before: where the weight was quantised from bf16
    (the largest magnitude of a block of bf16 numbers is one of them) and absmax was not nested.
    """
    state, what = raw_quant_state(linear), "bitsandbytes repacked its weight in place in eval mode"
    if getattr(state, "original_nested", True):
        return f"{what}, and its nested absmax is lost. {_ADVICE}."
    if state.original_dtype != torch.bfloat16:
        dtype = state.original_dtype
        return (
            f"{what} and rounded to bf16 the absmax of a weight quantised from {dtype}. {_ADVICE}."
        )
    return None


def unpack(linear: nn.Module) -> bool:
    """Restores a weight that bitsandbytes repacked for CPU inference, bit for bit, in place.

    The nibble of row `32 b + i`, column `2 k + c` lies in byte `p % 32` of group `(b, k)`, where
    `p = 2 i + c`; in the low half for `p < 32`, else in the high half.

    Args:
        linear: a `Linear4bit`, repacked or not.

    Returns:
        True when there was something to restore.

    Raises:
        ValueError: when the original absmax cannot be told from what is left; see `unpack_reason`.
    """
    if not is_repacked(linear):
        return False
    if (reason := unpack_reason(linear)) is not None:
        raise ValueError(f"linear: {reason}")
    state = raw_quant_state(linear)
    weight = linear._parameters["weight"]
    assert weight is not None
    if state.packing_format_for_cpu:
        data = _unpack_nibbles(weight.detach(), *state.shape).reshape(state.original_qshape)
        storage = getattr(state, "original_storage_type", None)
        weight.data = data if storage is None else data.view(storage)
        state.packing_format_for_cpu = False
    state.absmax = state.absmax.T.reshape(-1).float()
    state.dtype = state.original_dtype
    for name in ("original_dtype", "original_nested", "original_qshape", "original_storage_type"):
        state.__dict__.pop(name, None)
    return True


def _unpack_nibbles(packed: Tensor, N: int, K: int) -> Tensor:
    """uint8 `[N K / 2]`, row-major, high nibble first, from bitsandbytes' `[N, K / 2]` CPU layout.

    For each 32 rows and each pair of columns, bitsandbytes lists the 64 nibbles row by row and puts
    the first 32 in the low and the last 32 in the high halves of 32 bytes.
    """
    pairs = packed.reshape(N // _ROWS, K // 2, _ROWS)
    nibbles = torch.cat([pairs & 15, pairs >> 4], dim=-1)
    rows = nibbles.view(N // _ROWS, K // 2, _ROWS, 2).transpose(1, 2).reshape(-1, 2)
    return (rows[:, 0] << 4) | rows[:, 1]
