"""`fastlora verify`: checks the kernels of linear layers and 4-bit weights on this machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from ..errors import CliError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="check the kernels on this machine against the reference",
        description=(
            "Runs linear layers and 4-bit quantisation on every backend, in every dtype, dense "
            "and in each 4-bit format, with and without dropout, forward and all gradients, on odd "
            "sizes. The error against a float64 reference may be twice that of plain torch in the "
            "same dtypes; 4-bit quantisation must match bit for bit. Exits with 1 if any error is "
            "larger."
        ),
    )
    parser.add_argument(
        "--isa",
        metavar="NAME",
        help="lower the instruction set first: one that `fastlora info` lists, or all in turn",
    )
    parser.add_argument("--backend", metavar="NAME", help="only this backend")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    return parser


def run(args: argparse.Namespace) -> int:
    """Checks, prints a table for each backend, returns 1 on a failure."""
    if args.isa:
        return _with_isa(args)
    from ...backends import BACKENDS
    from .check import check, unsupported
    from .table import show

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
                # A backend that was named and can't run is a failure.
                not_run |= bool(args.backend)
        for backend, results in check(able, device, quick=args.quick, console=console).items():
            failed += show(console, f"{backend} on {device}", results)
    if failed:
        console.print("[bold red]Some results are off by more than they may be.[/]")
        return 1
    if not_run:
        return 1
    console.print("[bold green]Every result is within its bound.[/]")
    return 0


def _with_isa(args: argparse.Namespace) -> int:
    """Runs `verify` again under FASTLORA_CPU_ISA, which is read when the library loads."""
    from ...backends import native

    build = native.build_info()
    if build is None:
        raise CliError(f"--isa: {native.unavailable_reason()}")
    compiled = build["cpu_isas"].split()
    if args.isa not in (*compiled, "all"):
        raise CliError(f"--isa: expected one of {', '.join(compiled)}, all, got {args.isa}")
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
