"""`fastlora bench`: PEFT, plain torch and fastlora on the same layer, in turn."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ..errors import CliError
from ..options import (
    DTYPES,
    add_double_quant,
    add_sizes,
    add_timing,
    one_of,
    positive,
    several,
    share,
)
from .allocators import ALLOCATORS, current
from .case import MODEL_MODES, MODES, Case, Layer, grid
from .execute import COMPARISONS, Output, execute
from .plan import Budget, ModelPlan, Plan

_DEFAULT_PROVIDERS = ("frozen", "peft", "peft-cast", "addmm", "fastlora", "fastlora-frozen")
_QUICK_PROVIDERS = ("frozen", "peft", "fastlora")
# These only run in "dequantize" mode.
_DEQUANTIZERS = ("bitsandbytes", "fastlora-fresh", "fastlora-out", "write")
# Not part of `all`: they take seconds to compile or to run.
_SLOW_PROVIDERS = ("compile", "reference", "fastlora-triton")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time a LoRA layer of your size: PEFT, plain torch and fastlora in turn",
        description=(
            "Times one LoRA layer with PEFT, plain torch and fastlora. Each runs once in every "
            "round. Ratios are taken round by round; the table shows their median with the 20th "
            "and 80th percentile. Results are checked before they are timed: a wrong one gets "
            "no row."
        ),
    )
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments, also of `python -m benchmarks.measure.run`."""
    layer = parser.add_argument_group("layer")
    add_sizes(layer, tokens="1,16,64,512", quant="nf4")
    layer.add_argument(
        "--dtype",
        type=several(one_of(DTYPES)),
        metavar="NAME,...",
        help=f"{' | '.join(DTYPES)} (bf16)",
    )
    add_double_quant(layer)
    layer.add_argument("--dropout", type=several(share()), metavar="P,...", help="(0.05)")
    layer.add_argument(
        "--adapter-dtype",
        choices=DTYPES,
        default="fp32",
        metavar="NAME",
        help="of A and B in fastlora (fp32)",
    )
    layer.add_argument(
        "--mode",
        "--modes",
        type=several(one_of({**MODES, **MODEL_MODES})),
        metavar="NAME,...",
        help=f"{' | '.join(MODES)} (forward,step); with --model {' | '.join(MODEL_MODES)} (all)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="PATH",
        help="time a whole model, PEFT and fastlora in turn: a folder, a GGUF file, or a folder "
        "with only a config.json, for random weights",
    )
    model.add_argument("--batch-size", type=positive, default=1, metavar="N", help="(1)")
    model.add_argument(
        "--seq-len", type=positive, default=512, metavar="N", help="tokens in a sequence (512)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--providers",
        metavar="NAME,...",
        help=f"({','.join(_DEFAULT_PROVIDERS)}); all; all,compile; list shows them",
    )
    how.add_argument(
        "--allocators",
        type=several(one_of((*ALLOCATORS, "current"))),
        metavar="NAME,...",
        help="glibc | tcmalloc | current (current): by default, glibc causes page faults for large "
        "temporaries; a preloaded tcmalloc avoids them",
    )
    add_timing(how)
    how.add_argument("--threads", type=positive, metavar="N", help="of torch")
    how.add_argument("--quick", action="store_true", help="a first look, in less than a minute")
    how.add_argument(
        "--memory",
        action="store_true",
        help="also measure the peak memory of step and inference at the largest M (some seconds "
        "for each provider)",
    )
    out = parser.add_argument_group("what to write")
    out.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to this file")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    out.add_argument("--plot", type=Path, metavar="FOLDER", help="write plots as PNG")
    out.add_argument(
        "--compare",
        type=several(_couple),
        metavar="A:B,...",
        help="tables of time of B / time of A (fastlora:peft)",
    )
    out.add_argument("--times", action="store_true", help="show the milliseconds as well")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables; 1 if a result was wrong."""
    from .providers import PROVIDERS

    if args.providers == "list":
        for provider in PROVIDERS.values():
            print(f"{provider.name:<16} {provider.label}")
        return 0
    output = output_of(args)
    if args.model:
        return execute([model_plan_of(args)], output)
    plan = plan_of(args, cases_of(args))
    _check_compared(args.compare or (), plan.providers)
    return execute([plan], output)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases of the layer arguments."""
    quick = args.quick
    layers = _layers(args, args.shape or [(2048, 2048) if quick else (4096, 4096)])
    if wrong := [mode for mode in args.mode or [] if mode not in MODES]:
        raise CliError(f"--mode: {wrong[0]} needs --model")
    tokens = args.tokens or ([1, 16, 128] if quick else [1, 16, 64, 512])
    return grid(layers, tokens, args.mode or ["forward", "step"])


