"""`fastlora verify`: every kernel that runs on this machine, checked against the definition."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .errors import CliError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
# M, N, K, R. Odd sizes: no multiple of a tile, a vector or a 4-bit block in any direction; one row
# and few rows (kernels for generation), enough rows for several tiles, and enough work that threads
# share it.
_SIZES = (
    (1, 96, 128, 64),
    (7, 131, 65, 16),
    (37, 64, 192, 3),
    (129, 101, 131, 1),
    (70, 259, 320, 8),
    (521, 387, 449, 24),
)
_QUICK_SIZES = ((1, 96, 128, 64), (17, 67, 65, 3), (129, 64, 192, 16))
# x, adapter and, for a 4-bit weight, compute dtype: the combinations that PEFT makes.
_DTYPES = {
    "fp32": (("float32", "float32", None),),
    "bf16": (("bfloat16", "float32", None), ("bfloat16", "bfloat16", None)),
    "fp16": (("float16", "float32", None), ("float16", "float16", None)),
    "fp32 in bf16": (("float32", "float32", "bfloat16"),),
}
_SCALING = 1.5
_DROPOUT = 0.1
_RESULTS = ("y", "S", "dx", "dA", "dB", "dbias")
_ENOUGH_ELEMENTS = 256
_FAILURES_SHOWN = 8


@dataclass(frozen=True)
class Base:
    """The frozen weight: dense, or 4-bit with plain or nested absmax."""

    quant_type: str | None
    nested: bool = False

    @property
    def forward(self) -> str:
        """The op of a layer's forward."""
        return "lora_linear_fwd" if self.quant_type is None else "qlora_linear_fwd"

    def __str__(self) -> str:
        if self.quant_type is None:
            return "dense"
        return f"{self.quant_type} nested" if self.nested else self.quant_type


BASES = (
    Base(None),
    *(Base(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (False, True)),
)


@dataclass
class Cell:
    """The cases of one op, base and dtype: the worst error over its bound, and what failed."""

    cases: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, ratio: float, what: str) -> None:
        """Counts a result whose error is `ratio` times what it may be."""
        self.cases += 1
        self.worst = max(self.worst, ratio)
        if ratio > 1.0:
            self.failures.append(what)


# (op, base) -> column of the table -> cell
Results = dict[tuple[str, str], dict[str, Cell]]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="check every kernel on this machine against the definition",
        description=(
            "Runs every op of every backend, in every dtype, on dense, nf4 and fp4 weights, with "
            "and without dropout, forward and all gradients, on odd sizes. A result may be off "
            "from a float64 reference by twice as much as plain torch in the same dtypes is; 4-bit "
            "quantisation has to match bit for bit. Exits with 1 when anything is off by more."
        ),
    )
    parser.add_argument(
        "--isa",
        choices=(*ISAS, "all"),
        metavar="NAME",
        help=f"lower the instruction set first: {' | '.join(ISAS)} | all (each in turn)",
    )
    parser.add_argument("--backend", metavar="NAME", help="this backend alone")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    return parser


def run(args: argparse.Namespace) -> int:
    """Checks, prints a table a backend, returns 1 on a failure."""
    if args.isa:
        return _with_isa(args)
    from ..backends import BACKENDS

    if args.backend and args.backend not in BACKENDS:
        raise CliError(f"--backend: expected one of {', '.join(BACKENDS)}, got {args.backend}")
    console = Console()
    failed, not_run = 0, False
    for device in _devices():
        able = []
        for backend in (args.backend,) if args.backend else BACKENDS:
            reason = unsupported(backend, device)
            if backend == "triton" and device == "cpu" and not args.backend:
                reason = reason or "Its interpreter takes many minutes; --backend triton runs it."
            if reason is None:
                able.append(backend)
            else:
                console.print(f"{backend} on {device}: not checked. {reason}\n", highlight=False)
                # Asked for by name, a backend that can't run is a failure.
                not_run |= bool(args.backend)
        for backend, results in check(able, device, quick=args.quick, console=console).items():
            failed += _show(console, f"{backend} on {device}", results)
    if failed:
        console.print("[bold red]Some results are off by more than they may be.[/]")
        return 1
    if not_run:
        return 1
    console.print("[bold green]Every result is within its bound.[/]")
    return 0


