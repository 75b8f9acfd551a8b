"""The named cases that every op is tested with, and their inputs.

Each case says which code path it hits. B is never zero: with B = 0 the LoRA term and dA vanish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlora import ops, reference
from fastlora.layer import Layer, Needs
from fastlora.quant import FORMATS, QuantState
from fastlora.reference import plain


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    name: str
    M: int
    N: int
    K: int
    R: int
    dropout_p: float = 0.0
    bias: bool = True
    strided: bool = False  # x and dy are column slices of wider tensors

    def __str__(self) -> str:
        return self.name


# A panel is 64 tokens or columns (AVX-512), 16 (AVX2) or 8 wide; a chunk of W has 48 or 96 rows; a
# strip of dx has 128 or 256 columns; decoding serves up to 8 tokens; a sum runs over 64 terms.
CASES = (
    Case("no tokens", 0, 48, 64, 4, dropout_p=0.1),
    Case("one token", 1, 96, 128, 16),
    Case("one token, odd sizes", 1, 131, 65, 3, dropout_p=0.2),
    Case("three tokens, half a chunk of 128", 3, 70, 192, 8, dropout_p=0.05),
    Case("eight tokens, rows left over", 8, 133, 576, 16, bias=False),
    Case("first size past decoding", 9, 64, 128, 8, dropout_p=0.5),
    Case("17 tokens, rank 1, nothing a multiple", 17, 33, 35, 1, dropout_p=0.1),
    Case("all sizes whole tiles", 64, 96, 256, 16),
    Case("two panels, one token in the second", 65, 130, 96, 8, dropout_p=0.1, bias=False),
    Case("129 tokens, odd N and K", 129, 101, 131, 3, dropout_p=0.3),
    Case("many tokens, K past a strip", 300, 150, 1088, 16, dropout_p=0.05),
    Case("tokens past a gradient block", 550, 65, 160, 4, dropout_p=0.05),
    Case("K past one partial sum of S", 20, 40, 2112, 16, dropout_p=0.1),
    Case("rank 64", 70, 96, 128, 64, dropout_p=0.1),
    Case("rank 256, above N", 33, 80, 192, 256),
    Case("strided rows", 40, 64, 96, 8, dropout_p=0.1, strided=True),
    Case("everything dropped", 12, 32, 64, 4, dropout_p=1.0),
)

# x, adapter and compute dtype, as PEFT combines them.
DTYPES = {
    "fp32": (torch.float32, torch.float32, None),
    "bf16, fp32 adapter": (torch.bfloat16, torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "fp16, fp32 adapter": (torch.float16, torch.float32, None),
    "fp16": (torch.float16, torch.float16, None),
    "fp32 computed in bf16": (torch.float32, torch.float32, torch.bfloat16),
    "bf16 computed in fp32": (torch.bfloat16, torch.float32, torch.float32),
}


@dataclass(frozen=True)
class Base:
    """How the frozen weight is stored."""

    quant_type: str | None = None
    blocksize: int = 64
    nested: bool = False
    transposed: bool = False  # dense, stored [K, N]

    def __str__(self) -> str:
        if self.quant_type is None:
            return "dense, transposed" if self.transposed else "dense"
        return f"{self.quant_type}-{self.blocksize}{'-nested' if self.nested else ''}"

    def fit(self, case: Any) -> Any:
        """The case, K rounded up to what the format can store."""
        fmt = FORMATS.get(self.quant_type or "")
        if fmt is None or not fmt.whole_rows:
            return case
        return replace(case, K=-(-case.K // self.blocksize) * self.blocksize)


BASES = (
    Base(),
    Base(transposed=True),
    Base("nf4", 64, nested=True),
    Base("nf4", 64),
    Base("nf4", 32, nested=True),
    Base("nf4", 256),
    Base("fp4", 128, nested=True),
    Base("mxfp4", 32),
)
FOUR_BIT = tuple(base for base in BASES if base.quant_type is not None)


def is_refused(base: Base, dtypes: str) -> bool:
    """Whether the ops refuse the dtypes for a base: a dense weight may only be narrower than x."""
    x, _, compute = DTYPES[dtypes]
    return base.quant_type is None and compute is not None and x != torch.float32


@dataclass
class Inputs:
    """Tensors of one call; `weight` is packed where `quant_state` is given."""

    x: Tensor
    weight: Tensor
    quant_state: QuantState | None
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    seed: Tensor
    scaling: float
    compute_dtype: torch.dtype | None
    dropout_p: float = 0.0

    @property
    def layer(self) -> Layer:
        """The layer that the call is of."""
        return Layer(
            self.weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.bias,
            self.quant_state,
            self.compute_dtype,
            self.dropout_p,
            self.seed,
        )

    def exact_weight(self) -> Tensor:
        """W in fp64: the dense values, or code * absmax as the fp32 product that defines it."""
        if self.quant_state is None:
            return self.weight.double()
        return reference.dequantize_4bit(self.weight, self.quant_state, torch.float64)


def make_inputs(case: Case, base: Base, dtypes: tuple[Any, Any, Any]) -> Inputs:
    """Random inputs with activations, weights and gradients of a trained layer's magnitudes."""
    x_dtype, adapter_dtype, compute_dtype = dtypes
    M, N, K, R = case.M, case.N, case.K, case.R
    pad = 5 if case.strided else 0
    x = torch.randn(M, K + pad).to(x_dtype)[:, :K]
    dy = torch.randn(M, N + pad).to(x_dtype)[:, :N]
    weight = torch.randn(N, K) * K**-0.5
    state = None
    if base.quant_type is None:
        weight = weight.to(compute_dtype or x_dtype)
        if base.transposed:
            weight = weight.T.contiguous().T
    else:
        weight, state = reference.quantize_4bit(
            weight, base.blocksize, base.quant_type, base.nested
        )
    return Inputs(
        x=x,
        weight=weight,
        quant_state=state,
        bias=torch.randn(N).to(x_dtype) if case.bias else None,
        lora_A=(torch.randn(R, K) * K**-0.5).to(adapter_dtype),
        lora_B=(torch.randn(N, R) * R**-0.5).to(adapter_dtype),
        dy=dy,
        seed=torch.tensor([0x1234_5678_9ABC_DEF]),
        scaling=1.5,
        compute_dtype=compute_dtype,
        dropout_p=case.dropout_p,
    )


