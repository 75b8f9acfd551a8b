"""What a call of an accelerated PEFT layer costs beside PEFT's own call, where kernels are short.

    python -m benchmarks.measure.call_cost             # the ratios, and 20th to 80th percentile
    python -m benchmarks.measure.call_cost --parts     # and microseconds of each part of a call
    python -m benchmarks.measure.call_cost --check     # exits with 1 if a ratio is above its bound
    python -m benchmarks.measure.call_cost --only nf4  # the cases whose name has that in it

One token, K = N, rank 8, a bf16 base under fp32 adapters, no dropout, one thread. Each round times
a millisecond of PEFT's layer and of the same layer on fastlora, one after the other. A time is the
10th percentile of its rounds, those that nothing else on the machine has disturbed, and the ratio
is that of the two times; in brackets, the percentiles of the ratios of single rounds. At 64
features nearly all of either time is Python and dispatch. The bounds are in gates/call_cost.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlora
from fastlora import ops
from fastlora.autograd.common import working
from fastlora.autograd.linear import linear
from fastlora.cli.bench.baselines import peft_layer
from fastlora.cli.bench.case import Layer
from fastlora.cli.bench.inputs import Setup
from fastlora.cli.bench.measure import Timing, interleave
from fastlora.cli.bench.plan import Budget
from fastlora.cli.bench.rows import quantiles
from fastlora.integrations.peft.plan.plan import plan
from fastlora.integrations.peft.plan.reasons import LAST_REASON
from fastlora.integrations.peft.run.linear import one_call, run

BOUNDS = Path(__file__).parents[1] / "gates" / "call_cost.csv"
WIDTHS = (64, 576)
BASES = {"dense": "none", "nf4": "nf4"}
MODES = ("no grad", "forward", "step")
_RANK = 8
_BUDGET = Budget(rounds=201, sample_seconds=0.001)
# A ratio above its bound is measured again, so many times in all.
_TRIES = 3


@dataclass(frozen=True)
class Case:
    """A base, a width and a mode: "no grad", "forward" with gradients, "step" with backward."""

    base: str
    width: int
    mode: str

    def __str__(self) -> str:
        return f"{self.base} {self.width} {self.mode}"


CASES = [Case(base, width, mode) for base in BASES for width in WIDTHS for mode in MODES]


class Pair:
    """PEFT's layer and the same on fastlora, with the input of their calls."""

    def __init__(self, case: Case) -> None:
        shape = Layer(case.width, case.width, _RANK, quant=BASES[case.base])
        setup = Setup(shape, copies=1)
        self.case = case
        self.stock = peft_layer(setup, 0, torch.float32).train()
        self.fast = fastlora.accelerate(peft_layer(setup, 0, torch.float32), verbose=False).train()
        self.x, self.dy = setup.tokens(1)
        self.x.requires_grad_(case.mode != "no grad")
        ours, theirs = self.fast(self.x), self.stock(self.x)
        if self.fast.__dict__[LAST_REASON]:
            raise RuntimeError(f"{case}: {self.fast.__dict__[LAST_REASON]}")
        if (ours - theirs).float().norm() > 0.02 * theirs.float().norm():
            raise RuntimeError(f"{case}: the results differ")

    def mode(self) -> AbstractContextManager[Any]:
        """What surrounds the calls."""
        return torch.no_grad() if self.case.mode == "no grad" else nullcontext()

    def call(self, layer: nn.Module) -> Callable[[], object]:
        """One call of `layer`."""
        x = self.x
        if self.case.mode != "step":
            return lambda: layer(x)
        leaves = (x, *(p for p in layer.parameters() if p.requires_grad))
        return lambda: torch.autograd.grad(layer(x), leaves, self.dy)

    def timed(self) -> dict[str, Timing]:
        """Seconds a call of both, round by round."""
        calls = {"peft": [self.call(self.stock)], "fastlora": [self.call(self.fast)]}
        with self.mode():
            return interleave(calls, _BUDGET)

    def parts(self) -> dict[str, float]:
        """Microseconds of a call and of its parts: plan and run; run has layer and autograd in it,
        and autograd has op."""
        layer, x = self.fast, self.x
        with self.mode():
            found = plan(layer, x, (), {})
            if isinstance(found, str):
                raise RuntimeError(found)
            as_layer = one_call(found, x)
            rows = x.detach()
            stages: dict[str, Callable[[], object]] = {
                "call": lambda: layer(x),
                "plan": lambda: plan(layer, x, (), {}),
                "run": lambda: run(found, x),
                "layer": lambda: one_call(found, x),
                "autograd": lambda: linear(x, as_layer),
                "op": lambda: ops.lora_linear_fwd(rows, working(as_layer)),
            }
            timings = interleave({name: [stage] for name, stage in stages.items()}, _BUDGET)
        return {name: microseconds(timing) for name, timing in timings.items()}


def microseconds(timing: Timing) -> float:
    """The 10th percentile of the rounds."""
    return 1e6 * statistics.quantiles(timing.seconds, n=10)[0]


def bounds() -> dict[str, float]:
    """The bound of each case, by its name."""
    with BOUNDS.open() as file:
        rows = csv.DictReader(file)
        return {f"{r['base']} {r['width']} {r['mode']}": float(r["bound"]) for r in rows}


def measured(pair: Pair, bound: float | None) -> tuple[float, str]:
    """The ratio of a case, and a line about it."""
    for _ in range(1 if bound is None else _TRIES):
        timed = pair.timed()
        peft, ours = microseconds(timed["peft"]), microseconds(timed["fastlora"])
        if bound is None or ours <= bound * peft:
            break
    low, _, high = quantiles(timed["fastlora"].over(timed["peft"]))
    what = f"{pair.case!s:<18} {peft:7.1f} {ours:9.1f}"
    return ours / peft, f"{what}   {ours / peft:5.2f}  ({low:.2f} to {high:.2f})"


def lines(names: str, check: bool, parts: bool) -> Iterator[tuple[str, bool]]:
    """What is printed, and whether it is a ratio above its bound."""
    allowed = bounds() if check else {}
    for case in CASES:
        if names in str(case):
            pair = Pair(case)
            bound = allowed.get(str(case))
            ratio, line = measured(pair, bound)
            too_dear = bound is not None and ratio > bound
            yield line + (f"  above {bound}" if too_dear else ""), too_dear
            if parts and case.mode != "step":
                found = ", ".join(f"{name} {us:.1f}" for name, us in pair.parts().items())
                yield f"    {found}", False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure.call_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--check", action="store_true", help="exit with 1 above a bound")
    parser.add_argument("--parts", action="store_true", help="microseconds of each part of a call")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(f"{'':<18} {'PEFT us':>7} {'fastlora':>9}   ratio")
        failed = 0
        for line, too_dear in lines(args.only, args.check, args.parts):
            print(line, flush=True)
            failed += too_dear
    finally:
        torch.set_num_threads(threads)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
