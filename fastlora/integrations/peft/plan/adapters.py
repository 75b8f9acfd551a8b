"""One adapter of a PEFT layer as `run` takes it, whichever variant of LoRA it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .call import Adapter
from .plain import PLAIN, scaling_reason, tensors_reason, variant_of

# PEFT's variants that differ from LoRA in their initial values and in what trains, not in forward.
_PLAIN_VARIANTS = ("MiCALinearVariant",)
# Those that compute their A or B from other tensors (KaSA: `diag * A`; BD-LoRA: diagonal blocks)
# and are LoRA from there on.
_KASA = "KasaLinearVariant"
_MADE_VARIANTS = (_KASA, "BdLoraLinearVariant")
# Activated LoRA, which serves the tokens from an invocation sequence on.
_INVOKED = "ALoraLinearVariant"


def plain_adapter(layer: Any, name: str, roles: list[tuple[str, nn.Module]]) -> Adapter | str:
    """One adapter, its modules added to `roles`; or why PEFT's code has to run."""
    state, children = layer.__dict__, layer._modules
    lora_A, lora_B = children["lora_A"]._modules[name], children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    kind, magnitude = variant_of(layer, name), None
    made = kind in _MADE_VARIANTS
    if kind == "DoraLinearVariant":
        magnitude = children["lora_magnitude_vector"]._modules[name]
        if type(magnitude).__name__ != "DoraLinearLayer":
            return f"the magnitude is a {type(magnitude).__name__}, not a DoraLinearLayer"
        roles.append(("the magnitude", magnitude))
    elif kind == "VeloraLinearVariant":
        # Without gradients it is plain LoRA.
        if layer.training and torch.is_grad_enabled():
            return "VeLoRA trains A on compressed activations, which fastlora does not make"
    elif kind not in ("", _INVOKED, *_MADE_VARIANTS, *_PLAIN_VARIANTS):
        return f"the adapter is a LoRA variant ({kind})"
    scaling = state["scaling"][name]
    if (reason := scaling_reason(scaling) or _dropout_reason(dropout)) is not None:
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
        if dropout.__dict__.get("p", 0.0) >= 1.0:
            return "DoRA with lora_dropout=1 has no scale for what is kept"
    roles += [("lora_A", lora_A), ("lora_B", lora_B), ("the dropout module", dropout)]
    A, B = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    if made:
        if (reason := tensors_reason([("lora_A", A), ("lora_B", B)])) is not None:
            return reason
        if _is_block_diagonal(lora_A):
            A = lora_A.weight_as_blockdiagonal_matrix()
        if _is_block_diagonal(lora_B):
            B = lora_B.weight_as_blockdiagonal_matrix()
        if kind == _KASA and A is not None:
            diagonal = _kasa_diagonal(layer, name)
            if isinstance(diagonal, str):
                return diagonal
            A = A * diagonal[:, None]
    vector = None if magnitude is None else magnitude._parameters["weight"]
    return Adapter(name, A, B, bias, dropout, scaling, vector, kind == _INVOKED, made)


def _kasa_diagonal(layer: Any, name: str) -> Tensor | str:
    """The diagonal by which KaSA multiplies A, or why PEFT's code has to run."""
    if name in layer.__dict__.get("_lora_kasa_truncation_deferred", ()):
        return "KaSA truncates the base weight in the first call after loading"
    diagonal: Tensor = layer._modules["lora_diag"]._parameters[name]
    reason = tensors_reason([("lora_diag", diagonal)])
    return diagonal if reason is None else reason


def _is_block_diagonal(part: nn.Module) -> bool:
    """True for the layer of BD-LoRA's A or B, which older PEFTs do not have."""
    return type(part).__name__ == "BlockDiagonalLinear"


def svd_adapter(layer: Any, name: str, roles: list[tuple[str, nn.Module]]) -> Adapter | str:
    """AdaLoRA's `scaling / (ranknum + 1e-5) * B (A * E)` as one adapter of A and B.

    Otherwise as `plain_adapter`. The factors go into A: ranknum is a tensor, and reading it would
    wait for a GPU.
    """
    children, scaling = layer._modules, layer.scaling[name]
    dropout = children["lora_dropout"]._modules[name]
    if (reason := scaling_reason(scaling) or _dropout_reason(dropout)) is not None:
        return reason
    roles.append(("the dropout module", dropout))
    A, B, E = (children[part]._parameters[name] for part in ("lora_A", "lora_B", "lora_E"))
    for role, tensor in (("lora_A", A), ("lora_E", E)):
        if type(tensor) not in PLAIN or tensor.is_meta:
            return f"the {role} is no plain tensor in memory"
    factor = scaling / (children["ranknum"]._parameters[name] + 1e-5)
    return Adapter(name, A * (E * factor), B, None, dropout, 1.0, None, made=True)


def _dropout_reason(dropout: nn.Module) -> str | None:
    if type(dropout) in (nn.Identity, nn.Dropout) and not dropout.__dict__.get("inplace"):
        return None
    return f"the dropout module is a {type(dropout).__name__}, not a plain nn.Dropout"