def model_plan_of(args: argparse.Namespace) -> ModelPlan:
    """The plan of --model."""
    modes = args.mode or list(MODEL_MODES)
    if wrong := [mode for mode in modes if mode not in MODEL_MODES]:
        raise CliError(f"--mode: {wrong[0]} is a layer's; --model has {', '.join(MODEL_MODES)}")
    if not Path(args.model).exists():
        raise CliError(f"--model: no such folder or file: {args.model}")
    path, layer = str(Path(args.model).resolve()), _layers(args, [(0, 0)])[0]
    return ModelPlan(path, modes, layer, args.batch_size, args.seq_len, *_how(args))


def plan_of(args: argparse.Namespace, cases: list[Case]) -> Plan:
    """The plan for `cases`."""
    return Plan(cases, _providers(args), *_how(args))


def output_of(args: argparse.Namespace) -> Output:
    """The outputs of the arguments."""
    from .providers import PROVIDERS

    comparisons = args.compare or COMPARISONS
    _check_compared(comparisons, PROVIDERS)
    return Output(args.csv, args.markdown, args.plot, comparisons, args.times)


# ---- arguments -------------------------------------------------------------------------------


def _check_compared(comparisons: Iterable[tuple[str, str]], known: Collection[str]) -> None:
    for name in itertools.chain(*comparisons):
        if name not in known:
            raise CliError(f"--compare: expected some of {', '.join(known)}, got {name}")


def _layers(args: argparse.Namespace, shapes: list[tuple[int, int]]) -> list[Layer]:
    return [
        Layer(N, K, R, dtype, quant, args.double_quant, dropout, args.adapter_dtype)
        for dtype in args.dtype or ["bf16"]
        for quant in args.quant or ["nf4"]
        for N, K in shapes
        for R in args.rank or [16]
        for dropout in args.dropout or [0.05]
    ]


def _providers(args: argparse.Namespace) -> list[str]:
    from .providers import PROVIDERS

    if not args.providers:
        return [*(_QUICK_PROVIDERS if args.quick else _DEFAULT_PROVIDERS), *_DEQUANTIZERS]
    names: list[str] = []
    for word in args.providers.split(","):
        if word == "all":
            names += [name for name in PROVIDERS if name not in _SLOW_PROVIDERS]
        elif word in PROVIDERS:
            names.append(word)
        else:
            raise CliError(
                f"--providers: expected all or some of {', '.join(PROVIDERS)}, got {word}"
            )
    return list(dict.fromkeys(names))


def _how(args: argparse.Namespace) -> tuple[list[str], Budget, int | None, bool]:
    """The allocators, budget, threads and memory of a plan."""
    wanted = args.allocators or ["current"]
    names = dict.fromkeys(current() if name == "current" else name for name in wanted)
    budget = Budget(args.rounds or (3 if args.quick else 9), args.sample_ms * 1e-3)
    return list(names), budget, args.threads, args.memory


def _couple(text: str) -> tuple[str, str]:
    names = text.split(":")
    if len(names) != 2:
        raise argparse.ArgumentTypeError(f"expected A:B, got {text}")
    return names[0], names[1]