@dataclass
class Results:
    """Output and gradients of one call."""

    y: Tensor
    dx: Tensor | None
    dA: Tensor | None
    dB: Tensor | None
    dbias: Tensor | None

    def items(self) -> list[tuple[str, Tensor | None]]:
        """Name and tensor of each result."""
        return list(vars(self).items())


EVERYTHING = Needs(bias=True)


def run(case: Case, inputs: Inputs, backend: str, needs: Needs = EVERYTHING) -> Results:
    """The op's forward and backward on a backend."""
    layer = inputs.layer._replace(dropout_p=case.dropout_p)
    y, S = ops.lora_linear_fwd(inputs.x, layer, backend=backend)
    grads = ops.lora_linear_bwd(inputs.dy, inputs.x, layer, S, needs, backend=backend)
    return Results(y, *grads)


def exact_results(case: Case, inputs: Inputs) -> Results:
    """The definition in float64 on the same, already rounded inputs."""
    layer = plain.widened(inputs.layer._replace(dropout_p=case.dropout_p))
    x, dy = inputs.x.double(), inputs.dy.double()
    y, S = reference.lora_linear_fwd(x, layer)
    return Results(y, *reference.lora_linear_bwd(dy, x, layer, S, Needs(bias=True)))


def plain_results(case: Case, inputs: Inputs) -> Results:
    """PEFT's own sequence of torch ops in the working dtypes, under torch's autograd."""
    layer = inputs.layer._replace(dropout_p=case.dropout_p)
    return autograd_results(plain.lora_linear, inputs.x, layer, inputs.dy)


def autograd_results(
    function: Callable[[Tensor, Layer], Tensor], x: Tensor, layer: Layer, dy: Tensor
) -> Results:
    """`function(x, layer)` on fresh leaves, and torch's gradients for dy."""
    x, A, B = (t.detach().clone().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    y = function(x, layer._replace(lora_A=A, lora_B=B, bias=bias))
    y.backward(dy.to(y.dtype))
    return Results(y.detach(), x.grad, A.grad, B.grad, None if bias is None else bias.grad)
