"""Tunes the C++ CPU kernels: searches for tile sizes that are faster on given layers."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...backends.machine import cpu
from ..bench.case import PASSES, Case, Layer, grid
from ..bench.measure import Bench, Calls, Refused, interleave
from ..bench.plan import Budget
from ..console import wide_console
from ..errors import CliError

TOKENS = (1, 16, 128, 512)
MODES = ("forward", "step")

Sizes = Mapping[str, int]

# A candidate wins if it gains this much over all cases and loses at most this much on any. Less
# can't be told from noise.
_GAIN, _LOSS = 1.01, 0.97


@dataclass(frozen=True)
class Comparison:
    """Time with one set of sizes / time with another, for each case; medians of the rounds."""

    ratios: dict[Case, float]

    @property
    def gain(self) -> float:
        """The geometric mean over the cases."""
        return statistics.geometric_mean(self.ratios.values())

    @property
    def worst(self) -> float:
        """The least ratio."""
        return min(self.ratios.values())

    @property
    def wins(self) -> bool:
        """Whether the other sizes are better."""
        return self.gain >= _GAIN and self.worst >= _LOSS


# Times sizes against named candidates: one comparison for each.
Compare = Callable[[Sizes, Mapping[str, Sizes]], dict[str, Comparison]]


def run(args: argparse.Namespace, shapes: Sequence[tuple[int, int]]) -> int:
    """Measures, keeps faster sizes, prints the result; 1 if a result was wrong."""
    from ... import _C

    library = _C
    layers = [
        Layer(N, K, R, args.dtype, quant, True, args.dropout, "fp32")
        for N, K in shapes
        for quant in args.quant
        for R in args.rank
    ]
    cases = grid(layers, args.tokens or list(TOKENS), list(MODES))
    isa = library.build_info()["cpu_isa"]
    before = library.tile_sizes()
    console = wide_console()
    timer = _Timer(cases, Budget(args.rounds, args.sample_ms * 1e-3), library.set_tile_sizes)
    trials = Table("size", "before", "tried", "time before / tried", "worst case", box=None)
    try:
        best = dict(before)
        try:
            for name in _shown(console, list(before)):
                compare = _recorded(timer.compare, name, trials)
                best = climb(name, best, compare, _accepted(library.set_tile_sizes))
        except KeyboardInterrupt:
            if best == before:
                raise
            console.print("Stopped; what was found so far is compared and kept.")
        final = timer.compare(before, {"tuned": best})["tuned"]
        if not final.wins:
            console.print(trials)
            if best != before:
                console.print(_table(final))
            console.print(f"Nothing is faster than the sizes in use on {isa}; nothing was stored.")
            return 0
        if fault := timer.fault(best):
            console.print(f"[bold red]wrong[/] with {best}: {fault}", highlight=False)
            return 1
    finally:
        library.set_tile_sizes(**before)
    console.print(_table(final))
    for name in before:
        if best[name] != before[name]:
            console.print(f"{name}: {before[name]} -> {best[name]}", highlight=False)
    console.print(f"Kept for {isa} in {cpu.keep(isa, best)}", soft_wrap=True, highlight=False)
    return 0


def _shown(console: Console, names: Sequence[str]) -> Iterator[str]:
    """The names, with a progress bar that says which is at work."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tuning", total=len(names))
        for name in names:
            progress.update(task, description=name)
            yield name
            progress.advance(task)


def climb(
    name: str, sizes: Sizes, compare: Compare, accepts: Callable[[Sizes], bool]
) -> dict[str, int]:
    """`sizes` with size `name` halved or doubled for as long as that is faster.

    Args:
        name: of the size to change.
        sizes: to start from.
        compare: times candidates.
        accepts: whether the kernels can use given sizes.
    """
    best = dict(sizes)

    def usable(**values: int) -> dict[str, dict[str, int]]:
        # Half or double of 0 is 0 again.
        tried = {step: {**best, name: value} for step, value in values.items()}
        return {step: each for step, each in tried.items() if each != best and accepts(each)}

    candidates = usable(half=best[name] // 2, double=best[name] * 2)
    while candidates:
        found = compare(best, candidates)
        step = max(found, key=lambda candidate: found[candidate].gain)
        if not found[step].wins:
            break
        best = dict(candidates[step])
        candidates = usable(**{step: best[name] // 2 if step == "half" else best[name] * 2})
    return best


def _recorded(compare: Compare, name: str, trials: Table) -> Compare:
    """`compare`, which also adds a line to `trials` for each value of size `name`."""

    def recorded(sizes: Sizes, candidates: Mapping[str, Sizes]) -> dict[str, Comparison]:
        found = compare(sizes, candidates)
        for step, it in found.items():
            values = str(sizes[name]), str(candidates[step][name])
            trials.add_row(name, *values, f"{it.gain:.3f}", f"{it.worst:.2f}")
        return found

    return recorded


def _accepted(use: Callable[..., None]) -> Callable[[Sizes], bool]:
    """Whether the kernels accept given sizes. Accepted sizes stay set."""

    def accepts(sizes: Sizes) -> bool:
        try:
            use(**sizes)
        except ValueError:
            return False
        return True

    return accepts


class _Timer:
    """Times cases under different tile sizes.

    Args:
        cases: what to time; their results are checked first.
        budget: how long.
        use: sets the kernels' sizes.

    Raises:
        CliError: a case can't run, or its result is wrong.
    """

    def __init__(self, cases: Sequence[Case], budget: Budget, use: Callable[..., None]) -> None:
        self._bench = Bench(["fastlora"], budget)
        self._use = use
        self._calls = {case: self._checked(case) for case in cases}

    def compare(self, sizes: Sizes, candidates: Mapping[str, Sizes]) -> dict[str, Comparison]:
        """Time with `sizes` / time with each candidate."""
        found: dict[str, dict[Case, float]] = {name: {} for name in candidates}
        every = {"": sizes, **candidates}
        for case, calls in self._calls.items():
            times = interleave(
                dict.fromkeys(every, calls),
                self._bench.budget,
                switch=lambda name: self._use(**every[name]),
            )
            for name in candidates:
                found[name][case] = statistics.median(times[""].over(times[name]))
        return {name: Comparison(ratios) for name, ratios in found.items()}

    def fault(self, sizes: Sizes) -> str | None:
        """The first error of the results under `sizes`, by the error policy, or None."""
        self._use(**sizes)
        try:
            for case in self._calls:
                self._checked(case)
        except CliError as error:
            return str(error)
        return None

    def _checked(self, case: Case) -> Calls:
        calls = self._bench.calls(case)["fastlora"]
        if isinstance(calls, Refused):
            raise CliError(f"{case}: {calls.reason}")
        return calls


def _table(final: Comparison) -> Table:
    table = Table("layer", "pass", "tokens", "time before / tuned", box=None)
    for case, ratio in final.ratios.items():
        table.add_row(str(case.layer), PASSES[case.mode], str(case.M), f"{ratio:.2f}")
    table.add_row("all", "", "", f"{final.gain:.3f}")
    return table
