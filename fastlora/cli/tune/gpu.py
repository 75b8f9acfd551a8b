"""`fastlora tune`: times the kernels on your layers and keeps the fastest choices.

This module tunes the tiles of the Triton kernels for each op and size; on a CPU, `cpu` tunes the
tile sizes of the C++ kernels.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import track
from rich.table import Table

from ... import tuning
from ..console import wide_console
from ..errors import CliError, check_writable
from ..options import DTYPES, add_sizes, add_timing, share, torch_dtype

if TYPE_CHECKING:
    from ...backends.triton.tuner import Problem, Trial

_OPS = ("lora_linear_fwd", "lora_linear_bwd", "qlora_linear_fwd", "qlora_linear_bwd")
_PLAIN = "addmm"
# Candidates other than tiles.
_NAMES = {"vendor": "vendor's product", "native": "native backend"}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="measure the kernels on your sizes and keep the fastest",
        description=(
            "Times candidates, checks their results, and stores the fastest for later runs "
            "($FASTLORA_CACHE, else ~/.cache/fastlora). On a GPU it tunes tiles for each product "
            "of a layer, and keeps only those that beat the plain addmm sequence. On a CPU it "
            "tunes one set of tile sizes for all layers, and keeps it if it is 1 % faster overall "
            "and at most 3 % slower on any layer: less is noise. Without this command fastlora "
            "uses defaults for the class of the device; it never tunes while training."
        ),
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(cuda, if available)")
    parser.add_argument("--model", metavar="PATH", help="tune for all linear layers of a model")
    add_sizes(parser, tokens="cuda: 16,256,2048,8192; cpu: 1,16,128,512", quant="none,nf4")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(bf16)")
    parser.add_argument("--dropout", type=share(), default=0.1, metavar="P", help="(0.1)")
    add_timing(parser)
    parser.set_defaults(rank=[16], quant=["none", "nf4"], rounds=9)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measures, prints a line for each problem; 1 if a candidate's result was wrong."""
    # What was measured is not to be lost.
    check_writable("$FASTLORA_CACHE", tuning.cache_folder())
    shapes = args.shape or ([] if args.model else [(4096, 4096)])
    if args.model:
        shapes = [*shapes, *_shapes_of(args.model)]
    shapes = list(dict.fromkeys(shapes))
    device = _device(args.device)
    if device == "native":
        from . import cpu as tune_cpu

        return tune_cpu.run(args, shapes)
    args.tokens = args.tokens or [16, 256, 2048, 8192]
    problems = list(_problems(args, shapes))
    console = wide_console()
    table = Table("op", "sizes", "fastest", "ms", "addmm ms", "candidates", box=None)
    wrong: list[str] = []
    left_out: list[str] = []
    try:
        for problem in track(
            problems,
            description="tuning",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            outcome = tune(problem, device, args.rounds, args.sample_ms * 1e-3)
            wrong += outcome.wrong
            left_out += [reason.splitlines()[0] for reason in outcome.left_out]
            table.add_row(*outcome.cells())
    finally:
        console.print(table)  # each line of which is kept
    for reason, count in Counter(left_out).most_common(5):
        console.print(f"left out {count} times: {reason}", highlight=False)
    for line in wrong:
        console.print(f"[bold red]wrong[/] {line}", highlight=False)
    return 1 if wrong else 0


@dataclass(frozen=True)
class Outcome:
    """The result of tuning one problem.

    Args:
        problem: of which layer.
        seconds: median of each candidate that ran, by name, and of addmm.
        kept: name of the candidate that was stored; None if addmm was the fastest.
        left_out: candidates that don't compile here, with the reason.
        wrong: candidates with a wrong result; they are not timed.
    """

    problem: Problem
    seconds: dict[str, float]
    kept: str | None
    left_out: list[str]
    wrong: list[str]

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        M, N, K, R = self.problem.sizes
        fastest = self.kept or "none: addmm is faster, the default stays"
        ours = [value for name, value in self.seconds.items() if name != _PLAIN]
        best = min(ours, default=math.nan)
        return (
            self.problem.op,
            f"M={M} N={N} K={K} R={R}",
            fastest,
            f"{best * 1e3:.3g}",
            f"{self.seconds[_PLAIN] * 1e3:.3g}",
            f"{len(self.seconds) - 1} ran, {len(self.left_out) + len(self.wrong)} left out",
        )


def tune(
    problem: Problem, device: str, rounds: int, sample_seconds: float, most: int | None = None
) -> Outcome:
    """Times the candidates of `problem` in turn with addmm, and stores those that beat it.

    Args:
        device: "cuda", or "cpu" in Triton's interpreter.
        rounds, sample_seconds: as in `fastlora bench`.
        most: try at most this many candidates, first the default and those other than tiles.
    """
    import torch

    from ...backends.triton.tuner import Trial, keep
    from ..bench.measure import interleave, waits_for
    from ..bench.plan import Budget

    trial = Trial(problem, torch.device(device))
    choices = {_name(choice): choice for choice in trial.choices()[:most]}
    ready, left_out, wrong = _checked(trial, choices)
    calls: dict[str, list[Callable[[], object]]] = {
        name: [trial.call(choices[name])] for name in ready
    }
    calls[_PLAIN] = [trial.plain()]
    timings = interleave(calls, Budget(rounds, sample_seconds), wait=waits_for(device))
    seconds = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    ranking = sorted(seconds, key=lambda name: seconds[name])
    faster = ranking[: ranking.index(_PLAIN)]
    keep(trial, [choices[name] for name in faster])
    return Outcome(problem, seconds, faster[0] if faster else None, left_out, wrong)


def _checked(trial: Trial, choices: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """The candidates to time, those left out, and those that are wrong, by name.

    If all are left out, that is wrong as well.
    """
    from ...backends.triton.tuner import is_too_large

    ready, left_out, wrong = [], [], []
    for name, choice in choices.items():
        try:
            fault = trial.fault(choice)
        except Exception as error:
            if not is_too_large(error):
                raise
            left_out.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if fault is None:
            ready.append(name)
        else:
            wrong.append(f"{trial.problem} with {name}: {fault}")
    if not ready and not wrong:
        wrong.append(f"{trial.problem}: no candidate runs here")
    return ready, left_out, wrong


def _name(choice: Any) -> str:
    if choice["way"] in _NAMES:
        return ", ".join([_NAMES[choice["way"]], *filter(None, [choice.get("kernel")])])
    return "{BM}x{BN}x{BK}, {warps} warps, {stages} stages".format(**choice)


def _device(wanted: str | None) -> str:
    """What to tune: "cuda" (Triton), "cpu" (Triton's interpreter) or "native" (the C++ kernels).

    Raises:
        CliError: the kernels can't run here.
    """
    from ...backends import BACKENDS
    from ...backends.contract import Request

    triton, on_cpu = BACKENDS["triton"].unsupported, Request("lora_linear_fwd", "cpu")
    no_gpu = triton(on_cpu._replace(device="cuda"))
    if wanted == "cuda" or (wanted is None and no_gpu is None):
        if no_gpu is not None:
            raise CliError(f"--device cuda: {no_gpu}")
        return "cuda"
    if triton(on_cpu) is None:  # TRITON_INTERPRET is set
        return "cpu"
    if reason := BACKENDS["native"].unsupported(on_cpu):
        raise CliError(f"there is nothing to tune. cuda: {no_gpu} cpu: {reason}")
    return "native"


def _problems(args: argparse.Namespace, shapes: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    from ...backends.triton.tuner import Problem

    dtype = torch_dtype(args.dtype)
    for N, K in shapes:
        for quant in args.quant:
            for M in args.tokens:
                for R in args.rank:
                    for op in _OPS:
                        if op.startswith("q") != (quant != "none"):
                            continue
                        kind = {} if quant == "none" else {"quant_type": quant}
                        yield Problem(op, (M, N, K, R), dtype, dropout_p=args.dropout, **kind)


def _shapes_of(folder: str) -> list[tuple[int, int]]:
    """(N, K) of every linear layer but the head, from config.json alone."""
    import torch

    from ...integrations.transformers.loading import empty_model

    try:
        model = empty_model(folder)
    except ValueError as error:
        raise CliError(f"--model: {error}") from error
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return list(dict.fromkeys((layer.out_features, layer.in_features) for layer in layers))
