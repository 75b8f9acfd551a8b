"""Merging in one layer: PEFT's own code on a copy in fp32, and one rounding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, MultiheadAttention
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .... import ops
from ... import bitsandbytes as bnb
from ..names import base_name
from ..swap import is_fast, swap_in
from .feedback import quantize_with_feedback
from .kept import keeping, not_kept_reason, restore_kept
from .report import MergeRow, measured


def merge_layer(
    name: str,
    layer: Any,
    adapters: list[str],
    *,
    into: str,
    dtype: torch.dtype | None,
    original: Tensor | None,
    moments: Tensor | None,
    compare: bool,
    keep_base: bool,
) -> MergeRow:
    """Merges `adapters` into the base weight of `layer`; the arguments are `merge_adapter`'s.

    Raises:
        ValueError: the merged weight is not finite; the layer is as before.
    """
    with keeping(layer, _changing(layer), keep_base):
        if not _is_ours(layer):
            layer.merge(adapter_names=adapters)
            return MergeRow(name, type(layer.get_base_layer()).__name__)
        peft = (_decoded(layer), _decoded(merged_copy(layer, adapters))) if compare else None
        kept = _stored_dtype(layer, into, dtype)
        result = _in_fp32(layer, "merge", kept, original, adapter_names=adapters)
        _store(layer, result, into, dtype, moments)
        base = base_name(layer.get_base_layer())
        return measured(name, base, result.before, result.after, _decoded(layer), peft, moments)


def unmerge_layer(layer: Any) -> None:
    """Takes all merged adapters out of the base weight of `layer`."""
    restore_kept(layer)
    if not layer.merged:
        return
    if _is_ours(layer):
        kept = _stored_dtype(layer, "4bit", None)
        _store(layer, _in_fp32(layer, "unmerge", kept), "4bit", None, None)
    else:
        layer.unmerge()


def cant_keep_reason(layer: Any, adapters: list[str]) -> str | None:
    """Why the base of `layer` can't be kept over a merge of `adapters`, or None."""
    if (reason := not_kept_reason(layer, _changing(layer))) is not None or _is_ours(layer):
        return reason
    before = copy.deepcopy(layer)
    base = before.get_base_layer()
    before.merge(adapter_names=adapters)
    if before.get_base_layer() is not base:
        return f"keep_base must be False: PEFT's {type(layer).__name__} exchanges its base layer"
    return None


def _changing(layer: Any) -> list[str]:
    """The parameters of the base layer that a merge changes."""
    parameters = layer.get_base_layer()._parameters
    names = [_weight_name(layer), "bias"] if _is_ours(layer) else list(parameters)
    return [name for name in names if parameters.get(name) is not None]


def _is_ours(layer: Any) -> bool:
    """True when the layer's merge changes one dense or 4-bit weight of its base layer.

    PEFT's own code merges the others as they are: methods other than LoRA, some of which exchange
    the base layer; 8-bit layers; and MultiheadAttention, which has two layers' weights in one.
    """
    if not isinstance(layer, LoraLayer) or isinstance(layer, MultiheadAttention):
        return False
    base: Any = layer.get_base_layer()
    if bnb.is_linear4bit(base):
        # By name: importing PEFT's 4-bit layer imports bitsandbytes.
        return any(kind.__module__ == "peft.tuners.lora.bnb" for kind in type(layer).__mro__)
    weight = base._parameters.get(_weight_name(layer))
    return type(weight) is nn.Parameter and weight.is_floating_point()


def _weight_name(layer: Any) -> str:
    """Which parameter of the base layer is adapted: `target_parameters` may name another."""
    name: str = getattr(layer, "parameter_name", "weight")
    return name


