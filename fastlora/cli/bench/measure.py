"""Interleaved timing: rounds in which every provider runs once, and a ratio for each round.

`work` runs in a worker. Its events are "machine", and for each case "case", "tick", "row" or
"refused", "done".
"""

from __future__ import annotations

import gc
import itertools
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..process import Leader
from .case import BASELINES, Case
from .check import fault
from .inputs import ROTATE_UP_TO, Built, Setup
from .plan import Budget, Plan
from .providers import PROVIDERS, Provider
from .rows import Row, case_row, machine, timed_row

# A sample that the system interrupted is repeated, up to this many times, unless it is so long that
# a repetition would be interrupted too.
_RETRIES = 2
_TOO_LONG_TO_RETRY = 0.2


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one provider, by round, and the calls of a sample."""

    seconds: list[float]
    calls: int

    def over(self, other: Timing) -> list[float]:
        """This time / the other's, round by round."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]


@dataclass(frozen=True)
class Refused:
    """A provider that was not timed: it can't run the case, or its result was wrong."""

    reason: str
    wrong: bool


Outcome = Timing | Refused
Calls = list[Callable[[], object]]


def work(request: dict[str, Any], leader: Leader) -> None:
    """Times the layers of `request["plan"]`."""
    plan = Plan.from_dict(request["plan"])
    if plan.threads:
        torch.set_num_threads(plan.threads)
    bench = Bench(plan.providers, plan.budget)
    shared = {**machine(), "allocator": request["allocator"]}
    leader.emit("machine", **shared)
    for case in plan.cases:
        able = [name for name in plan.providers if case.mode in PROVIDERS[name].modes]
        leader.emit("case", text=str(case), samples=plan.budget.rounds * len(able))
        for row, refused in bench.rows(case, shared, lambda: leader.emit("tick")):
            if refused is None:
                leader.emit("row", row=row)
            else:
                leader.emit("refused", row=row, reason=refused.reason, wrong=refused.wrong)
        leader.emit("done")


class Bench:
    """Times cases; keeps the weights and layers of the last layer for the next case.

    Args:
        providers: names in PROVIDERS.
        budget: how long to measure.
        device: "cpu" or "cuda".
    """

    def __init__(self, providers: Sequence[str], budget: Budget, device: str = "cpu") -> None:
        self.providers = [PROVIDERS[name] for name in providers]
        self.budget = budget
        self.device = device
        # The calls of the last case, by provider.
        self.timed: dict[str, Calls] = {}
        self._setup: Setup | None = None
        self._built: dict[str, list[Built]] = {}

    def run(self, case: Case, tick: Callable[[], None] = lambda: None) -> dict[str, Outcome]:
        """Checks every provider, then times those whose result is right.

        Args:
            case: what to time.
            tick: called after every sample.
        """
        prepared = self.calls(case)
        refused = {name: what for name, what in prepared.items() if isinstance(what, Refused)}
        self.timed = {n: what for n, what in prepared.items() if not isinstance(what, Refused)}
        return refused | interleave(self.timed, self.budget, tick, wait=waits_for(self.device))

    def rows(
        self, case: Case, shared: Row, tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Row, Refused | None]]:
        """Runs a case; yields each provider's row and, if it was refused, the refusal.

        Args:
            case, tick: as in `run`.
            shared: the columns of the machine.
        """
        outcomes = self.run(case, tick)
        base = outcomes.get(BASELINES[case.mode])
        baseline = base.seconds if isinstance(base, Timing) else None
        for name, outcome in outcomes.items():
            what = case_row(case, name, PROVIDERS[name].adapter_dtype(case.layer))
            if isinstance(outcome, Refused):
                yield what, outcome
            else:
                yield timed_row(shared | what, outcome.seconds, outcome.calls, baseline), None

    def calls(self, case: Case) -> dict[str, Calls | Refused]:
        """The checked calls to time, by provider, one for each copy of the weight."""
        if self._setup is None or self._setup.layer != case.layer:
            self._built.clear()
            if self._setup is not None:
                # Calls that are still in use keep the setup alive, but need no more checks.
                self._setup.__dict__.pop("exact_weight", None)
            self._setup = None
            gc.collect()
            self._setup = Setup(case.layer, device=self.device)
        return {
            provider.name: self._prepare(provider, self._setup, case)
            for provider in self.providers
            if case.mode in provider.modes
        }

    def _prepare(self, provider: Provider, setup: Setup, case: Case) -> Calls | Refused:
        if (reason := provider.why_not(case, self.device)) is not None:
            return Refused(reason, wrong=False)
        if provider.once or provider.name not in self._built:
            copies = 1 if provider.once else len(setup.weights)
            self._built[provider.name] = [provider.build(setup, i) for i in range(copies)]
        built = self._built[provider.name]
        if (reason := fault(provider, built[0], setup, case)) is not None:
            return Refused(reason, wrong=True)
        used = built if case.M <= ROTATE_UP_TO else built[:1]
        return [_call(layer, setup, case) for layer in used]


