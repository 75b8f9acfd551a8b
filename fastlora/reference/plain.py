"""PEFT's own sequence of torch ops: the `base` of the error policy in `fastlora.tolerance`.

Tests, `fastlora verify`, `fastlora bench` and `fastlora tune` all measure plain torch with these
functions. They do what PEFT 0.21 does, op by op, with fastlora's dropout mask; gradients are torch
autograd's. On a layer in float64 (`widened`) they return exact results.

PEFT casts x to lora_A's dtype for the adapter, and W's product has x's dtype. The two layers add
the adapter's term in different dtypes:

- `lora.Linear.forward` (tuners/lora/layer.py) adds in the wider of the two dtypes and rounds the
  sum: `result = result + lora_B(lora_A(dropout(x))) * scaling`, after the loop
  `result = result.to(torch_result_dtype)`.
- `lora.Linear4bit.forward` (tuners/lora/bnb.py) rounds the term before it adds:
  `output = output.to(expected_dtype)`, `result = result + output`.

Sizes: M tokens, N out_features, K in_features, R rank, E experts; x may have more dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from ..layer import Layer
from .dropout import dropout_mask, dropout_threshold
from .gated import activate
from .linear import dense_weight
from .quantize import dequantize_4bit


def lora_linear(
    x: Tensor, layer: Layer, *, factors: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """`y = x W^T + bias + scaling * (drop(x) A^T) B^T`, every product rounded.

    The sum is rounded once for a dense weight; for a 4-bit one the term is rounded before it.

    Args:
        x: [..., K], fp32, bf16 or fp16 (fp64 for exact results).
        layer: as the ops take it; no experts.
        factors: the factors of dropout, if not those of the layer's seed.
        weight: the decoded weight, if the caller has it.

    Returns:
        y [..., N] in x's dtype.
    """
    result = base_linear(x, layer, weight)
    return _added(result, lora_term(x, layer, factors), layer)


def base_linear(x: Tensor, layer: Layer, weight: Tensor | None = None) -> Tensor:
    """`x W^T + bias`, computed in W's dtype and rounded to x's.

    Source: bitsandbytes' `Linear4bit.forward`, which rounds x and bias to `compute_dtype`; W is
    decoded to that dtype.

    Args:
        x, layer, weight: as in `lora_linear`.
    """
    W = dense_weight(layer, x.dtype) if weight is None else weight
    bias = None if layer.bias is None else layer.bias.to(W.dtype)
    return linear(x.to(W.dtype), W, bias).to(x.dtype)


def lora_term(x: Tensor, layer: Layer, factors: Tensor | None = None) -> Tensor:
    """`scaling * (drop(x) A^T) B^T`, [..., N] in lora_A's dtype; arguments: see `lora_linear`."""
    return linear(shrink(x, layer, factors), layer.lora_B) * layer.scaling


def shrink(x: Tensor, layer: Layer, factors: Tensor | None = None) -> Tensor:
    """`S = drop(x) A^T`, [..., R] in lora_A's dtype; arguments: see `lora_linear`."""
    return linear(_dropped(x, layer, factors), layer.lora_A)


def dropout_factors(mask: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """`mask / (1 - p)`, by which dropout multiplies its input.

    On a CPU torch draws it in the dtype of the input, which rounds `1 / (1 - p)` to that dtype; on
    a GPU the factor is fp32 (ATen's native/Dropout.cpp and native/cuda/Dropout.cu).

    Args:
        mask: True where an element is kept.
        dropout_p: as given to `dropout_mask`.
        dtype: that of dropout's input: lora_A's.

    Returns:
        The mask's shape, in dtype; on a GPU in fp32 (fp64 for fp64).
    """
    _, scale = dropout_threshold(dropout_p)
    wide = mask.to(torch.promote_types(dtype, torch.float32)) * scale
    return wide if mask.is_cuda else wide.to(dtype)


def grouped_lora_linear(x: Tensor, layer: Layer) -> Tensor:
    """`lora_linear` with the weight and adapter of each row's expert; zeros for rows without one.

    PEFT's `ParamWrapper` adds `scaling * B A` to the stack of weights and rounds the sum to their
    dtype, whose error is larger. Experts are held to the smaller one, that of a layer for each.

    Args:
        x: [M, K], rows sorted by expert.
        layer: weight [E, N, K], lora_A [E, R, K], lora_B [E, N, R], and offsets. The dropout's mask
            is that of all of x.

    Returns:
        y [M, N] in x's dtype.
    """
    assert layer.offsets is not None
    W, factors = dense_weight(layer, x.dtype), _factors(x, layer)
    parts, begin = [], 0
    for e, end in enumerate(layer.offsets.tolist()):
        one = layer._replace(lora_A=layer.lora_A[e], lora_B=layer.lora_B[e])
        own = None if factors is None else factors[begin:end]
        parts.append(lora_linear(x[begin:end], one, factors=own, weight=W[e]))
        begin = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - begin, layer.lora_B.shape[1])])


def gated_mlp(x: Tensor, gate: Layer, up: Layer, down: Layer, activation: str) -> Tensor:
    """`down(act(gate(x)) * up(x))`, as in Transformers' `LlamaMLP`.

    Args:
        x: [..., K].
        gate, up, down: three layers; see `lora_linear`.
        activation: one of `gated.ACTIVATIONS`.
    """
    h = activate(lora_linear(x, gate), activation) * lora_linear(x, up)
    return lora_linear(h, down)