def _stored_dtype(layer: Any, into: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a merged weight is rounded to; arguments as `_store` takes them."""
    base = layer.get_base_layer()
    if not bnb.is_linear4bit(base):
        stored: torch.dtype = base._parameters[_weight_name(layer)].dtype
        return stored
    if into == "4bit":
        return torch.float32  # its absmax
    return dtype or bnb.packed(base)[1].dtype


def _decoded(layer: Any) -> Tensor:
    """The base weight in fp32, or in fp64 if it is; a fresh tensor."""
    base = layer.get_base_layer()
    if bnb.is_linear4bit(base):
        return bnb.dense_weight(base, torch.float32)
    return _wide(base._parameters[_weight_name(layer)])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


@dataclass(frozen=True)
class _Result:
    """The base weight before and after, and the bias after, unrounded."""

    before: Tensor
    after: Tensor
    bias: Tensor | None


@torch.no_grad()
def _in_fp32(
    layer: Any,
    method: str,
    kept: torch.dtype,
    original: Tensor | None = None,
    **arguments: Any,
) -> _Result:
    """The base weight after PEFT's own `method`, with everything in fp32.

    The layer's own weight stays as it is; its `merged_adapters` are changed.

    Args:
        layer: one of which `_is_ours` is true.
        method: "merge" or "unmerge", called with `arguments`.
        kept: the dtype that the weight will be rounded to.
        original: takes the place of the base weight.
    """
    base, kind, name = layer.get_base_layer(), type(layer), _weight_name(layer)
    before = _decoded(layer) if original is None else _wide(original.to(base.weight.device))
    stand_in, kept_bias = {name: before.clone()}, torch.float32
    if (own := base._parameters.get("bias")) is not None:
        stand_in["bias"], kept_bias = _wide(own), own.dtype
    merged = list(layer.merged_adapters)
    four_bit = bnb.is_linear4bit(base)
    target: Any = nn.Linear(1, 1, bias=False, device="meta") if four_bit else base
    with _exchanged(layer, target, stand_in):
        try:
            if four_bit:
                # PEFT's 4-bit layer quantises between adapters, and adds lora_bias unscaled.
                layer.__class__, layer.base_layer = Linear, target
            getattr(layer, method)(**arguments)
            bias = target._parameters.get("bias")
            after = target._parameters[name].detach()
            for what, value, dtype in (("weight", after, kept), ("bias", bias, kept_bias)):
                if value is not None and not value.to(dtype).isfinite().all():
                    raise ValueError(f"the {what} is not finite in {dtype} after {method}")
            return _Result(before, after, None if bias is None else bias.detach())
        except BaseException:
            layer.merged_adapters[:] = merged
            raise
        finally:
            if four_bit:
                layer.__class__, layer.base_layer = kind, base


@contextmanager
def _exchanged(layer: Any, base: nn.Module, stand_in: Mapping[str, Tensor]) -> Iterator[None]:
    """`stand_in` as parameters of `base`, and the adapters' parameters in fp32, while inside."""
    exchanged: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def put(module: nn.Module, name: str, value: Tensor) -> None:
        exchanged.append((module, name, module._parameters.get(name)))
        module._parameters[name] = nn.Parameter(value, requires_grad=False)

    try:
        for module, name, parameter in _adapter_slots(layer):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                put(module, name, parameter.detach().float())
        for name, value in stand_in.items():
            put(base, name, value)
        yield
    finally:
        for module, name, own in exchanged:
            module._parameters[name] = own


def _adapter_slots(layer: Any) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """`(module, name, parameter)` of the adapters' parameters."""
    for attribute in layer.adapter_layer_names:
        for module in getattr(layer, attribute).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module, name, parameter


@torch.no_grad()
def _store(
    layer: Any, result: _Result, into: str, dtype: torch.dtype | None, moments: Tensor | None
) -> None:
    """Rounds the result into the base layer."""
    base = layer.get_base_layer()
    if bnb.is_linear4bit(base) and into == "dense":
        _make_dense(layer, base, result, dtype)
        return
    if base._parameters.get("bias") is not None and result.bias is not None:
        base._parameters["bias"].copy_(result.bias)
    if not bnb.is_linear4bit(base):
        base._parameters[_weight_name(layer)].copy_(result.after)
        return
    _, state = bnb.packed(base)
    if moments is None:
        packed, state = ops.quantize_4bit(
            result.after, state.blocksize, state.quant_type, state.nested
        )
    else:
        packed, state = quantize_with_feedback(result.after, state, moments)
    bnb.store(base, packed, state)


def _make_dense(layer: Any, base: Any, result: _Result, dtype: torch.dtype | None) -> None:
    """Puts an nn.Linear into the place of a Linear4bit, and PEFT's dense layer around it."""
    _, state = bnb.packed(base)
    dense = bnb.dense_linear(base, result.after.to(dtype or state.dtype), result.bias)
    fast = is_fast(layer)
    layer.base_layer, layer.__class__ = dense, Linear
    layer.is_target_conv_1d_layer = False
    if fast:
        swap_in(layer)


def merged_copy(layer: Any, adapters: list[str]) -> Any:
    """A deep copy of a layer, also of one that holds tensors of a graph, after PEFT's own merge."""
    memo: dict[int, Any] = {}
    for tensor in tree_leaves(layer.__dict__.get("kwargs", {})):
        # With ensure_weight_tying lm_head holds views of the embedding's A and B, which may have a
        # graph, and which torch copies neither with it nor if they were made without gradients.
        if isinstance(tensor, Tensor) and type(tensor) is not nn.Parameter:
            memo[id(tensor)] = tensor.detach().clone()
    trial = copy.deepcopy(layer, memo)
    with warnings.catch_warnings(), torch.no_grad():
        # It warns of the rounding that the report measures.
        warnings.simplefilter("ignore")
        trial.merge(adapter_names=adapters)
    return trial
