"""Verifies, tunes and measures on a GPU, in one command and under eight minutes.

    python -m benchmarks.measure.gpu --out DIR              verify, tune, measure
    python -m benchmarks.measure.gpu --out DIR --dry-run    the same, tiny, interpreted

Writes verify.csv, tune.csv, layers.csv (the columns of `fastlora bench`) and summary.json into DIR,
each row at once, so that an interrupted run keeps its rows. A stage whose time is up ends after the
current case; summary.json lists what it left out. Tuned choices go to DIR/cache, not to the user's
cache. Needs torch and Triton; PEFT and bitsandbytes are optional.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

# Shares of the time; measuring gets the rest.
_VERIFY_SHARE, _TUNE_SHARE = 0.3, 0.3
_BACKENDS = ("triton", "native")


# Names of `fastlora bench`. Compiling PEFT takes half a minute: it is done for the first case only.
_PROVIDERS = ("frozen", "frozen-dense", "peft", "peft-cast", "addmm", "fastlora-triton", "fastlora")
_FIRST_CASE_ONLY = ("compile",)


@dataclass(frozen=True)
class Plan:
    """What a run does: by default LoRAFusion's shapes.

    Args:
        verify: (M, N, K, R) on which every op is checked, with all dtypes and bases.
        shapes: N = K of the layers to tune and measure, the most important first.
        tokens, few: M of training, and of decoding.
        candidates: tiles to try for each problem; each takes a second to compile.
        rounds, sample_seconds: as in `fastlora bench`.
    """

    # One odd size and one of whole tiles are enough to verify every Triton kernel. The last three
    # split the sums of the native kernels.
    verify: Sequence[tuple[int, int, int, int]] = (
        (129, 259, 320, 24),
        (256, 256, 512, 16),
        (1, 96, 128, 64),
        (16, 256, 4096, 16),
        (256, 384, 2048, 16),
        (70, 2048, 128, 8),
    )
    shapes: Sequence[int] = (4096, 5120, 8192)
    tokens: Sequence[int] = (8192, 2048, 256, 512, 4096, 1024, 128)
    # A 4-bit weight is decoded inside the product of few tokens.
    few: Sequence[int] = (1, 16, 64, 4, 32)
    candidates: int = 7
    rounds: int = 7
    sample_seconds: float = 0.02


DRY = Plan(((17, 35, 64, 16),), (64,), (20,), (1,), candidates=3, rounds=1, sample_seconds=1e-6)


@dataclass
class Run:
    """One run: its folder, device ("cpu" in the interpreter), time and findings."""

    out: Path
    device: str
    plan: Plan
    seconds: float
    console: Console
    summary: dict[str, Any] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.start

    def stage(self, name: str, share: float, work: Callable[[Run, float], dict[str, Any]]) -> None:
        """Runs one stage up to `share` of the time; an error ends the stage, not the run."""
        begin = self.elapsed()
        try:
            facts = work(self, share * self.seconds)
        except Exception:
            facts = {"error": traceback.format_exc()}
        self.summary[name] = {"seconds": round(self.elapsed() - begin, 1), **facts}
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=1))
        self.console.print(f"{name}: {self.summary[name]}", highlight=False, soft_wrap=True)

    def write(self, name: str, row: dict[str, str]) -> None:
        """Appends a row to a CSV file, at once."""
        from fastlora.cli.bench.rows import append

        append(self.out / name, [row], list(row))


def environment(run: Run, until: float) -> dict[str, Any]:
    """Versions and the device."""
    import torch
    import triton

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "Triton's interpreter",
    }
    if run.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["processors"] = properties.multi_processor_count
    return facts


def verify(run: Run, until: float) -> dict[str, Any]:
    """Every op, base and dtype against the definition; a row for each cell of the table."""
    from fastlora.cli.verify.check import check, unsupported

    backends = [name for name in _BACKENDS if unsupported(name, run.device) is None]
    failures: list[str] = []
    done = 0
    for size in run.plan.verify:
        if run.elapsed() > until:
            break
        found = check(
            backends,
            run.device,
            sizes=(size,),
            stop=lambda: run.elapsed() > until,
            console=run.console,
        )
        for backend, results in found.items():
            for (op, base), cells in results.items():
                for column, cell in cells.items():
                    failures += cell.failures
                    row = {"size": " ".join(map(str, size)), "backend": backend, "op": op}
                    row |= {"base": base, "dtypes": column, "cases": str(cell.cases)}
                    row |= {"worst_error_over_bound": f"{cell.worst:.3g}"}
                    run.write("verify.csv", row | {"failures": str(len(cell.failures))})
        done += run.elapsed() <= until
    left_out = {name: unsupported(name, run.device) for name in _BACKENDS if name not in backends}
    facts = {"backends": backends, "left_out": left_out}
    return facts | {"whole_sizes": done, "of": len(run.plan.verify), "failures": failures}


def tune(run: Run, until: float) -> dict[str, Any]:
    """The candidates of each op at each shape; the winners go to the run's cache."""
    from fastlora.backends.triton.tuner import Problem
    from fastlora.cli.tune.gpu import tune as tune_one

    plan, wrong, done, left_out = run.plan, [], 0, Counter[str]()
    problems = [
        Problem(op, (M, width, width, 16))
        for width in plan.shapes
        for M in (*plan.tokens[:1], *plan.few[1:2], *plan.tokens[2:3])
        for op in ("lora_linear_fwd", "lora_linear_bwd", "qlora_linear_fwd", "qlora_linear_bwd")
    ]
    for problem in problems:
        if run.elapsed() > until:
            break
        outcome = tune_one(
            problem, run.device, min(plan.rounds, 5), plan.sample_seconds / 4, plan.candidates
        )
        wrong += outcome.wrong
        left_out.update(outcome.left_out)
        for name, seconds in outcome.seconds.items():
            row = {"problem": str(problem), "candidate": name, "ms": f"{seconds * 1e3:.4g}"}
            row |= {"kept": str(name == outcome.kept), "left_out": str(len(outcome.left_out))}
            run.write("tune.csv", row)
        done += 1
    return {"problems": done, "of": len(problems), "wrong": wrong, "left_out": dict(left_out)}


