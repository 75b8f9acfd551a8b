"""When the fast path holds for one call of a PEFT layer, and when PEFT's own code has to run.

`fast_path` is the only place where this is decided. Its conditions come in three groups, so that
`explain` can ask the first two of a layer that nobody has called yet:

    layer_parts   what the layer is: its state, the exact types and hooks of everything bypassed
    casts         dtypes, devices, autocast and the backend, for a given dtype of x
    plan          the call itself: arguments, tracing, transforms, x
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Conv1D
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing
from torch.nn.modules import module as nn_module

from ..backends import BACKENDS, DEVICE_ORDER, forced_backend
from ..quant import NESTED_BLOCKSIZE, QUANT_TYPES
from . import bitsandbytes as bnb
from .peft_run import Adapter, Casts, Parts, Plan

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Why the latest call of a layer ran PEFT's own code; empty when it did not.
LAST_REASON = "_fastlora_reason"
# The group of layers that share an input with this one; see `peft_shared`.
SHARED = "_fastlora_shared"
# Arguments that PEFT's layers take out of the call themselves; as None they mean nothing.
_MIXED, _OFFSETS = "adapter_names", "alora_offsets"
_PEFT_KWARGS = (_MIXED, _OFFSETS)
PLAIN = (Tensor, nn.Parameter)
# PEFT's variants that differ from LoRA in their initial values and in what trains, not in forward.
_PLAIN_VARIANTS = ("MiCALinearVariant",)
# Those that make their A or B of other tensors, and are LoRA from there on.
_MADE_VARIANTS = ("KasaLinearVariant", "BdLoraLinearVariant")
# Activated LoRA, which serves the tokens from an invocation sequence on.
_INVOKED = "ALoraLinearVariant"


class Unserved(str):
    """A reason that lies in dtypes, autocast, devices or backends, not in what the user asked for.

    The user would rather hear of such a one, so that the layer says it in a warning.
    """

    __slots__ = ()


def fast_path(
    layer: nn.Module, x: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[bool, str]:
    """Whether `layer(x, *args, **kwargs)` may run on fastlora, and why not, in one sentence.

    Args:
        layer: one of PEFT's LoRA layers around `nn.Linear`, transformers' `Conv1D` or bitsandbytes'
            `Linear4bit`.
        x: its input.
        args, kwargs: the other arguments of the call.

    Returns:
        `(True, "")` or `(False, reason)`.
    """
    found = plan(layer, x, args, kwargs or {})
    return (False, found) if isinstance(found, str) else (True, "")


# ---- the layer -------------------------------------------------------------------------------


def layer_parts(layer: Any, names: Iterable[str] | None = None) -> Parts | str:
    """The tensors that the fast path reads, or why PEFT's code has to run whatever the input.

    Args:
        layer: one of PEFT's LoRA layers.
        names: the adapters of a mixed batch; the active ones when None.
    """
    state = layer.__dict__
    if (reason := state_reason(layer)) is not None:
        return reason
    if not state.get("cast_input_dtype_enabled", True) or "_cast_input_dtype" in state:
        return "PEFT's cast of the input to the adapter's dtype is switched off"

    children: dict[str, Any] = layer._modules
    by_svd = isinstance(children["lora_A"], nn.ParameterDict)
    if by_svd and names is not None:
        return "the call passes adapter_names, which AdaLoRA's layers do not take"
    As = children["lora_A"] if by_svd else children["lora_A"]._modules
    chosen = layer.active_adapters if names is None else dict.fromkeys(names)
    present = [name for name in chosen if name in As]
    if not present and names is None:
        return "no adapters are active on this layer"
    adapters: list[Adapter] = []
    roles: list[tuple[str, nn.Module]] = [("the base layer", children["base_layer"])]
    for name in present:
        adapter = (_svd_adapter if by_svd else _adapter)(layer, name, roles)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    if len(present) > 1 and any(adapter.magnitude is not None for adapter in adapters):
        return "DoRA is active together with other adapters"
    base = children["base_layer"]

    four_bit, turned = bnb.is_linear4bit(base), type(base) is Conv1D
    if type(base) is not nn.Linear and not four_bit and not turned:
        return f"the base layer is a {type(base).__name__}, not nn.Linear, Linear4bit or Conv1D"
    if bool(state.get("fan_in_fan_out")) != turned:
        return "fan_in_fan_out does not say how the base weight is stored"
    if (reason := modules_reason(roles)) is not None:
        return reason
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None or any(a.lora_A is None or a.lora_B is None for a in adapters):
        return "a weight is no parameter of its layer (parametrised or pruned)"
    if four_bit and torch.compiler.is_compiling():
        return "torch.compile does not trace bitsandbytes' weights into fastlora"
    quant_state = bnb.raw_quant_state(base) if four_bit else None
    if four_bit and bnb.is_params4bit(weight):
        # Every look at an attribute of this subclass costs a call of its __torch_function__.
        weight = weight.as_subclass(Tensor)
    tensors = [("base weight", weight), ("bias", bias)]
    for adapter in adapters:
        tensors += [("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)]
        tensors += [("lora_B's bias", adapter.bias), ("magnitude", adapter.magnitude)]
    if (reason := tensors_reason(tensors)) is not None:
        return reason
    if weight.requires_grad:
        return "the base weight is being trained (requires_grad); fastlora needs it frozen"
    for adapter in adapters:
        A, B = adapter.lora_A, adapter.lora_B
        if A.dtype != B.dtype:
            return f"lora_A is in {_name(A.dtype)} and lora_B in {_name(B.dtype)}"

    if turned and weight.dim() == 2:
        weight = weight.t()  # Conv1D stores [K, N]
    N, K = layer.out_features, layer.in_features
    if four_bit:
        if (reason := _quant_state_reason(base, weight, quant_state, (N, K))) is not None:
            return reason
    elif weight.shape != (N, K):
        return _shape_reason("base weight", weight, (N, K))
    for adapter in adapters:
        R = adapter.lora_A.shape[0]
        if adapter.lora_A.shape != (R, K):
            return _shape_reason("lora_A", adapter.lora_A, (R, K))
        if adapter.lora_B.shape != (N, R):
            return _shape_reason("lora_B", adapter.lora_B, (N, R))
    return Parts(base, weight, quant_state, bias, tuple(adapters))


def state_reason(layer: Any) -> str | None:
    """Why the adapters of a layer take no part in its forward, or None."""
    if layer.__dict__.get("_disable_adapters"):
        return "the adapters are disabled"
    if layer.__dict__.get("merged_adapters"):
        return "the adapter is merged into the base weight"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward or backward."""
    inner = module.__dict__
    return bool(
        inner["_forward_hooks"]
        or inner["_forward_pre_hooks"]
        or inner["_backward_hooks"]
        or inner["_backward_pre_hooks"]
    )