def dora_linear(x: Tensor, layer: Layer, factor: Tensor) -> Tensor:
    """`y = x W^T + bias + (factor - 1) * base + factor * (z A^T) B^T * scaling`.

    Without dropout z is x, and base is the layer's rounded result less its bias. With dropout z is
    drop(x), and `base = z W^T` is taken in lora_A's dtype, a 4-bit W being decoded to its own dtype
    first. The sum is rounded once, to x's dtype.

    Args:
        x, layer: as in `lora_linear`.
        factor: [N], magnitude / `dora_norm`.

    Source: PEFT's `DoraLinearVariant.forward` (tuners/lora/variants.py) and
    `DoraLinearLayer.forward` (tuners/lora/dora.py).
    """
    result = base_linear(x, layer)
    z = _dropped(x, layer, None)
    if layer.dropout_p > 0.0:
        W, state = layer.weight, layer.quant_state
        W = W if state is None else dequantize_4bit(W, state)
        base = linear(z, W.to(z.dtype))
    else:
        base = result if layer.bias is None else result - layer.bias
    lora = linear(linear(z, layer.lora_A), layer.lora_B)
    factor = factor.view(1, -1)
    return (result + ((factor - 1) * base + factor * lora * layer.scaling)).to(x.dtype)


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`norms[n] = |W_n + scaling * (B A)_n|`; PEFT's `DoraLinearLayer.get_weight_norm`.

    Args:
        weight: [N, K], in lora_A's dtype, to which PEFT casts it.
        lora_A, lora_B, scaling: [R, K], [N, R] and the factor of `B A`.

    Returns:
        norms [N] in weight's dtype.
    """
    return torch.linalg.norm(weight + scaling * (lora_B @ lora_A), dim=1).to(weight.dtype)


def dora_magnitude(z: Tensor, factor: Tensor, rest: Tensor | None = None) -> Tensor:
    """`y = factor * z + rest`, in the widest dtype as torch promotes them, then rounded to z's.

    PEFT has no such op: it is the part of `dora_linear` that fastlora's op of this name computes.

    Args:
        z, factor, rest: [M, N], [N], and [N], [M, N] or None.
    """
    y = factor.view(1, -1) * z
    return (y if rest is None else y + rest).to(z.dtype)


def dora_dropout(x: Tensor, dropout_p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`kept = mask * x`, `rest = x - drop(x)`, each in x's dtype.

    PEFT has no such op: these are the two inputs of W in fastlora's node for DoRA with dropout.

    Args:
        x: [M, K].
        dropout_p, seed: those of `dropout_mask`.
    """
    mask = dropout_mask(x.shape[0], x.shape[1], dropout_p, seed, x.device)
    _, scale = dropout_threshold(dropout_p)
    return torch.where(mask, x, 0.0), x - torch.where(mask, x * scale, 0.0)


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight_scale: float = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """`y[m] = weight_scale * weight[ids[m]] + scaling * A[:, ids[m]] B^T`, rounded after the sum.

    Args:
        ids: [M], int64.
        weight, lora_A, lora_B: [V, N], [R, V] and [N, R].
        scaling: factor of the LoRA term.
        weight_scale: factor of the table's rows.
        padding_idx: the id whose column of A gets no gradient.

    Returns:
        y [M, N] in weight's dtype.

    Source: PEFT's `lora.Embedding.forward` (tuners/lora/layer.py):
    `result = result + (after_A @ embedding_B) * scaling`, then `.to(torch_result_dtype)`.
    """
    result = embedding(ids, weight) * weight_scale
    after_A = embedding(ids, lora_A.T, padding_idx)
    return (result + (after_A @ lora_B.T) * scaling).to(result.dtype)


def widened(layer: Layer, decoded_to: torch.dtype = torch.float64) -> Layer:
    """The same layer in float64, for exact results; a 4-bit weight is decoded to `decoded_to`."""
    return layer._replace(
        weight=dense_weight(layer._replace(compute_dtype=None), decoded_to).double(),
        lora_A=layer.lora_A.double(),
        lora_B=layer.lora_B.double(),
        bias=None if layer.bias is None else layer.bias.double(),
        quant_state=None,
        compute_dtype=None,
    )


def _dropped(x: Tensor, layer: Layer, factors: Tensor | None) -> Tensor:
    """`drop(x)` in lora_A's dtype: PEFT casts before it drops."""
    x = x.to(layer.lora_A.dtype)
    if factors is None:
        factors = _factors(x, layer)
    return x if factors is None else (x * factors).to(x.dtype)


def _factors(x: Tensor, layer: Layer) -> Tensor | None:
    if layer.dropout_p == 0.0:
        return None
    if layer.seed is None:
        raise ValueError("seed must be an int64 tensor of one element when dropout_p > 0, got None")
    M, K = x.shape[:-1].numel(), x.shape[-1]
    mask = dropout_mask(M, K, layer.dropout_p, layer.seed, x.device).view(x.shape)
    return dropout_factors(mask, layer.dropout_p, layer.lora_A.dtype)


def _added(result: Tensor, term: Tensor, layer: Layer) -> Tensor:
    if layer.quant_state is not None:
        term = term.to(result.dtype)
    return (result + term).to(result.dtype)
