"""Measures suites (or any layer) and appends the rows to benchmarks/results/<device>.csv.

python -m benchmarks.measure.run                     the suite `main`
python -m benchmarks.measure.run decode memory       these suites
python -m benchmarks.measure.run all                 every suite: hours
python -m benchmarks.measure.run --shape 4096,4096 --tokens 16,512 --quant nf4
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path

from fastlora.cli import info
from fastlora.cli.bench import command as bench
from fastlora.cli.bench.allocators import ALLOCATORS, tcmalloc
from fastlora.cli.bench.case import Case, grid
from fastlora.cli.bench.execute import execute
from fastlora.cli.bench.plan import ModelPlan, Plan
from fastlora.cli.errors import CliError

from ..shapes import SUITES

RESULTS = Path(__file__).parents[1] / "results"


def results_file() -> Path:
    """The file of this machine: its processor's name and how many there are."""
    facts = info.collect()["machine"]
    name = f"{facts['cpu'] or platform.machine()} {facts['cpus for this process']} cores"
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".csv")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure.run",
        description=__doc__,
        epilog="\n".join(f"  {name:<12} {suite.what}" for name, suite in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="one of those below, or all")
    bench.add_options(parser)
    args = parser.parse_args(argv)
    if args.providers == "list":
        return bench.run(args)
    try:
        return execute(_plans(args), replace(bench.output_of(args), csv=args.csv or results_file()))
    except CliError as error:
        parser.error(str(error))


def _plans(args: argparse.Namespace) -> list[Plan] | list[ModelPlan]:
    if not args.allocators:
        args.allocators = [name for name in ALLOCATORS if name != "tcmalloc" or tcmalloc()]
    if args.model:
        return [bench.model_plan_of(args)]
    if args.shape or args.quick:
        if args.suites:
            raise CliError(f"{args.suites[0]}: give suites, or --shape or --quick")
        return [bench.plan_of(args, bench.cases_of(args))]
    names = args.suites or ["main"]
    if "all" in names:
        names = list(SUITES)
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise CliError(f"{unknown[0]}: no such suite; there are {', '.join(SUITES)}")
    plans = []
    for name in names:
        suite = SUITES[name]
        plan = bench.plan_of(args, _narrowed(suite.cases(), args))
        providers = plan.providers if args.providers else suite.providers
        plans.append(replace(plan, providers=providers, memory=suite.memory or args.memory))
    return plans


def _narrowed(cases: list[Case], args: argparse.Namespace) -> list[Case]:
    """The cases of a suite at other numbers of tokens, or in other modes, where asked for."""
    layers = list(dict.fromkeys(case.layer for case in cases))
    tokens = args.tokens or sorted({case.M for case in cases})
    modes = args.mode or list(dict.fromkeys(case.mode for case in cases))
    return grid(layers, tokens, modes)


if __name__ == "__main__":
    sys.exit(main())
