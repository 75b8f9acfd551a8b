"""One layer whose results are checked: its inputs, and who computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ... import ops, reference
from ...backends.machine.tuned import op_key
from ...layer import Layer, Needs
from ...quant import FORMATS
from ...reference import plain
from ...tolerance import exceeds
from ..options import torch_dtype

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
        draws = [self._draw(seed) for seed in range(-(-_ENOUGH_ELEMENTS // (M * R)))]

        def joined(compute: Callable[..., Iterable[Tensor | None]]) -> dict[str, Tensor]:
            results = zip(*(compute(*draw) for draw in draws), strict=True)
            return {n: torch.stack(t) for n, t in zip(_RESULTS, results, strict=True)}

        exact, base = joined(_exact), joined(_plain)
        for backend in backends:
            for name, out in joined(partial(_run, backend)).items():
                report = exceeds(out, exact[name], base[name])
                forward = self.base.forward
                op = forward.replace("fwd", "bwd") if name.startswith("d") else forward
                yield backend, op, name, max(report.max_ratio, report.rms_ratio)

    def _draw(self, seed: int) -> tuple[Tensor, Tensor, Layer]:
        """x, dy and the layer, random. B is not zero: it would hide A's gradient."""
        x_dtype, adapter_dtype, compute_dtype = (
            None if name is None else torch_dtype(name) for name in self.names
        )
        M, N, K, R = self.size
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device)

        weight, state = normal(N, K).mul(K**-0.5).to(x_dtype), None
        if self.base.quant_type is not None:
            weight, state = reference.quantize_4bit(
                weight, None, self.base.quant_type, self.base.nested
            )
        x, bias = normal(M, K).to(x_dtype), normal(N).to(x_dtype)
        layer = Layer(
            weight,
            normal(R, K).mul(K**-0.5).to(adapter_dtype),
            normal(N, R).mul(R**-0.5).to(adapter_dtype),
            _SCALING,
            bias,
            state,
            compute_dtype,
            self.dropout,
            torch.tensor([seed], device=self.device),
        )
        return x, normal(M, N).to(x_dtype), layer


def _run(backend: str, x: Tensor, dy: Tensor, layer: Layer) -> Iterable[Tensor | None]:
    """The ops of `backend`."""
    y, S = ops.lora_linear_fwd(x, layer, backend=backend)
    return y, S, *ops.lora_linear_bwd(dy, x, layer, S, _NEEDS, backend=backend)


def _exact(x: Tensor, dy: Tensor, layer: Layer) -> Iterable[Tensor | None]:
    """The reference in float64, with a 4-bit W decoded to the dtype that it is used in."""
    wide = plain.widened(layer)
    if layer.quant_state is not None:
        # The reference rounds x and bias to that dtype, too.
        wide = wide._replace(
            weight=layer.weight,
            quant_state=layer.quant_state,
            compute_dtype=layer.compute_dtype or x.dtype,
        )
    y, S = reference.lora_linear_fwd(x.double(), wide)
    return y, S, *reference.lora_linear_bwd(dy.double(), x.double(), wide, S, _NEEDS)


def _plain(x: Tensor, dy: Tensor, layer: Layer) -> Iterable[Tensor | None]:
    """PEFT's own sequence of torch calls in the working dtypes, and autograd's gradients."""
    assert layer.bias is not None
    leaves = [t.clone().requires_grad_() for t in (x, layer.lora_A, layer.lora_B, layer.bias)]
    x, A, B, bias = leaves
    layer = layer._replace(lora_A=A, lora_B=B, bias=bias)
    y, S = plain.lora_linear(x, layer), plain.shrink(x, layer)
    return y.detach(), S.detach(), *torch.autograd.grad(y, leaves, dy)
