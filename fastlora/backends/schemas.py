"""The torch ops behind the kernels: one table of schemas and of fakes, which only give shapes.

The libraries `fastlora` (csrc/bindings), `fastlora_triton` and, in the tests, `fastlora_emulated`
are defined from this table; each brings its own implementations. `flatten` and `unflatten` are the
only places that know the order in which an op takes the fields of a layer. A schema has

    {LAYER}   the fields of one Layer           {LAYERS}  the same of several, as lists
    {PACKED}  a 4-bit weight and its state      {NEEDS}   which gradients to compute

and fakes and Python implementations get a Layer, a list of them, a Packed and a Needs for these. A
gradient that is not asked for is returned as an empty tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..layer import Grads, Layer, Needs
from ..quant import NESTED_BLOCKSIZE, QuantState


class Packed(NamedTuple):
    """A 4-bit weight as the ops take it.

    Args:
        data: uint8 [(N K + 1) // 2].
        absmax: fp32 [nblocks], or uint8 [nblocks] when nested.
        code: fp32 [16].
        nested_absmax, nested_code, nested_offset: of nested absmax, else None.
        blocksize: elements per absmax.
    """

    data: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    blocksize: int

    @property
    def nested_blocksize(self) -> int:
        """Blocks per nested absmax; 0 when absmax is not nested."""
        return 0 if self.nested_absmax is None else NESTED_BLOCKSIZE

    @property
    def in_words(self) -> bool:
        """True when the bytes can be read as whole int32 words."""
        return self.data.numel() % 4 == 0 and self.data.data_ptr() % 4 == 0

    @property
    def absmax_in_pairs(self) -> bool:
        """True when nested absmax can be read as whole int16."""
        return self.absmax.numel() % 2 == 0 and self.absmax.data_ptr() % 2 == 0


def packed(weight: Tensor, state: QuantState) -> Packed:
    """The bytes of a 4-bit weight with the fields of its state."""
    absmax, code, nested_absmax, nested_code, offset = state.tensors()
    assert absmax is not None and code is not None
    return Packed(weight, absmax, code, nested_absmax, nested_code, offset, state.blocksize)


_PACKED = (
    "Tensor weight, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, int blocksize"
)
_LAYER = (
    "Tensor weight, Tensor? absmax, Tensor? code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, int blocksize, ScalarType? compute_dtype, Tensor? bias, "
    "Tensor lora_A, Tensor lora_B, float scaling, float dropout_p, Tensor? seed"
)
# `tensors` has those of _LAYER for each layer, in its order; compute_dtype is one for all.
_LAYERS = (
    "Tensor?[] tensors, int[] blocksizes, ScalarType? compute_dtype, float[] scalings, "
    "float[] dropouts"
)
_NEEDS = "bool need_dx, bool need_dA, bool need_dB, bool need_dbias"
_NO_STATE = (None, None, None, None, None, 0)


def flatten(layer: Layer) -> tuple[Any, ...]:
    """The fields of a layer in the order of {LAYER}; offsets are a separate argument."""
    weight, A, B, scaling, bias, state, compute_dtype, dropout_p, seed, _ = layer
    stored = (weight, *_NO_STATE) if state is None else packed(weight, state)
    return *stored, compute_dtype, bias, A, B, scaling, dropout_p, seed


def unflatten(*fields: Any) -> Layer:
    """Undoes `flatten`, as far as an op reads a layer: the names of formats are lost."""
    weight, *stored, compute_dtype, bias, A, B, scaling, dropout_p, seed = fields
    absmax, code, nested_absmax, nested_code, offset, blocksize = stored
    state = state2 = None
    if absmax is not None:
        shape = torch.Size((*B.shape[:-1], A.shape[-1]))
        if nested_absmax is not None:
            state2 = QuantState(
                nested_absmax, absmax.shape, nested_code, torch.float32, NESTED_BLOCKSIZE, "dynamic"
            )
        dtype = compute_dtype or A.dtype
        state = QuantState(absmax, shape, code, dtype, blocksize, "", offset, state2)
    return Layer(weight, A, B, scaling, bias, state, compute_dtype, dropout_p, seed)


def flatten_all(layers: Sequence[Layer]) -> tuple[Any, ...]:
    """The fields of several layers in the order of {LAYERS}."""
    tensors: list[Tensor | None] = []
    blocksizes: list[int] = []
    for layer in layers:
        *stored, blocksize, _, bias, A, B, _, _, seed = flatten(layer)
        tensors += (*stored, bias, A, B, seed)
        blocksizes.append(blocksize)
    scalings, dropouts = [p.scaling for p in layers], [p.dropout_p for p in layers]
    return tensors, blocksizes, layers[0].compute_dtype, scalings, dropouts


def unflatten_all(
    tensors: Sequence[Tensor | None],
    blocksizes: Sequence[int],
    compute_dtype: torch.dtype | None,
    scalings: Sequence[float],
    dropouts: Sequence[float],
) -> list[Layer]:
    """Undoes `flatten_all`, as `unflatten` does `flatten`."""
    count = len(tensors) // len(scalings)
    layers = []
    for i, (blocksize, scaling, p) in enumerate(zip(blocksizes, scalings, dropouts, strict=True)):
        *stored, bias, A, B, seed = tensors[i * count : (i + 1) * count]
        layers.append(unflatten(*stored, blocksize, compute_dtype, bias, A, B, scaling, p, seed))
    return layers


# ---- fakes: shapes and dtypes of what the ops return --------------------------------------------


def _like(tensor: Tensor, *others: Any) -> Tensor:
    """A result with the shape and dtype of the op's first argument."""
    return tensor.new_empty(tensor.shape)


def _wanted(need: bool, tensor: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient beside `tensor`, in its dtype unless another is given; empty if not needed."""
    return tensor.new_empty(shape if need else (0,), dtype=dtype)


def _lora_linear_fwd(x: Tensor, layer: Layer, *offsets: Tensor) -> tuple[Tensor, Tensor]:
    M, A, B = x.shape[0], layer.lora_A, layer.lora_B
    return x.new_empty((M, B.shape[-2])), x.new_empty((M, A.shape[-2]), dtype=torch.float32)


def _lora_linear_bwd(
    dy: Tensor, x: Tensor | None, layer: Layer, *others: Any
) -> tuple[Tensor, ...]:
    return _gradients(dy, layer, others[-1])


def _gradients(dy: Tensor, layer: Layer, needs: Needs) -> tuple[Tensor, ...]:
    A, B = layer.lora_A, layer.lora_B
    dx = _wanted(needs.x, dy, dy.shape[0], A.shape[-1])
    dbias = _wanted(needs.bias, dy, B.shape[-2], dtype=torch.float32)
    return dx, _adapter_grad(A, needs.A), _adapter_grad(B, needs.B), dbias


def _adapter_grad(like: Tensor, need: bool) -> Tensor:
    return _wanted(need, like, *like.shape, dtype=like.dtype if need else torch.float32)


def _shared_linear_fwd(x: Tensor, layers: list[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [_lora_linear_fwd(x, layer) for layer in layers]
    return [y for y, _ in pairs], [S for _, S in pairs]


def _shared_linear_bwd(
    dys: list[Tensor],
    x: Tensor,
    layers: list[Layer],
    Ss: list[Tensor],
    need_dx: bool,
    needs: list[int],
) -> tuple[Tensor, list[Tensor]]:
    grads: list[Tensor] = []
    for i, layer in enumerate(layers):
        own = Needs(False, *map(bool, needs[3 * i : 3 * i + 3]))
        grads += _gradients(dys[i], layer, own)[1:]
    return _wanted(need_dx, x, *x.shape), grads


def _lora_embedding_fwd(ids: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return weight.new_empty((ids.shape[0], weight.shape[1]))


def _lora_embedding_bwd(
    dy: Tensor, ids: Tensor, lora_A: Tensor, lora_B: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    *_, need_dA, need_dB = others
    return _adapter_grad(lora_A, need_dA), _adapter_grad(lora_B, need_dB)


def _dora_norm(layer: Layer) -> Tensor:
    return layer.lora_B.new_empty((layer.lora_B.shape[0],), dtype=torch.float32)


def _dora_magnitude_bwd(dy: Tensor, z: Tensor, factor: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    dfactor, drest = (
        _wanted(need, factor, *factor.shape, dtype=torch.float32) for need in needs[1:]
    )
    return _wanted(needs[0], z, *z.shape), dfactor, drest


def _dora_dropout_fwd(x: Tensor, dropout_p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


def _quantize_4bit(
    weight: Tensor, bounds: Tensor, order: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    data = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return data, weight.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32)


def _quantize_absmax(absmax: Tensor, offset: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    scales = -(-absmax.numel() // NESTED_BLOCKSIZE)
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(scales)


def _dequantize_4bit_out(weight: Packed, out: Tensor) -> None:
    return None


def _qlora_gemm_fwd(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    S: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], lora_B.shape[0]), dtype=dtype)


def _qlora_gemm_dx(
    dy: Tensor,
    weight: Packed,
    dS: Tensor,
    lora_A: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return dy.new_empty((dy.shape[0], lora_A.shape[1]), dtype=dtype)


def _shrink(x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], lora_A.shape[0]), dtype=torch.float32)


def _skinny_bwd(dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs) -> tuple[Tensor, ...]:
    dS = x.new_empty((x.shape[0], layer.lora_A.shape[0]), dtype=torch.float32)
    return dS, *_gradients(dy, layer, needs._replace(x=False))[1:]


class Op(NamedTuple):
    """A torch op: what it takes and returns, as a schema with the names in braces, and its fake."""

    takes: str
    returns: str
    fake: Callable[..., Any]


_FORWARD = "(Tensor y, Tensor S)"
_BACKWARD = "(Tensor dx, Tensor dA, Tensor dB, Tensor dbias)"
OPS = {
    "lora_linear_fwd": Op("Tensor x, {LAYER}", _FORWARD, _lora_linear_fwd),
    "lora_linear_bwd": Op(
        "Tensor dy, Tensor x, {LAYER}, Tensor S, {NEEDS}", _BACKWARD, _lora_linear_bwd
    ),
    "shared_linear_fwd": Op("Tensor x, {LAYERS}", "(Tensor[] ys, Tensor[] Ss)", _shared_linear_fwd),
    # `needs` has dA, dB and dbias of each layer, as 0 or 1; so have the gradients.
    "shared_linear_bwd": Op(
        "Tensor[] dys, Tensor x, {LAYERS}, Tensor[] Ss, bool need_dx, int[] needs",
        "(Tensor dx, Tensor[] grads)",
        _shared_linear_bwd,
    ),
    "grouped_lora_linear_fwd": Op("Tensor x, {LAYER}, Tensor offsets", _FORWARD, _lora_linear_fwd),
    "grouped_lora_linear_bwd": Op(
        "Tensor dy, Tensor? x, {LAYER}, Tensor offsets, Tensor? S, {NEEDS}",
        _BACKWARD,
        _lora_linear_bwd,
    ),
    "lora_embedding_fwd": Op(
        "Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
        "float weight_scale",
        "Tensor y",
        _lora_embedding_fwd,
    ),
    "lora_embedding_bwd": Op(
        "Tensor dy, Tensor ids, Tensor lora_A, Tensor lora_B, float scaling, int padding_idx, "
        "bool need_dA, bool need_dB",
        "(Tensor dA, Tensor dB)",
        _lora_embedding_bwd,
    ),
    "dora_norm": Op("{LAYER}", "Tensor norms", _dora_norm),
    "dora_magnitude_fwd": Op("Tensor z, Tensor factor, Tensor? rest", "Tensor y", _like),
    "dora_magnitude_bwd": Op(
        "Tensor dy, Tensor z, Tensor factor, bool need_dz, bool need_dfactor, bool need_drest",
        "(Tensor dz, Tensor dfactor, Tensor drest)",
        _dora_magnitude_bwd,
    ),
    "dora_dropout_fwd": Op(
        "Tensor x, float dropout_p, Tensor seed", "(Tensor kept, Tensor rest)", _dora_dropout_fwd
    ),
    "dora_dropout_bwd": Op(
        "Tensor dkept, Tensor drest, float dropout_p, Tensor seed", "Tensor dx", _like
    ),
    "quantize_4bit": Op(
        "Tensor weight, Tensor bounds, Tensor order, int blocksize",
        "(Tensor packed, Tensor absmax)",
        _quantize_4bit,
    ),
    "dequantize_4bit_out": Op("{PACKED}, Tensor(a!) out", "()", _dequantize_4bit_out),
    # The parts of a 4-bit layer on CUDA, from which backends/native/cuda.py composes the layer.
    "quantize_absmax": Op(
        "Tensor absmax, Tensor offset, Tensor code",
        "(Tensor absmax_8bit, Tensor nested_absmax)",
        _quantize_absmax,
    ),
    "qlora_gemm_fwd": Op(
        "Tensor x, {PACKED}, Tensor? bias, Tensor S, Tensor lora_B, float scaling, "
        "ScalarType dtype",
        "Tensor y",
        _qlora_gemm_fwd,
    ),
    "qlora_gemm_dx": Op(
        "Tensor dy, {PACKED}, Tensor dS, Tensor lora_A, float dropout_p, Tensor? seed, "
        "ScalarType dtype",
        "Tensor dx",
        _qlora_gemm_dx,
    ),
    "qlora_decode": Op("Tensor x, {LAYER}", _FORWARD, _lora_linear_fwd),
    # The parts of a layer without W, for products with W by other kernels.
    "shrink": Op("Tensor x, Tensor lora_A, float dropout_p, Tensor? seed", "Tensor S", _shrink),
    "skinny_bwd": Op(
        "Tensor dy, Tensor x, {LAYER}, Tensor S, {NEEDS}",
        "(Tensor dS, Tensor dA, Tensor dB, Tensor dbias)",
        _skinny_bwd,
    ),
}
CUDA_OPS = (
    "quantize_4bit", "dequantize_4bit_out", "quantize_absmax", "qlora_gemm_fwd", "qlora_gemm_dx",
    "qlora_decode",
)  # fmt: skip
TRITON_OPS = ("lora_linear_fwd", "lora_linear_bwd", "dequantize_4bit_out", "shrink", "skinny_bwd")
NATIVE_OPS = tuple(op for op in OPS if op not in ("shrink", "skinny_bwd"))

# The meaning of the names in braces: the arguments, and the function that rebuilds the object.
_GROUPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "{LAYER}": (_LAYER, unflatten),
    "{LAYERS}": (_LAYERS, unflatten_all),
    "{PACKED}": (_PACKED, Packed),
    "{NEEDS}": (_NEEDS, Needs),
}


def schema(op: str) -> str:
    """The op's schema, as torch takes it."""
    takes = OPS[op].takes
    for name, (arguments, _) in _GROUPS.items():
        takes = takes.replace(name, arguments)
    return f"{op}({takes}) -> {OPS[op].returns}"


def gathered(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which takes objects, as a function of the op's own, flat arguments."""
    pieces = re.split(r",\s*(?![^(]*\))", OPS[op].takes)
    plan = [(_GROUPS[p][1], _GROUPS[p][0].count(",") + 1) if p in _GROUPS else None for p in pieces]

    def call(*flat: Any) -> Any:
        arguments, place = [], 0
        for group in plan:
            if group is None:
                arguments.append(flat[place])
                place += 1
            else:
                build, count = group
                arguments.append(build(*flat[place : place + count]))
                place += count
        return function(*arguments)

    return call


def define(namespace: str, ops: Iterable[str]) -> torch.library.Library:
    """Defines `torch.ops.<namespace>.<op>` for each op, with its fake.

    Returns:
        The library, which the caller keeps: the ops are removed with it.
    """
    library = torch.library.Library(namespace, "FRAGMENT")
    for op in ops:
        library.define(schema(op))
        fake = _on_one_device(op, gathered(op, OPS[op].fake))
        torch.library.register_fake(f"{namespace}::{op}", fake, lib=library)
    return library


def _on_one_device(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which torch also calls for a mixture of meta and real tensors: for an error then."""

    def call(*flat: Any) -> Any:
        devices = {t.device for t in tree_leaves(flat) if isinstance(t, Tensor)}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{op}: all tensors must be on one device, got {names}")
        return fake(*flat)

    return call


def filled(grads: Grads, x: Tensor) -> tuple[Tensor, ...]:
    """Gradients as an op returns them: an empty tensor for each that is None."""
    dtypes = (x.dtype, torch.float32, torch.float32, torch.float32)
    return tuple(
        x.new_empty((0,), dtype=dtype) if grad is None else grad
        for grad, dtype in zip(grads, dtypes, strict=True)
    )
