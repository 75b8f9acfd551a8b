"""`fastlora bench`: PEFT, plain torch and fastlora on the same layer, in turn."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..errors import CliError
from .case import DTYPES, MODES, QUANTS, Case, Layer, grid

_DEFAULT_PROVIDERS = ("frozen", "peft", "peft-cast", "addmm", "fastlora", "fastlora-frozen")
_QUICK_PROVIDERS = ("frozen", "peft", "fastlora")
# Left out of `all`: one takes seconds to compile for each size, the other seconds to run.
_SLOW_PROVIDERS = ("compile", "reference")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time a LoRA layer of your size: PEFT, plain torch and fastlora in turn",
        description=(
            "Times one LoRA layer with PEFT, plain torch and fastlora. All of them run once in "
            "every round, a ratio is taken round by round, and the table shows the median of the "
            "ratios with the 20th and 80th percentile. A result is checked before it is timed: a "
            "wrong one gets no row."
        ),
    )
    parser.add_argument(
        "--shape",
        type=_pairs,
        metavar="N,K",
        help="out_features, in_features; several with : between (4096,4096)",
    )
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments that `python -m benchmarks.run` has as well."""
    layer = parser.add_argument_group("layer")
    layer.add_argument("--tokens", type=_counts, metavar="M,...", help="(1,16,64,512)")
    layer.add_argument("--rank", type=_counts, metavar="R,...", help="(16)")
    layer.add_argument(
        "--dtype", type=_names(DTYPES), metavar="NAME,...", help=f"{' | '.join(DTYPES)} (bf16)"
    )
    layer.add_argument(
        "--quant", type=_names(QUANTS), metavar="NAME,...", help=f"{' | '.join(QUANTS)} (nf4)"
    )
    layer.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="absmax of a 4-bit weight in 8 bits as well (on)",
    )
    layer.add_argument("--dropout", type=_shares, metavar="P,...", help="(0.05)")
    layer.add_argument(
        "--adapter-dtype",
        choices=tuple(DTYPES),
        default="fp32",
        metavar="NAME",
        help="of A and B in fastlora (fp32)",
    )
    layer.add_argument(
        "--mode",
        "--modes",
        type=_names(MODES),
        metavar="NAME,...",
        help=f"{' | '.join(MODES)} (forward,step)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--providers",
        metavar="NAME,...",
        help=f"({','.join(_DEFAULT_PROVIDERS)}); all; all,compile; list shows them",
    )
    how.add_argument(
        "--allocators",
        type=_names(("glibc", "tcmalloc", "current")),
        metavar="NAME,...",
        help="glibc | tcmalloc | current (current): glibc's default pays page faults for large "
        "temporaries, which a preloaded tcmalloc spares",
    )
    how.add_argument("--rounds", type=_count, metavar="N", help="(9)")
    how.add_argument(
        "--sample-ms", type=float, default=20.0, metavar="MS", help="length of a sample (20)"
    )
    how.add_argument("--threads", type=_count, metavar="N", help="of torch")
    how.add_argument("--quick", action="store_true", help="a first look, in less than a minute")
    out = parser.add_argument_group("what to write")
    out.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to this file")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the tables as Markdown")
    out.add_argument("--plot", type=Path, metavar="FOLDER", help="plots as PNG")
    out.add_argument("--times", action="store_true", help="show the milliseconds as well")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables; 1 when a result was wrong."""
    if args.providers == "list":
        return _list_providers()
    quick = args.quick
    layers = [
        Layer(N, K, R, dtype, quant, args.double_quant, dropout, args.adapter_dtype)
        for dtype in args.dtype or ["bf16"]
        for quant in args.quant or ["nf4"]
        for N, K in args.shape or [(2048, 2048) if quick else (4096, 4096)]
        for R in args.rank or [16]
        for dropout in args.dropout or [0.05]
    ]
    tokens = args.tokens or ([1, 16, 128] if quick else [1, 16, 64, 512])
    modes = args.mode or ["forward", "step"]
    return execute(args, grid(layers, tokens, modes))


def execute(args: argparse.Namespace, cases: list[Case]) -> int:
    """Measures `cases` with the options of `args`; returns the exit status."""
    from .lead import Results, measure
    from .rows import append
    from .table import ratios, times
    from .worker import Request

    console = Console()
    providers = _providers(args)
    allocators = [_current() if a == "current" else a for a in args.allocators or ["current"]]
    rounds = args.rounds or (3 if args.quick else 9)
    results = Results()
    total = len(allocators) * len(cases)
    with _Bar(console, total) as bar:
        try:
            for allocator in allocators:
                request = Request(
                    cases, providers, rounds, args.sample_ms * 1e-3, allocator, args.threads
                )
                measure(request, bar.emit, results)
        finally:
            # What was measured before an interruption is kept.
            if args.csv and results.rows:
                append(args.csv, results.rows)
    grids = ratios(results.rows)
    if args.times or not grids:
        grids += times(results.rows)
    for table in grids:
        console.print(table.rich())
        console.print()
    if args.markdown:
        text = "\n\n".join(table.markdown() for table in grids)
        args.markdown.write_text(text + "\n")
    for row, reason in results.wrong:
        console.print(
            f"[bold red]{row['provider']}[/], {row['mode']}, M = {row['M']}: {reason} No row.",
            highlight=False,
        )
    return 1 if results.wrong else 0


class _Bar:
    """A progress bar over the cases; plain lines where the output is no terminal."""

    def __init__(self, console: Console, cases: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=cases)

    def __enter__(self) -> _Bar:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def emit(self, event: str, fields: dict[str, Any]) -> None:
        """Shows an event of a worker."""
        match event:
            case "machine":
                self._console.print(
                    f"{fields['device']}, {fields['cpu_isa']}, {fields['threads']} threads, "
                    f"{fields['allocator']}; torch {fields['torch']}, PEFT {fields['peft']}, "
                    f"bitsandbytes {fields['bitsandbytes']}",
                    highlight=False,
                    soft_wrap=True,
                )
            case "case":
                self._progress.update(self._task, description=fields["text"])
                if not self._console.is_terminal:
                    self._console.print(fields["text"], highlight=False, soft_wrap=True)
            case "done":
                self._progress.advance(self._task)


# ---- arguments -------------------------------------------------------------------------------


def _providers(args: argparse.Namespace) -> list[str]:
    from .providers import PROVIDERS

    if not args.providers:
        return list(_QUICK_PROVIDERS if args.quick else _DEFAULT_PROVIDERS)
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


def _list_providers() -> int:
    from .providers import PROVIDERS

    for provider in PROVIDERS.values():
        print(f"{provider.name:<16} {provider.label}")
    return 0


def _current() -> str:
    """The allocator that LD_PRELOAD asks for."""
    preload = os.environ.get("LD_PRELOAD", "")
    return "tcmalloc" if "tcmalloc" in preload else "glibc"


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def _counts(text: str) -> list[int]:
    return [_count(word) for word in text.split(",")]


def _shares(text: str) -> list[float]:
    values = [float(word) for word in text.split(",")]
    for value in values:
        if not 0.0 <= value < 1.0:
            raise argparse.ArgumentTypeError(f"must be from 0 to below 1, got {value:g}")
    return values


def _pairs(text: str) -> list[tuple[int, int]]:
    pairs = []
    for word in text.split(":"):
        numbers = _counts(word)
        if len(numbers) != 2:
            raise argparse.ArgumentTypeError(f"expected N,K, got {word}")
        pairs.append((numbers[0], numbers[1]))
    return pairs


def _names(known: Any) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"expected {', '.join(known)}, got {word}")
        return words

    return names
