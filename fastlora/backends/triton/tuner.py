"""What `fastlora tune` measures: the candidates for an op, and the plain addmm sequence.

The candidates are tiles of the Triton kernels, the vendor's product between them, and the native
backend's kernels for the same op, if there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from triton.errors import TritonError

from ... import reference, tuning
from ...layer import Grads, Layer, Needs
from ...reference import plain
from ...tolerance import exceeds
from .. import native
from ..contract import Request
from ..machine import tuned
from ..machine.gpu import Sizes, shape_key
from ..schemas import Packed, packed
from .kernels.base_product_4bit import fits
from .kernels.dequantize_4bit import dequantize_4bit
from .launch import choice_of, launcher
from .linear import lora_linear_bwd, lora_linear_fwd
from .tiles import candidates

_SCALING = 1.5
_NEEDS = Needs()
# y and dx are compared on this many tokens, the first, the last and some between: each row of them
# depends only on its own token, and any tile of tokens may be wrong.
_ROWS = 192

Call = Callable[[], Any]


def is_too_large(error: Exception) -> bool:
    """Whether a candidate needs more than this GPU's compiler or shared memory has."""
    # MLIR reports a failed pass as a RuntimeError.
    failed_pass = isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)
    return failed_pass or isinstance(error, TritonError)


# The candidate that is no tile: the op on the native backend, by the kernel named "kernel", if any.
NATIVE: tuning.Choice = {"way": native.NAME}


@dataclass(frozen=True)
class Problem:
    """An op in one size.

    Args:
        op: "lora_linear_fwd", "lora_linear_bwd", or with a "q" before them for a 4-bit base.
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
    def linear_op(self) -> str:
        """The op's name for the backends, which is the same for a 4-bit base."""
        return self.op.removeprefix("q")

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
        self.seed = torch.tensor([7], device=device)
        self.layer = Layer(
            self.weight,
            normal(R, K, by=K, dtype=problem.adapter_dtype),
            normal(N, R, by=R, dtype=problem.adapter_dtype),
            _SCALING,
            dropout_p=problem.dropout_p,
            seed=self.seed,
        )
        self.packed: Packed | None = None
        if problem.four_bit:
            data, state = reference.quantize_4bit(
                self.weight, problem.blocksize, problem.quant_type, True
            )
            self.packed = packed(data.view(-1), state)
            self.layer = self.layer._replace(weight=data.view(-1), quant_state=state)
            self.weight = reference.dequantize_4bit(data, state, problem.dtype)
        self.gpu = launcher(self.x)
        spread = torch.linspace(0, M - 1, min(M, _ROWS), dtype=torch.float64)
        self.rows = spread.round().long().to(device)
        self._right: tuple[Tensor, Tensor] | None = None
        _, self.S = lora_linear_fwd(self.gpu, self.x, self.layer)

    def choices(self) -> list[tuning.Choice]:
        """Choices that can run the op: the vendor's product, the native backend, tiles that fit."""
        problem = self.problem
        M, _, K, R = problem.sizes
        if not problem.four_bit:
            tiles = candidates("base_product", self.gpu.arch, problem.dtype, M, R)
        elif self.packed is not None and fits(self.packed, K, problem.dtype):
            tiles = candidates("base_product_4bit", self.gpu.arch, problem.dtype, M, R)
        else:
            tiles = []
        return [choice_of(None), *self._native_choices(), *map(choice_of, tiles)]

    def _native_choices(self) -> list[tuning.Choice]:
        """The native backend; on a GPU each of its kernels that can run the op in this size."""
        problem, device = self.problem, self.x.device
        request = Request.of(problem.linear_op, self.x, self.layer)
        if not problem.four_bit or native.unsupported(request):
            return []
        if device.type != "cuda":
            return [NATIVE]
        M, _, K, _ = problem.sizes
        able = native.cuda.kernels(problem.linear_op, M, K, problem.blocksize, problem.dtype)
        return [{**NATIVE, "kernel": kernel} for kernel in able]

    def call(self, choice: tuning.Choice) -> Call:
        """The whole op with this choice."""
        if _is_native(choice):
            return lambda: self._native(choice.get("kernel"))
        gpu = replace(self.gpu, trial=choice)
        if self.problem.is_forward:
            return lambda: lora_linear_fwd(gpu, self.x, self.layer)
        return lambda: lora_linear_bwd(gpu, self.dy, self.x, self.layer, self.S, _NEEDS)

    def _native(self, kernel: Any) -> tuple[Tensor, Tensor] | Grads:
        backend: Any = native.on(self.x.device.type) if kernel is None else native.cuda.Cuda()
        named = () if kernel is None else (kernel,)
        if self.problem.is_forward:
            return backend.lora_linear_fwd(self.x, self.layer, *named)
        return backend.lora_linear_bwd(self.dy, self.x, self.layer, self.S, _NEEDS, *named)

    def fault(self, choice: tuning.Choice) -> str | None:
        """How the op's result under this choice breaks the error policy, or None."""
        if self._right is None:
            self._right = self._expected(exact=True), self._expected(exact=False)
        out = self.call(choice)()[0][self.rows]
        report = exceeds(out, *self._right)
        name = "y" if self.problem.is_forward else "dx"
        return None if report.ok else f"{name} is wrong: {report}"

    def plain(self) -> Call:
        """The addmm sequence: adapters in x's dtype, torch's dropout, a decoded 4-bit weight."""
        problem, x, dy = self.problem, self.x, self.dy
        adapter = self.layer.lora_A, self.layer.lora_B
        A, B, S = (t.to(problem.dtype) for t in (*adapter, self.S))
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

    def _expected(self, exact: bool) -> Tensor:
        """y or dx of `rows` by plain torch, in float64 or in the working dtypes."""
        p, layer, weight = self.problem.dropout_p, self.layer, self.weight
        x, dy = self.x[self.rows], self.dy[self.rows]
        M, K = self.x.shape
        mask = reference.dropout_mask(M, K, p, self.seed, x.device)[self.rows]
        if exact:
            layer = plain.widened(layer, self.problem.dtype)
            x, dy, weight = x.double(), dy.double(), layer.weight
        factors = plain.dropout_factors(mask, p, layer.lora_A.dtype)
        x = x.requires_grad_()
        y = plain.lora_linear(x, layer, factors=factors, weight=weight)
        return y.detach() if self.problem.is_forward else torch.autograd.grad(y, x, dy)[0]


def keep(trial: Trial, faster: Sequence[tuning.Choice]) -> None:
    """Stores the winners for the trial's problem and device in place of earlier ones.

    Args:
        faster: the choices that beat addmm, the fastest first; it names the backend. The first
            tile (or vendor's product) among them is Triton's, should Triton be asked for, the first
            kernel of the native backend that one's.
    """
    problem, key = trial.problem, trial.gpu.key
    shape = shape_key(problem.dtype, problem.sizes)
    tile = next((choice for choice in faster if not _is_native(choice)), None)
    tuning.store(key, problem.op, shape, tile)
    if problem.four_bit:
        kept: tuning.Choice | None = None
        if faster:
            kept = {"backend": native.NAME if _is_native(faster[0]) else "triton"}
            kernel = next((choice["kernel"] for choice in faster if "kernel" in choice), None)
            kept = kept if kernel is None else {**kept, "kernel": kernel}
        tuning.store(key, tuned.backend_key(problem.op), shape, kept)


def _is_native(choice: tuning.Choice) -> bool:
    return choice["way"] == native.NAME
