"""`python -m fastlora.cli.bench.worker`: measures in a process of its own, led through pipes.

The allocator is chosen when a process starts, and peak memory belongs to a process, hence this.
Comes in on stdin: a `Request`, as one line of JSON. Goes out on stdout: one JSON object a line,
{"event": "machine" | "case" | "tick" | "row" | "refused" | "error", ...}. What libraries print
goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from typing import Any, TextIO

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

    def as_json(self) -> str:
        """One line."""
        return json.dumps({**asdict(self), "cases": [case.as_dict() for case in self.cases]})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Undoes `as_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "cases": [Case.from_dict(case) for case in fields["cases"]]})


class _Events:
    def __init__(self, file: TextIO) -> None:
        self._file = file

    def emit(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}) + "\n")
        self._file.flush()


def main() -> int:
    """Does the request on stdin; returns the exit status."""
    events = _Events(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    try:
        _measure(Request.from_json(sys.stdin.readline()), events)
    except Exception as error:
        traceback.print_exc()
        events.emit("error", text=f"{type(error).__name__}: {error}")
        return 1
    return 0


def _measure(request: Request, events: _Events) -> None:
    import torch

    if request.threads:
        torch.set_num_threads(request.threads)
    from .measure import Bench, Budget, Refused
    from .providers import PROVIDERS
    from .rows import COLUMNS, case_row, machine, timing_columns

    bench = Bench(request.providers, Budget(request.rounds, request.sample_seconds))
    shared = {**machine(), "allocator": request.allocator}
    events.emit("machine", **shared)
    for case in request.cases:
        events.emit("case", text=str(case))
        outcomes = bench.run(case, lambda: events.emit("tick"))
        base = outcomes.get(BASELINES[case.mode])
        baseline = None if base is None or isinstance(base, Refused) else base.seconds
        for name, outcome in outcomes.items():
            what = case_row(case, name, PROVIDERS[name].adapter_dtype(case.layer))
            if isinstance(outcome, Refused):
                events.emit("refused", row=what, reason=outcome.reason, wrong=outcome.wrong)
                continue
            columns = timing_columns(outcome.seconds, baseline)
            row = dict.fromkeys(COLUMNS, "") | shared | what | columns
            events.emit("row", row={**row, "calls": str(outcome.calls)})
        events.emit("done")


if __name__ == "__main__":
    sys.exit(main())