def _with_isa(args: argparse.Namespace) -> int:
    """Runs `verify` again under FASTLORA_CPU_ISA, which is read when the library loads."""
    from ..backends import native

    build = native.build_info()
    if build is None:
        raise CliError(f"--isa: {native.unavailable_reason()}")
    compiled = build["cpu_isas"].split()
    command = [sys.executable, "-m", "fastlora", "verify", "--backend", "native"]
    command += ["--quick"] if args.quick else []
    status = 0
    for isa in compiled if args.isa == "all" else (args.isa,):
        environment = {**os.environ, "FASTLORA_CPU_ISA": isa}
        print(f"FASTLORA_CPU_ISA={isa}", flush=True)
        status |= subprocess.run(command, env=environment, check=False).returncode
        if isa == build["cpu_isa"] and "FASTLORA_CPU_ISA" not in os.environ:
            # The highest that this CPU runs.
            break
    return status


def _devices() -> Iterator[str]:
    import torch

    yield "cpu"
    if torch.cuda.is_available():
        yield "cuda"


# ---- the checks ------------------------------------------------------------------------------


def check(
    backends: Sequence[str],
    device: str,
    *,
    quick: bool = False,
    sizes: Sequence[tuple[int, int, int, int]] | None = None,
    stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
) -> dict[str, Results]:
    """Runs every op of `backends` on `device` and measures each result against its bound.

    Args:
        backends: names of backends that support the device.
        device: "cpu" or "cuda".
        quick: fewer sizes.
        sizes: (M, N, K, R) instead of the command's own.
        stop: asked before each case; True leaves the rest out.
        console: shows a bar while it runs, if given and a terminal.
    """
    found: dict[str, Results] = {backend: {} for backend in backends}
    sizes = sizes or (_QUICK_SIZES if quick else _SIZES)
    cases = [
        _Case(base, names, size, dropout, column, device)
        for base, dropout in itertools.product(BASES, (0.0, _DROPOUT))
        for column, combinations in _DTYPES.items()
        for names, size in itertools.product(combinations, sizes)
        # A dense weight has the dtype that it is computed in.
        if base.quant_type is not None or names[2] is None
    ]
    with _poisoned_memory():
        for backend, results in found.items():
            _check_4bit(backend, device, sizes, results)
        for case in track(
            cases,
            description="checking",
            console=console,
            transient=True,
            disable=console is None or not console.is_terminal,
        ):
            if stop():
                break
            able = [b for b in backends if _takes(b, device, case.base)]
            if not able:
                continue
            for backend, op, result, ratio in case.ratios(able):
                row = found[backend].setdefault((op, str(case.base)), {})
                row.setdefault(case.column, Cell()).add(ratio, f"{op} {case.base} {result}: {case}")
    return found


def _takes(backend: str, device: str, base: Base) -> bool:
    """False for a backend that leaves layers on such a weight to others, as CUDA's dense ones."""
    from ..backends import BACKENDS

    return BACKENDS[backend].unsupported(base.forward, device) is None