def modules_reason(roles: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Why modules, each with its role, can't be bypassed, or None."""
    for role, module in roles:
        inner = module.__dict__
        if has_hooks(module):
            return f"{role} has hooks, which fastlora would not call"
        if ("forward" in inner or "_hf_hook" in inner) and not _forward_is_plain(module):
            return f"{role} has a forward of its own (accelerate's offloading, or another patch)"
    if nn_module._has_any_global_hook():
        return "global module hooks are registered, which fastlora would not call"
    return None


def tensors_reason(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Why tensors, each with its role, can't be read as plain memory, or None."""
    for role, tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            kind = type(tensor).__name__
            if kind == "DTensor":
                return f"the {role} is sharded (a DTensor; FSDP2 gathers it during the forward)"
            return f"the {role} is a {kind}, a tensor subclass"
        if tensor.is_meta:
            return f"the {role} is on the meta device (offloaded or not loaded)"
    return None


def _adapter(layer: Any, name: str, roles: list[tuple[str, nn.Module]]) -> Adapter | str:
    """One adapter, its modules added to `roles`; or why PEFT's code has to run."""
    state, children = layer.__dict__, layer._modules
    lora_A, lora_B = children["lora_A"]._modules[name], children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    magnitude: nn.Module | None = None
    invoked = made = False
    if name in state.get("lora_variant", ()) or state.get("use_dora", {}).get(name):
        variant = state.get("lora_variant", {}).get(name)
        kind = "DoRA" if variant is None else type(variant).__name__
        if kind == "DoraLinearVariant":
            magnitude = children["lora_magnitude_vector"]._modules[name]
            if type(magnitude).__name__ != "DoraLinearLayer":
                return f"the magnitude is a {type(magnitude).__name__}, not a DoraLinearLayer"
            roles.append(("the magnitude", magnitude))
        elif kind == _INVOKED:
            invoked = True
        elif kind in _MADE_VARIANTS:
            made = True
        elif kind == "VeloraLinearVariant":
            # Without gradients it is plain LoRA.
            if layer.training and torch.is_grad_enabled():
                return "VeLoRA trains A on compressed activations, which fastlora does not make"
        elif kind not in _PLAIN_VARIANTS:
            return f"the adapter is a LoRA variant ({kind})"
    scaling = state["scaling"][name]
    if type(scaling) not in (float, int):
        return f"scaling is a {type(scaling).__name__}, not a number"
    if (reason := _dropout_reason(dropout)) is not None:
        return reason
    for part in (lora_A, lora_B):
        if type(part) is not nn.Linear and not (made and _is_block_diagonal(part)):
            return f"lora_A or lora_B is a {type(part).__name__}, not a plain nn.Linear"
    if lora_A._parameters.get("bias") is not None:
        return "lora_A has a bias"
    bias = lora_B._parameters.get("bias")
    if magnitude is not None:
        if bias is not None:
            return "DoRA with lora_bias: PEFT counts lora_B's bias into the norm"
        if getattr(dropout, "p", 0.0) >= 1.0:
            return "DoRA with lora_dropout=1 has no scale for what is kept"
    roles += [("lora_A", lora_A), ("lora_B", lora_B), ("the dropout module", dropout)]
    A, B = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    if made:
        found = _made(layer, name, A, B)
        if isinstance(found, str):
            return found
        A, B = found
    vector = None if magnitude is None else magnitude._parameters["weight"]
    return Adapter(name, A, B, bias, dropout, scaling, vector, invoked, made)


def _made(
    layer: Any, name: str, A: Tensor | None, B: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | str:
    """A and B of a variant that makes them: KaSA's `diag * A`, the diagonal blocks of BD-LoRA."""
    children = layer._modules
    if (reason := tensors_reason([("lora_A", A), ("lora_B", B)])) is not None:
        return reason
    parts = [children[side]._modules[name] for side in ("lora_A", "lora_B")]
    A, B = (
        part.weight_as_blockdiagonal_matrix() if _is_block_diagonal(part) else weight
        for part, weight in zip(parts, (A, B), strict=True)
    )
    if type(layer.__dict__["lora_variant"][name]).__name__ != "KasaLinearVariant":
        return A, B
    if name in layer.__dict__.get("_lora_kasa_truncation_deferred", ()):
        return "KaSA truncates the base weight in the first call after loading"
    diagonal = children["lora_diag"]._parameters[name]
    if (reason := tensors_reason([("lora_diag", diagonal)])) is not None:
        return reason
    return None if A is None else A * diagonal[:, None], B


def _is_block_diagonal(part: nn.Module) -> bool:
    """True for the layer of BD-LoRA's A or B, which older PEFTs do not have."""
    return type(part).__name__ == "BlockDiagonalLinear"


def _svd_adapter(layer: Any, name: str, roles: list[tuple[str, nn.Module]]) -> Adapter | str:
    """AdaLoRA's `scaling / (ranknum + 1e-5) * B (A * E)` as one adapter of A and B, as `_adapter`.

    The factors go into A: ranknum is a tensor, and reading it would wait for a GPU.
    """
    children, scaling = layer._modules, layer.scaling[name]
    if type(scaling) not in (float, int):
        return f"scaling is a {type(scaling).__name__}, not a number"
    dropout = children["lora_dropout"]._modules[name]
    if (reason := _dropout_reason(dropout)) is not None:
        return reason
    roles.append(("the dropout module", dropout))
    A, B, E = (children[part]._parameters[name] for part in ("lora_A", "lora_B", "lora_E"))
    for role, tensor in (("lora_A", A), ("lora_E", E)):
        if type(tensor) not in PLAIN or tensor.is_meta:
            return f"the {role} is no plain tensor in memory"
    factor = scaling / (children["ranknum"]._parameters[name] + 1e-5)
    return Adapter(name, A * (E * factor), B, None, dropout, 1.0, None, made=True)


def _dropout_reason(dropout: nn.Module) -> str | None:
    if type(dropout) in (nn.Identity, nn.Dropout) and not getattr(dropout, "inplace", False):
        return None
    return f"the dropout module is a {type(dropout).__name__}, not a plain nn.Dropout"


def _forward_is_plain(module: nn.Module) -> bool:
    """True when the forward in the module's `__dict__` computes what that of its class computes.

    Accelerate puts one there for each module of a model that is spread over devices. Unless it
    offloads, all that it does is to move the input to the weight's device, where `casts` wants it.
    Taking the hooks off leaves the class's own forward there.
    """
    inner = module.__dict__
    forward, hook = inner.get("forward"), inner.get("_hf_hook")
    if hook is not None:
        kind = type(hook)
        if (kind.__module__, kind.__name__) != ("accelerate.hooks", "AlignDevicesHook"):
            return False
        if hook.offload or hook.no_grad or not isinstance(forward, functools.partial):
            return False
        if forward.func.__module__ != "accelerate.hooks":
            return False
        forward = inner.get("_old_forward")
    return getattr(forward, "__func__", None) is type(module).forward


def _quant_state_reason(
    base: nn.Module, weight: Tensor, state: Any, shape: tuple[int, int]
) -> str | None:
    if state is None:
        return "the base weight is not quantised yet"
    if bnb.is_repacked(base):
        return "bitsandbytes repacked the base weight in place for CPU inference"
    if tuple(state.shape) != shape:
        return f"the base weight was quantised with shape {tuple(state.shape)}, not {shape}"
    if weight.numel() * weight.element_size() != (shape[0] * shape[1] + 1) // 2:
        return f"the base weight holds {weight.numel() * weight.element_size()} bytes (sharded?)"
    if not weight.is_contiguous():
        return "the packed base weight is not contiguous"
    if state.quant_type not in QUANT_TYPES:
        return f"the base weight is quantised as {state.quant_type}"
    inner = getattr(state, "state2", None)
    if inner is not None and inner.blocksize != NESTED_BLOCKSIZE:
        return f"the nested absmax has blocksize {inner.blocksize}, not {NESTED_BLOCKSIZE}"
    return None


def _shape_reason(role: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
    return f"{role} has shape {tuple(tensor.shape)}, not {shape} (sharded?)"


# ---- dtypes, devices, backend ----------------------------------------------------------------


def casts(
    parts: Parts, x_dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None
) -> Casts | str:
    """The dtypes of a call that has x in `x_dtype` on `device`, or why PEFT's own code has to run.

    PEFT's policy. Dense: x and the base weight share a dtype, which autocast replaces by its own
    for all operands, the weight's in a copy made at each call. 4-bit: the base product is done in
    `compute_dtype` and y comes back in x's dtype, under autocast too, which takes the place of an
    fp32 `compute_dtype`. Adapters are read in their own dtype, or in autocast's. Where that is
    neither x's nor fp32, they are read in fp32: PEFT rounds x to the adapter's dtype instead, which
    costs a copy of x and is no more exact.

    Args:
        autocast: the dtype of the autocast region around the call, None outside.
    """
    if x_dtype not in SUPPORTED_DTYPES:
        return f"x is in {_name(x_dtype)}; fastlora takes fp32, bf16 and fp16"
    weight, bias = parts.weight, parts.bias
    dtypes = {adapter.lora_A.dtype for adapter in parts.adapters} or {x_dtype}
    for dtype in dtypes:
        if dtype not in SUPPORTED_DTYPES:
            return f"the adapter is in {_name(dtype)}; fastlora takes fp32, bf16 and fp16"
    compute = None
    if parts.quant_state is None:
        x_cast = autocast or x_dtype
        if weight.dtype != x_cast:
            if autocast is None:
                return f"x is in {_name(x_dtype)} and the base weight in {_name(weight.dtype)}"
            if weight.dtype not in SUPPORTED_DTYPES:
                return f"the base weight is in {_name(weight.dtype)}"
            compute = autocast
        if bias is not None and bias.dtype != x_cast and autocast is None:
            return f"x is in {_name(x_dtype)} and the bias in {_name(bias.dtype)}"
        narrow = autocast
    else:
        x_cast = x_dtype
        compute = bnb.compute_dtype(parts.base, x_dtype)
        if compute not in SUPPORTED_DTYPES:
            return f"compute_dtype is {_name(compute)}; fastlora takes fp32, bf16 and fp16"
        if autocast is not None and compute == torch.float32:
            compute = autocast
        if autocast is not None and compute != autocast:
            return (
                f"compute_dtype is {_name(compute)} under autocast to {_name(autocast)}; set "
                "bnb_4bit_compute_dtype to autocast's dtype"
            )
        if autocast is not None and x_dtype not in (autocast, torch.float32):
            return f"x is in {_name(x_dtype)} under autocast to {_name(autocast)}"
        narrow = autocast if autocast == x_dtype else None
    adapter = narrow or (x_cast if dtypes == {x_cast} else torch.float32)

    tensors: list[Tensor | None] = [weight, bias]
    for one in parts.adapters:
        tensors += [one.lora_A, one.lora_B, one.bias, one.magnitude]
    if parts.quant_state is not None:
        tensors.append(parts.quant_state.absmax)
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            return f"x is on {device} and the layer, or a part of it, on {tensor.device}"
    reason = backend_reason(
        parts.op, device, dtype=x_cast, adapter_dtype=adapter, compute_dtype=compute
    )
    return Casts(x_cast, adapter, compute) if reason is None else reason


def backend_reason(op: str, device: torch.device, **what: torch.dtype | None) -> str | None:
    """Why no backend is worth taking. One that the user asked for runs, or says why it can't."""
    if forced_backend() is not None:
        return None
    reasons = []
    for name in DEVICE_ORDER.get(device.type, ()):
        # The reference defines the ops; PEFT's own code is faster.
        if name == "reference":
            continue
        reason = BACKENDS[name].unsupported(op, device.type, index=device.index, **what)
        if reason is None:
            return None
        reasons.append(f"{name}: {reason}")
    return " ".join([f"no fast backend for {device.type}.", *reasons])


# ---- the call --------------------------------------------------------------------------------


def call_reason() -> str | None:
    """Why PEFT's code has to run in what surrounds the call (tracing, transforms), or None."""
    if torch.compiler.is_exporting() or is_tracing():
        return "torch.export or torch.jit.trace is recording a graph"
    if torch.compiler.is_compiling() and forced_backend() == "reference":
        return "torch.compile does not trace the reference"
    if torch._C._are_functorch_transforms_active():
        return "the call is inside a torch.func transform (vmap, grad, jvp)"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    return None


def plan(layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | str:
    """How to run `layer(x, *args, **kwargs)` on fastlora, or why PEFT's own code has to run."""
    if args:
        return "the call has further positional arguments"
    for key in kwargs:
        if key not in _PEFT_KWARGS:
            return f"the call passes {key}"
    if (reason := call_reason()) is not None:
        return reason
    rows = kwargs.get(_MIXED)
    parts = layer_parts(layer, rows)
    if isinstance(parts, str):
        return parts
    if type(x) not in PLAIN:
        return f"x is a {type(x).__name__}, a tensor subclass"
    if x.layout is not torch.strided or x.is_nested:
        return "x is not a plain strided tensor"
    _, K = parts.shape
    if x.dim() == 0 or x.shape[-1] != K:
        return f"x has shape {tuple(x.shape)}, the layer takes [..., {K}]"
    if rows is not None and (reason := _mixed_reason(parts, x, rows)) is not None:
        return reason
    invoked: tuple[int, ...] = ()
    if any(adapter.invoked for adapter in parts.adapters):
        found = _invoked_tokens(parts, x, kwargs.get(_OFFSETS))
        if isinstance(found, str):
            return found
        if found is not None:
            invoked = found
        else:
            everywhere = tuple(adapter._replace(invoked=False) for adapter in parts.adapters)
            parts = parts._replace(adapters=everywhere)
    device = x.device
    if device.type == "meta":
        return "x is on the meta device"
    enabled = torch.is_autocast_enabled(device.type)
    autocast = torch.get_autocast_dtype(device.type) if enabled else None
    dtypes = casts(parts, x.dtype, device, autocast)
    if isinstance(dtypes, str):
        return Unserved(dtypes)
    return Plan(parts, dtypes, rows, invoked)


def _invoked_tokens(parts: Parts, x: Tensor, offsets: Any) -> tuple[int, ...] | str | None:
    """How many tokens at the end of each row of x aLoRA's adapters serve; None when all of them.

    An offset of None or less than 1 invokes none of a row, and one beyond its length all of it. A
    call without offsets invokes nothing.
    """
    if x.dim() not in (2, 3):
        return f"aLoRA takes x [rows, tokens, {parts.shape[1]}], got {tuple(x.shape)}"
    if torch.compiler.is_compiling():
        return "torch.compile does not trace which tokens aLoRA serves"
    rows, length = x.shape[0], x.shape[1:-1].numel()
    if offsets is None:
        return (0,) * rows
    if not isinstance(offsets, list | tuple) or not all(
        o is None or type(o) is int for o in offsets
    ):
        return "alora_offsets is no list of ints and None"
    if len(offsets) != rows:
        return f"alora_offsets has {len(offsets)} entries for an x of shape {tuple(x.shape)}"
    invoked = tuple(0 if o is None else max(0, min(o, length)) for o in offsets)
    return None if all(count == length for count in invoked) else invoked


def _mixed_reason(parts: Parts, x: Tensor, rows: Sequence[str]) -> str | None:
    """Why a batch with an adapter for each row has to run PEFT's code, or fail there."""
    if x.dim() < 2 or len(x) != len(rows):
        return f"adapter_names has {len(rows)} names for an x of shape {tuple(x.shape)}"
    if any(adapter.magnitude is not None for adapter in parts.adapters):
        return "the call passes adapter_names for a DoRA adapter, which PEFT refuses"
    if any(adapter.drops for adapter in parts.adapters):
        return "the call passes adapter_names with dropout in training"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward_or_stock(
    layer: nn.Module,
    stock: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """One forward of a fast layer: the plan if the fast path holds, else `stock`, PEFT's forward.

    A compiled forward runs each layer alone. The reason of the latest call is kept in the layer's
    `__dict__`, for `explain`.
    """
    found = plan(layer, x, args, kwargs)
    record(layer, found if isinstance(found, str) else "")
    if isinstance(found, str):
        return stock(x, *args, **kwargs)
    shared = None if torch.compiler.is_compiling() else layer.__dict__.get(SHARED)
    return found.run(x) if shared is None else shared.run(layer, found, x)


def record(layer: nn.Module, reason: str) -> None:
    """Keeps why the latest call ran PEFT's code, and warns of what the user did not ask for."""
    if torch.compiler.is_compiling():
        return
    if isinstance(reason, Unserved) and layer.__dict__.get(LAST_REASON) != reason:
        # Python shows one and the same warning once, however many layers give it.
        warnings.warn(f"LoRA layers run on PEFT's own code: {reason}", stacklevel=1)
    layer.__dict__[LAST_REASON] = str(reason)
