"""PEFT's LoRA on an embedding: when fastlora's op serves a call."""

from __future__ import annotations

import ast
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....backends.contract import Request
from ..syntax import source_tree
from .casts import backend_reason
from .plain import (
    NONE_ACTIVE,
    PLAIN,
    dtype_reason,
    hidden_reason,
    modules_reason,
    scaling_reason,
    state_reason,
    tensors_reason,
    variant_of,
)
from .reasons import Unserved, call_reason

OP = "lora_embedding_fwd"
# Forwards of scaled embeddings, Gemma's and Bart's, and whether the scale is rounded to the table's
# dtype. `embed_scale` is a tensor or a number.
_SCALED = {
    "super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)": True,
    "super().forward(input_ids) * self.embed_scale": False,
}
# Those of PEFT's variants that change nothing in the forward.
_PLAIN_VARIANTS = ("MiCAEmbeddingVariant",)


class EmbeddingParts(NamedTuple):
    """What the fast path reads from a layer: a table `[V, N]`, A `[R, V]` and B `[N, R]`.

    A and B are read in fp32 unless they have the table's own dtype.
    """

    base: nn.Embedding
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    rounds_scale: bool | None  # of a scaled embedding, else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which A and B are read."""
        same = self.lora_A.dtype == self.weight.dtype
        return self.lora_A.dtype if same else torch.float32

    @property
    def request(self) -> Request:
        """What the layer asks a backend for."""
        device = self.weight.device
        return Request(OP, device.type, device.index, self.weight.dtype, self.dtype)


def embedding_parts(layer: Any) -> EmbeddingParts | str:
    """The tensors that the fast path reads, or why PEFT's code has to run whatever the input."""
    if (reason := state_reason(layer)) is not None:
        return reason
    state, children = layer.__dict__, layer._modules
    As, Bs = (children[f"lora_embedding_{x}"]._parameters for x in "AB")
    names = [name for name in layer.active_adapters if name in As]
    if not names:
        return NONE_ACTIVE
    if len(names) > 1:
        return "several adapters are active on an embedding"
    name, base = names[0], children["base_layer"]
    variant = variant_of(layer, name)
    if variant and variant not in _PLAIN_VARIANTS:
        return f"the adapter is a LoRA variant ({variant})"
    if state.get("input_fns", {}).get(name) or state.get("output_fns", {}).get(name):
        return "the embedding is sharded (tensor parallel)"
    rounds_scale = None
    if type(base) is not nn.Embedding:
        if torch.compiler.is_compiling():
            return "torch.compile can't read embed_scale"
        kind: Any = type(base)
        alone = kind.__bases__ == (nn.Embedding,)
        rounds_scale = _SCALED.get(_returned(kind.forward)) if alone else None
        if not isinstance(base, nn.Embedding) or rounds_scale is None:
            return f"the base layer is a {type(base).__name__}, not nn.Embedding or a scaled one"
        if (reason := _scale_reason(layer, base)) is not None:
            return reason
    elif hasattr(base, "embed_scale"):
        return "the base layer has an embed_scale that its forward does not apply"
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(base, option):
            return f"the base layer has {option}, which fastlora's op has not"
    if (reason := modules_reason([("the base layer", base)])) is not None:
        return reason
    weight, A, B = base._parameters.get("weight"), As[name], Bs[name]
    if weight is None or A is None or B is None:
        return "a weight is no parameter of its layer (parametrised or pruned)"
    if (reason := hidden_reason([("the base layer", base)])) is not None:
        return reason
    tensors = [("base weight", weight), ("lora_A", A), ("lora_B", B)]
    if (reason := tensors_reason(tensors)) is not None:
        return reason
    if weight.requires_grad:
        return "the base weight is being trained (requires_grad); fastlora needs it frozen"
    (V, N), R = weight.shape, A.shape[0]
    if A.shape != (R, V) or B.shape != (N, R):
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        return f"lora_A and lora_B have the shapes {shapes}, not {(R, V)} and {(N, R)} (sharded?)"
    scaling = state["scaling"][name]
    if (reason := scaling_reason(scaling)) is not None:
        return reason
    return EmbeddingParts(base, weight, A, B, float(scaling), rounds_scale)


def embedding_casts(parts: EmbeddingParts, device: torch.device) -> str | None:
    """Why dtypes, devices or backends send a call to PEFT's own code, or None."""
    if parts.lora_A.dtype != parts.lora_B.dtype:
        return f"lora_A is in {parts.lora_A.dtype} and lora_B in {parts.lora_B.dtype}"
    for role, tensor in (("table", parts.weight), ("adapter", parts.lora_A), ("", parts.lora_B)):
        if (reason := dtype_reason(f"the {role}", tensor.dtype)) is not None:
            return reason
        if tensor.device != device:
            return f"the ids are on {device} and the layer, or a part of it, on {tensor.device}"
    return backend_reason(parts.request)


def embedding_plan(
    layer: nn.Module, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> EmbeddingParts | str:
    """How to run `layer(ids, *args, **kwargs)` on fastlora, or why PEFT's own code has to run."""
    if args:
        return "the call has further positional arguments"
    for key, value in kwargs.items():
        # aLoRA has no variant for embeddings: PEFT's code drops its offsets.
        if value is not None and key != "alora_offsets":
            return f"the call passes {key}"
    if (reason := call_reason()) is not None:
        return reason
    parts = embedding_parts(layer)
    if isinstance(parts, str):
        return parts
    if type(ids) not in PLAIN or ids.layout is not torch.strided or ids.is_nested:
        return f"the ids are a {type(ids).__name__}, not a plain strided tensor"
    if ids.dtype not in (torch.int64, torch.int32):
        return f"the ids are in {ids.dtype}"
    if ids.is_meta:
        return "the ids are on the meta device"
    reason = embedding_casts(parts, ids.device)
    return parts if reason is None else Unserved(reason)


def _scale_reason(layer: Any, base: nn.Module) -> str | None:
    scale: Any = getattr(base, "embed_scale", None)
    if not hasattr(layer, "_get_embed_scale"):
        return "this PEFT does not apply embed_scale to the adapter"
    if isinstance(scale, Tensor):
        return None if scale.dim() == 0 and not scale.requires_grad else "embed_scale is no number"
    return None if isinstance(scale, float | int) else f"embed_scale is a {type(scale).__name__}"


@functools.cache
def _returned(forward: Any) -> str:
    """What a forward returns, as source, if that is all it does; "" for all others."""
    function = source_tree(forward)
    if function is None or len(function.body) != 1:
        return ""
    returned = function.body[0]
    if not isinstance(returned, ast.Return) or returned.value is None:
        return ""
    return ast.unparse(returned.value)