def measure(run: Run, until: float) -> dict[str, Any]:
    """Frozen layer, PEFT, addmm and fastlora, training sizes first; wrong results get no row."""
    from fastlora.cli.bench.case import Case, Layer
    from fastlora.cli.bench.measure import Bench
    from fastlora.cli.bench.plan import Budget
    from fastlora.cli.bench.providers import PROVIDERS
    from fastlora.cli.bench.rows import append, machine

    plan = run.plan
    facts = machine() | {"device": run.summary["environment"]["device"], "cpu_isa": ""}
    cases = [
        Case(Layer(width, width, quant=quant, dropout=dropout), M, mode)
        for width in plan.shapes
        for quant in ("none", "nf4")
        for mode, dropout, tokens in (("step", 0.1, plan.tokens), ("inference", 0.0, plan.few))
        for M in tokens
    ]
    done, refused = 0, {}
    wrong: list[str] = []
    bench = Bench(_PROVIDERS, Budget(plan.rounds, plan.sample_seconds), run.device)
    always = bench.providers
    for case in cases:
        if run.elapsed() > until:
            break
        first = case == cases[0] and plan is not DRY
        bench.providers = [*always, *(PROVIDERS[name] for name in _FIRST_CASE_ONLY if first)]
        written = []
        for row, reason in bench.rows(case, facts):
            name = row["provider"]
            if reason is not None:
                refused[name] = reason.reason
                wrong += [f"{case}: {name}: {reason.reason}"] if reason.wrong else []
            else:
                peak = _peak_mb(bench.timed[name][0]) if run.device == "cuda" else ""
                written.append(row | {"peak_mb": peak})
        append(run.out / "layers.csv", written)
        done += 1
    return {"cases": done, "of": len(cases), "left_out": refused, "wrong": wrong}


def _peak_mb(call: Callable[[], object]) -> str:
    """Memory that one call allocates at its peak, in MiB."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; 1 if a result was wrong or a stage failed, 2 without a GPU."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, in the interpreter")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for all stages (7.5)")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out: {args.out} is not empty")
    if args.dry_run:
        # Before Triton is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["FASTLORA_CACHE"] = str(args.out.resolve() / "cache")
    from fastlora.backends import BACKENDS
    from fastlora.backends.contract import Request

    device, plan = ("cpu", DRY) if args.dry_run else ("cuda", Plan())
    if reason := BACKENDS["triton"].unsupported(Request("lora_linear_fwd", device)):
        parser.error(reason)
    run = Run(args.out, device, plan, args.minutes * 60, Console())
    run.stage("environment", 1.0, environment)
    run.stage("verify", _VERIFY_SHARE, verify)
    run.stage("tune", _VERIFY_SHARE + _TUNE_SHARE, tune)
    run.stage("measure", 1.0, measure)
    facts = run.summary.values()
    bad = any(f.get("error") or f.get("failures") or f.get("wrong") for f in facts)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