def waits_for(device: str) -> Callable[[], None]:
    """A function that waits until `device` has finished its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _call(built: Built, setup: Setup, case: Case) -> Callable[[], object]:
    """The call to time."""
    x, dy = setup.tokens(case.M)
    call, adapter = built.call, built.adapter
    built.train(case.mode != "inference")
    if case.mode == "inference":

        def inference() -> object:
            with torch.no_grad():
                return call(x)

        return inference
    leaf = x.detach().requires_grad_()
    leaves = (leaf, *adapter)
    match case.mode:
        case "forward" | "dequantize":
            return lambda: call(leaf)
        case "step":
            return lambda: torch.autograd.grad(call(leaf), leaves, dy)
        case "backward":
            y = call(leaf)
            return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    raise ValueError(f"mode must be forward, backward, step or inference, got {case.mode!r}")


def interleave(
    timed: dict[str, Calls],
    budget: Budget,
    tick: Callable[[], None] = lambda: None,
    switch: Callable[[str], None] = lambda name: None,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Times all of `timed` in rounds; each round runs each once, in a rotated order.

    Args:
        timed: name -> calls that do the same on different copies of the weight, used in turn.
        budget: how long to measure.
        tick: called after every sample.
        switch: called with the name before each sample; not timed.
        wait: waits until the device has finished; ends each sample.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        turns = {name: itertools.cycle(calls) for name, calls in timed.items()}
        calls: dict[str, int] = {}
        for name in timed:
            switch(name)
            calls[name] = _calls(turns[name], len(timed[name]), budget, wait)
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        names = list(timed)
        for number in range(budget.rounds):
            shift = number % max(1, len(names))
            order = names[shift:] + names[:shift]
            for name in order if number % 2 == 0 else order[::-1]:
                switch(name)
                seconds[name].append(_sample(turns[name], calls[name], wait))
                tick()
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(seconds[name], calls[name]) for name in timed}


def _calls(
    turn: Iterator[Callable[[], object]], copies: int, budget: Budget, wait: Callable[[], None]
) -> int:
    """The number of calls in a sample, after one call of each copy to warm up."""
    for _ in range(copies):
        next(turn)()
    wait()
    calls = 1
    while (elapsed := calls * _once(turn, calls, wait)) < 0.25 * budget.sample_seconds:
        calls *= 4
    return max(1, round(calls * budget.sample_seconds / elapsed + 0.5))


def _sample(turn: Iterator[Callable[[], object]], calls: int, wait: Callable[[], None]) -> float:
    """Seconds a call, from the try that was interrupted least."""
    tries: list[tuple[int, float]] = []
    for _ in range(_RETRIES + 1):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        seconds = _once(turn, calls, wait)
        interrupted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
        if not interrupted or seconds * calls > _TOO_LONG_TO_RETRY:
            return seconds
        tries.append((interrupted, seconds))
    return min(tries)[1]


def _once(turn: Iterator[Callable[[], object]], calls: int, wait: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        next(turn)()
    wait()
    return (time.perf_counter_ns() - start) * 1e-9 / calls