def unsupported(backend: str, device: str) -> str | None:
    """Why a backend runs no layer on a device, or None."""
    from ..backends import BACKENDS

    if any(_takes(backend, device, base) for base in BASES):
        return None
    reason: str | None = BACKENDS[backend].unsupported(BASES[-1].forward, device)
    return reason


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN: an element that a kernel forgets to write is then seen."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@dataclass(frozen=True)
class _Case:
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
        import torch

        from ..tolerance import exceeds

        M, _, _, R = self.size
        draws = [_Inputs.draw(self, seed) for seed in range(-(-_ENOUGH_ELEMENTS // (M * R)))]

        def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.stack([r[name] for r in results]) for name in _RESULTS}

        exact = joined([draw.exact() for draw in draws])
        plain = joined([draw.plain() for draw in draws])
        for backend in backends:
            for name, out in joined([draw.run(backend) for draw in draws]).items():
                report = exceeds(out, exact[name], plain[name])
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
    def draw(cls, case: _Case, seed: int) -> _Inputs:
        """Random inputs. B is not zero: it would hide A's gradient."""
        import torch

        from .. import reference

        x_dtype, adapter_dtype = getattr(torch, case.names[0]), getattr(torch, case.names[1])
        M, N, K, R = case.size
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(case.device)

        weight, state = normal(N, K).mul(K**-0.5).to(x_dtype), None
        if case.base.quant_type is not None:
            weight, state = reference.quantize_4bit(
                weight, 64, case.base.quant_type, case.base.nested
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

    def run(self, backend: str) -> dict[str, Tensor]:
        """The ops of `backend`."""
        from .. import ops

        x, dy, A, B, p, seed = self.x, self.dy, self.lora_A, self.lora_B, self.dropout, self.seed
        needs = (True, True, True, True)
        if self.state is None:
            y, S = ops.lora_linear_fwd(
                x, self.weight, self.bias, A, B, _SCALING, p, seed, backend=backend
            )
            grads = ops.lora_linear_bwd(
                dy, x, self.weight, A, B, S, _SCALING, p, seed, needs, backend=backend
            )
        else:
            W, state, dtype = self.weight, self.state, self.compute_dtype
            y, S = ops.qlora_linear_fwd(
                x, W, state, self.bias, A, B, _SCALING, p, seed, dtype, backend=backend
            )
            grads = ops.qlora_linear_bwd(
                dy, x, W, state, A, B, S, _SCALING, p, seed, dtype, needs, backend=backend
            )
        return _by_name(y, S, *grads)

    def exact(self) -> dict[str, Tensor]:
        """The reference in float64, with a 4-bit W decoded to the dtype that it is used in."""
        from .. import reference

        weight, x, bias, A, B, dy = (
            t.double() if t.is_floating_point() else t
            for t in (self.weight, self.x, self.bias, self.lora_A, self.lora_B, self.dy)
        )
        if self.state is None:
            y, S = reference.lora_linear_fwd(
                x, weight, bias, A, B, _SCALING, self.dropout, self.seed
            )
            grads = reference.lora_linear_bwd(
                dy, x, weight, A, B, S, _SCALING, self.dropout, self.seed, needs=(True,) * 4
            )
        else:
            state, dtype = self.state, self.compute_dtype or self.x.dtype
            y, S = reference.qlora_linear_fwd(
                x, weight, state, bias, A, B, _SCALING, self.dropout, self.seed, dtype
            )
            grads = reference.qlora_linear_bwd(
                dy, x, weight, state, A, B, S, _SCALING, self.dropout, self.seed, dtype, (True,) * 4
            )
        return _by_name(y, S, *grads)

    def plain(self) -> dict[str, Tensor]:
        """PEFT's own sequence of torch calls in the working dtypes, and autograd's gradients."""
        import torch
        from torch.nn.functional import linear

        from .. import reference

        leaves = [t.clone().requires_grad_() for t in (self.x, self.lora_A, self.lora_B, self.bias)]
        x, A, B, bias = leaves
        if self.state is None:
            result = linear(x, self.weight, bias)
        else:
            dtype = self.compute_dtype or x.dtype
            weight = reference.dequantize_4bit(self.weight, self.state, dtype)
            result = linear(x.to(dtype), weight, bias.to(dtype)).to(x.dtype)
        dropped = x.to(A.dtype)
        if self.dropout:
            _, scale = reference.dropout_threshold(self.dropout)
            M, K = x.shape
            mask = reference.dropout_mask(M, K, self.dropout, self.seed, x.device)
            dropped = dropped * mask * scale
        S = linear(dropped, A)
        lora = linear(S, B) * _SCALING
        # PEFT's dense layer adds in the wider dtype, its 4-bit layer in the base's.
        y = result + (lora if self.state is None else lora.to(result.dtype))
        y = y.to(x.dtype)
        dx, dA, dB, dbias = torch.autograd.grad(y, leaves, self.dy)
        return _by_name(y.detach(), S.detach(), dx, dA, dB, dbias)


def _by_name(*tensors: Tensor | None) -> dict[str, Tensor]:
    return {n: t for n, t in zip(_RESULTS, tensors, strict=True) if t is not None}


def _check_4bit(
    backend: str, device: str, sizes: Sequence[tuple[int, int, int, int]], results: Results
) -> None:
    """The 4-bit ops, bit for bit: a ratio of 0, or infinity where a bit differs."""
    import torch

    from .. import ops, reference
    from ..backends import BACKENDS

    quantises = BACKENDS[backend].unsupported("quantize_4bit", device) is None
    columns = ("float32", "bfloat16", "float16")
    for base, name, (_, N, K, _) in itertools.product(BASES[1:], columns, sizes):
        assert base.quant_type is not None
        dtype = getattr(torch, name)
        generator = torch.Generator().manual_seed(N + K)
        weight = torch.randn(N, K, generator=generator).to(device, dtype)
        settings = (64, base.quant_type, base.nested)
        expected, expected_state = reference.quantize_4bit(weight, *settings)
        equal_by_op = {}
        if quantises:
            packed, state = ops.quantize_4bit(weight, *settings, backend=backend)
            equal_by_op["quantize_4bit"] = torch.equal(packed, expected) and torch.equal(
                state.absmax, expected_state.absmax
            )
        decoded = ops.dequantize_4bit(expected, expected_state, dtype, backend=backend)
        equal_by_op["dequantize_4bit"] = torch.equal(
            decoded, reference.dequantize_4bit(expected, expected_state, dtype)
        )
        for op, equal in equal_by_op.items():
            column = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[name]
            results.setdefault((op, str(base)), {}).setdefault(column, Cell()).add(
                0.0 if equal else math.inf, f"{op} {base}: {name}, N={N} K={K}"
            )


# ---- the table -------------------------------------------------------------------------------


def _show(console: Console, title: str, results: Results) -> int:
    """Prints the table; returns how many results failed."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("op", no_wrap=True)
    table.add_column("weight", no_wrap=True)
    for column in _DTYPES:
        table.add_column(column, justify="right", no_wrap=True)
    # By op, and within an op as checked: sorted() keeps that order.
    for (op, base), cells in sorted(results.items(), key=lambda item: item[0][0]):
        bitwise = not op.endswith(("_fwd", "_bwd"))
        table.add_row(op, base, *(_cell(cells.get(column), bitwise) for column in _DTYPES))
    console.print(table)
    cases = sum(cell.cases for cells in results.values() for cell in cells.values())
    failures = [f for cells in results.values() for cell in cells.values() for f in cell.failures]
    console.print(
        f"{cases} results. A figure is the worst error over the largest allowed.\n",
        highlight=False,
    )
    for failure in failures[:_FAILURES_SHOWN]:
        console.print(f"[red]failed[/]  {failure}", highlight=False, soft_wrap=True)
    if len(failures) > _FAILURES_SHOWN:
        console.print(f"[red]failed[/]  and {len(failures) - _FAILURES_SHOWN} more")
    return len(failures)


def _cell(cell: Cell | None, bitwise: bool) -> str:
    if cell is None:
        return ""
    colour = "red" if cell.failures else "green"
    text = ("differs" if cell.failures else "exact") if bitwise else f"{cell.worst:.2f}"
    return f"[{colour}]{text}[/]"
