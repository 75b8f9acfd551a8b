"""`python -m fastlora.cli.bench.worker`: times layers, in a process of its own; see `pipe`.

Takes a `Request`. Events: "machine", and for every case "case", "tick", "row" or "refused", "done".
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from ..process import Emit, serve
from .case import BASELINES, Case


@dataclass(frozen=True)
class Request:
    """What a worker has to do.

    Args:
        cases: what to time, in this order.
        providers: by name; the baseline's time is what ratios are taken to.
        rounds, sample_seconds: as in `measure.Budget`.
        allocator: what it runs under, for the rows.
        threads: of torch; None for torch's own choice.
    """

    cases: list[Case]
    providers: list[str]
    rounds: int
    sample_seconds: float
    allocator: str
    threads: int | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Request:
        """Undoes `as_dict`."""
        return cls(**{**fields, "cases": [Case.from_dict(case) for case in fields["cases"]]})


def _work(fields: dict[str, Any], emit: Emit) -> None:
    request = Request.from_dict(fields)
    import torch

    if request.threads:
        torch.set_num_threads(request.threads)
    from .measure import Bench, Budget, Refused
    from .providers import PROVIDERS
    from .rows import COLUMNS, case_row, machine, timing_columns

    bench = Bench(request.providers, Budget(request.rounds, request.sample_seconds))
    shared = {**machine(), "allocator": request.allocator}
    emit("machine", shared)
    for case in request.cases:
        able = [name for name in request.providers if case.mode in PROVIDERS[name].modes]
        emit("case", {"text": str(case), "samples": request.rounds * len(able)})
        outcomes = bench.run(case, lambda: emit("tick", {}))
        base = outcomes.get(BASELINES[case.mode])
        baseline = None if base is None or isinstance(base, Refused) else base.seconds
        for name, outcome in outcomes.items():
            what = case_row(case, name, PROVIDERS[name].adapter_dtype(case.layer))
            if isinstance(outcome, Refused):
                refused = {"row": what, "reason": outcome.reason, "wrong": outcome.wrong}
                emit("refused", refused)
                continue
            columns = timing_columns(outcome.seconds, baseline)
            row = dict.fromkeys(COLUMNS, "") | shared | what | columns
            emit("row", {"row": {**row, "calls": str(outcome.calls)}})
        emit("done", {})


if __name__ == "__main__":
    sys.exit(serve(_work))
