"""What `fastlora tune` measures: an op's candidates, and the plain addmm sequence beside them.

The candidates are tiles of the Triton kernels, the vendor's product between them, and the native
backend's kernels for the same op where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ... import reference, tuning
from ...tolerance import exceeds
from .. import native, tuned
from ..native_cuda import state_args
from .kernels.base_product_4bit import fits
from .kernels.dequantize_4bit import Packed, dequantize_4bit
from .launch import Launcher, Sizes, choice_of, launcher, shape_key
from .lora_linear import lora_linear_bwd, lora_linear_fwd
from .qlora_linear import qlora_linear_bwd, qlora_linear_fwd
from .tiles import candidates

_SCALING = 1.5
# y and dx are compared on so many tokens: each row of them depends on its own token alone.
_ROWS = 64

Call = Callable[[], Any]
# The candidate that is no tile: the op on the native backend.
NATIVE: tuning.Choice = {"way": native.NAME}


@dataclass(frozen=True)
class Problem:
    """An op in one size.

    Args:
        op: "lora_linear_fwd", "lora_linear_bwd" or the two of a 4-bit base.
        sizes: M, N, K, R.
        dtype: of x and of the product.
        adapter_dtype: of A and B.
        dropout_p: on the adapter's input.
        quant_type, blocksize: of a 4-bit base, with nested absmax.
    """

    op: str
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    dropout_p: float = 0.1
    quant_type: str = "nf4"
    blocksize: int = 64

    @property
    def four_bit(self) -> bool:
        """True for a 4-bit base."""
        return self.op.startswith("q")

    @property
    def is_forward(self) -> bool:
        """True for the forward."""
        return self.op.endswith("fwd")

    def __str__(self) -> str:
        return f"{self.op} {shape_key(self.dtype, self.sizes)}"


class Trial:
    """A problem's tensors on a device, and the calls that are compared on them."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        M, N, K, R = problem.sizes
        self.problem = problem
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, by: int = 1, dtype: torch.dtype = problem.dtype) -> Tensor:
            values = torch.randn(*shape, generator=generator) * by**-0.5
            return values.to(device=device, dtype=dtype)

        self.x, self.dy = normal(M, K), normal(M, N)
        self.weight = normal(N, K, by=K)
        self.A = normal(R, K, by=K, dtype=problem.adapter_dtype)
        self.B = normal(N, R, by=R, dtype=problem.adapter_dtype)
        self.seed = torch.tensor([7], device=device)
        self.packed = self.quantised = None
        if problem.four_bit:
            data, state = self.quantised = reference.quantize_4bit(
                self.weight, problem.blocksize, problem.quant_type, True
            )
            self.packed = Packed(data.view(-1), *state_args(state))
            self.weight = reference.dequantize_4bit(data, state, problem.dtype)
        self.gpu = launcher(self.x)
        _, self.S = self._forward(self.gpu)

    def choices(self) -> list[tuning.Choice]:
        """What may run the op here: the vendor's product, the native backend, tiles that fit."""
        problem = self.problem
        M, _, K, R = problem.sizes
        if not problem.four_bit:
            tiles = candidates("base_product", self.gpu.arch, problem.dtype, M, R)
        elif self.packed is not None and fits(self.packed, K, problem.dtype):
            tiles = candidates("base_product_4bit", self.gpu.arch, problem.dtype, M, R)
        else:
            tiles = []
        others = [choice_of(None)]
        if self.quantised is not None and self._native_runs():
            others.append(NATIVE)
        return [*others, *map(choice_of, tiles)]

    def _native_runs(self) -> bool:
        problem, device = self.problem, self.x.device.type
        dtypes = {"dtype": problem.dtype, "adapter_dtype": problem.adapter_dtype}
        return native.unsupported(problem.op, device, **dtypes) is None

    def call(self, choice: tuning.Choice) -> Call:
        """The whole op with this choice."""
        if choice == NATIVE:
            return self._native_forward if self.problem.is_forward else self._native_backward
        gpu = replace(self.gpu, trial=choice)
        return lambda: (self._forward if self.problem.is_forward else self._backward)(gpu)

    def fault(self, choice: tuning.Choice) -> str | None:
        """What is wrong with the op's result under this choice, or None; the error policy."""
        problem, rows = self.problem, slice(0, _ROWS)
        out = self.call(choice)()[0][rows]
        exact, plain = self._expected(rows, torch.float64), self._expected(rows, None)
        report = exceeds(out, exact, plain)
        return None if report.ok else f"{'y' if problem.is_forward else 'dx'} is wrong: {report}"

    def plain(self) -> Call:
        """The addmm sequence: adapters in x's dtype, torch's dropout, a decoded 4-bit weight."""
        problem, x, dy = self.problem, self.x, self.dy
        A, B, S = (t.to(problem.dtype) for t in (self.A, self.B, self.S))
        p = problem.dropout_p

        def forward() -> Tensor:
            low = dropout(x, p) @ A.t()
            return torch.addmm(x @ self._decoded().t(), low, B.t(), alpha=_SCALING)

        kept = dropout(torch.ones_like(x), p)

        def backward() -> tuple[Tensor, ...]:
            low = torch.mm(dy, B).mul_(_SCALING)
            dB = torch.mm(dy.t(), S).mul_(_SCALING)
            dA = low.t() @ (x * kept)
            return ((low @ A).mul_(kept).addmm_(dy, self._decoded()), dA, dB)

        return forward if problem.is_forward else backward

    def _decoded(self) -> Tensor:
        if self.packed is None:
            return self.weight
        return dequantize_4bit(self.gpu, self.packed, torch.empty_like(self.weight))

    def _forward(self, gpu: Launcher) -> tuple[Tensor, Tensor]:
        p, x, base = self.problem.dropout_p, self.x, self.problem.dtype
        lora = (None, self.A, self.B, _SCALING, p, self.seed)
        if self.packed is None:
            return lora_linear_fwd(gpu, x, self.weight, *lora)
        return qlora_linear_fwd(gpu, x, self.packed, base, *lora)

    def _backward(self, gpu: Launcher) -> tuple[Tensor | None, ...]:
        p, x, base = self.problem.dropout_p, self.x, self.problem.dtype
        lora = (self.A, self.B, self.S, _SCALING, p, self.seed, (True, True, True, False))
        if self.packed is None:
            return lora_linear_bwd(gpu, self.dy, x, self.weight, *lora)
        return qlora_linear_bwd(gpu, self.dy, x, self.packed, base, *lora)

    def _native_forward(self) -> tuple[Tensor, Tensor]:
        assert self.quantised is not None
        p, (data, state) = self.problem.dropout_p, self.quantised
        lora = (None, self.A, self.B, _SCALING, p, self.seed)
        return native.qlora_linear_fwd(self.x, data, state, *lora)

    def _native_backward(self) -> tuple[Tensor | None, ...]:
        assert self.quantised is not None
        p, (data, state) = self.problem.dropout_p, self.quantised
        lora = (self.A, self.B, self.S, _SCALING, p, self.seed)
        return native.qlora_linear_bwd(self.dy, self.x, data, state, *lora)

    def _expected(self, rows: slice, dtype: torch.dtype | None) -> Tensor:
        """y or dx by the definition; in the working dtypes for None: then W's product is rounded
        before the LoRA term is added, as PEFT does."""
        p, wide = self.problem.dropout_p, [self.x[rows], self.weight, self.A, self.B, self.S[rows]]
        dy = self.dy[rows]
        if dtype is not None:
            wide, dy = [t.to(dtype) for t in wide], dy.to(dtype)
        x, W, A, B, S = wide
        if self.problem.is_forward:
            if dtype is not None:
                return reference.lora_linear_fwd(x, W, None, A, B, _SCALING, p, self.seed)[0]
            term = reference.lora_linear_fwd(x, W * 0, None, A, B, _SCALING, p, self.seed)[0]
            return x @ W.t() + term
        needs = (True, False, False, False)
        options = (S, _SCALING, p, self.seed, needs)
        if dtype is not None:
            return _first(reference.lora_linear_bwd(dy, x, W, A, B, *options))
        return dy @ W + _first(reference.lora_linear_bwd(dy, x, W * 0, A, B, *options))


def _first(grads: tuple[Tensor | None, ...]) -> Tensor:
    assert grads[0] is not None
    return grads[0]


def keep(trial: Trial, faster: Sequence[tuning.Choice]) -> None:
    """Stores what won for the trial's problem and device.

    Args:
        faster: the choices that beat addmm, the fastest first; it names the backend, and the first
            tile (or vendor's product) among them is Triton's, should Triton be asked for.
    """
    problem, key = trial.problem, trial.gpu.key
    shape = shape_key(problem.dtype, problem.sizes)
    for choice in faster:
        if choice != NATIVE:
            tuning.store(key, problem.op, shape, choice)
            break
    if problem.four_bit and faster:
        backend = native.NAME if faster[0] == NATIVE else "triton"
        tuning.store(key, tuned.key(problem.op), shape, {"backend": backend})
