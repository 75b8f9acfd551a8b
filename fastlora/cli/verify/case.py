"""One layer whose results are checked: its inputs, and who computes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import ops, reference
from ...backends.machine.tuned import op_key
from ...layer import Layer, Needs
from ...quant import FORMATS
from ...reference import plain
from ...tolerance import exceeds

# x, adapter and, for a 4-bit weight, compute dtype: the combinations that PEFT makes.
DTYPES = {
    "fp32": (("float32", "float32", None),),
    "bf16": (("bfloat16", "float32", None), ("bfloat16", "bfloat16", None)),
    "fp16": (("float16", "float32", None), ("float16", "float16", None)),
    "fp32 in bf16": (("float32", "float32", "bfloat16"),),
}
_SCALING = 1.5
_NEEDS = Needs(True, True, True, True)
_RESULTS = ("y", "S", "dx", "dA", "dB", "dbias")
_ENOUGH_ELEMENTS = 256


@dataclass(frozen=True)
class Base:
    """The frozen weight: dense, or 4-bit with plain or nested absmax."""

    quant_type: str | None
    nested: bool = False

    def fit(self, size: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """M, N, K and R, K rounded up to what the format can store."""
        M, N, K, R = size
        fmt = FORMATS.get(self.quant_type or "")
        if fmt is not None and fmt.whole_rows:
            K = -(-K // fmt.blocksize) * fmt.blocksize
        return M, N, K, R

    @property
    def forward(self) -> str:
        """How the table names the op of a layer's forward."""
        return op_key("lora_linear_fwd", self.quant_type is not None)

    def __str__(self) -> str:
        if self.quant_type is None:
            return "dense"
        return f"{self.quant_type} nested" if self.nested else self.quant_type


BASES = (
    Base(None),
    *(
        Base(name, nested)
        for name, fmt in FORMATS.items()
        for nested in ((False, True) if fmt.nests else (False,))
    ),
)


@dataclass(frozen=True)
class Case:
    """The forward and the backward of one layer, in one size."""

    base: Base
    names: tuple[str, str, str | None]
    size: tuple[int, int, int, int]
    dropout: float
    column: str
    device: str

    def __str__(self) -> str:
        dtypes = "/".join(name for name in self.names if name)
        sizes = " ".join(f"{n}={v}" for n, v in zip("MNKR", self.size, strict=True))
        return f"{dtypes}, {sizes}, dropout {self.dropout:g}"

    def ratios(self, backends: Sequence[str]) -> Iterator[tuple[str, str, str, float]]:
        """(backend, op, result, error over bound) of every result of the forward and the backward.

        Twice the error of plain torch is a statement about many errors: small results are drawn
        again until there are enough of them.
        """
        M, _, _, R = self.size
        draws = [_Inputs.draw(self, seed) for seed in range(-(-_ENOUGH_ELEMENTS // (M * R)))]

        def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.stack([r[name] for r in results]) for name in _RESULTS}

        exact = joined([draw.exact() for draw in draws])
        base = joined([draw.plain() for draw in draws])
        for backend in backends:
            for name, out in joined([draw.run(backend) for draw in draws]).items():
                report = exceeds(out, exact[name], base[name])
                forward = self.base.forward
                op = forward.replace("fwd", "bwd") if name.startswith("d") else forward
                yield backend, op, name, max(report.max_ratio, report.rms_ratio)


@dataclass(frozen=True)
class _Inputs:
    """One draw of a case's inputs."""

    dropout: float
    x: Tensor
    weight: Tensor
    state: Any
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    seed: Tensor
    compute_dtype: torch.dtype | None

    @classmethod
    def draw(cls, case: Case, seed: int) -> _Inputs:
        """Random inputs. B is not zero: it would hide A's gradient."""
        x_dtype, adapter_dtype = getattr(torch, case.names[0]), getattr(torch, case.names[1])
        M, N, K, R = case.size
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(case.device)

        weight, state = normal(N, K).mul(K**-0.5).to(x_dtype), None
        if case.base.quant_type is not None:
            weight, state = reference.quantize_4bit(
                weight, None, case.base.quant_type, case.base.nested
            )
        return cls(
            dropout=case.dropout,
            x=normal(M, K).to(x_dtype),
            weight=weight,
            state=state,
            bias=normal(N).to(x_dtype),
            lora_A=normal(R, K).mul(K**-0.5).to(adapter_dtype),
            lora_B=normal(N, R).mul(R**-0.5).to(adapter_dtype),
            dy=normal(M, N).to(x_dtype),
            seed=torch.tensor([seed], device=case.device),
            compute_dtype=getattr(torch, case.names[2]) if case.names[2] else None,
        )

    @property
    def layer(self) -> Layer:
        """The inputs but x and dy."""
        return Layer(
            self.weight,
            self.lora_A,
            self.lora_B,
            _SCALING,
            self.bias,
            self.state,
            self.compute_dtype,
            self.dropout,
            self.seed,
        )

    def run(self, backend: str) -> dict[str, Tensor]:
        """The ops of `backend`."""
        y, S = ops.lora_linear_fwd(self.x, self.layer, backend=backend)
        grads = ops.lora_linear_bwd(self.dy, self.x, self.layer, S, _NEEDS, backend=backend)
        return _by_name(y, S, *grads)

    def exact(self) -> dict[str, Tensor]:
        """The reference in float64, with a 4-bit W decoded to the dtype that it is used in."""
        weight, x, bias, A, B, dy = (
            t.double() if t.is_floating_point() else t
            for t in (self.weight, self.x, self.bias, self.lora_A, self.lora_B, self.dy)
        )
        dtype = None if self.state is None else self.compute_dtype or self.x.dtype
        layer = self.layer._replace(
            weight=weight, lora_A=A, lora_B=B, bias=bias, compute_dtype=dtype
        )
        y, S = reference.lora_linear_fwd(x, layer)
        grads = reference.lora_linear_bwd(dy, x, layer, S, _NEEDS)
        return _by_name(y, S, *grads)

    def plain(self) -> dict[str, Tensor]:
        """PEFT's own sequence of torch calls in the working dtypes, and autograd's gradients."""
        leaves = [t.clone().requires_grad_() for t in (self.x, self.lora_A, self.lora_B, self.bias)]
        x, A, B, bias = leaves
        layer = self.layer._replace(lora_A=A, lora_B=B, bias=bias)
        y = plain.lora_linear(x, layer)
        S = plain.shrink(x, layer)
        dx, dA, dB, dbias = torch.autograd.grad(y, leaves, self.dy)
        return _by_name(y.detach(), S.detach(), dx, dA, dB, dbias)


def _by_name(*tensors: Tensor | None) -> dict[str, Tensor]:
    return {n: t for n, t in zip(_RESULTS, tensors, strict=True) if t is not None}
