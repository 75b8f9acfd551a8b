"""PEFT beside fastlora: the same run twice, a step of one, then a step of the other.

Each backend has a process of its own. Its peak memory is then its own, and neither affects the
other's allocator, random numbers or threads. Only one of them works at a time: a worker waits at a
gate before each step, and the order alternates with every step.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..process import Died, Leader, Worker, merged, on_stop_signal
from .job import BACKENDS, Diverged, Job, Observer, Stopped
from .records import LOG_FILE, read_log, update_run
from .training import train

WORKER_LOG = "worker.log"


def compare(job: Job, observer: Observer, *, resume: bool) -> dict[str, Any]:
    """Runs `job` with each backend in `job.out/<backend>` and returns the results by backend.

    Raises:
        CliError: an argument is wrong. Stopped: interrupted, both have saved. Diverged: the loss of
            one is not finite.
        RuntimeError: a worker failed, or the two did not start from the same adapter and data.
    """
    asked = False

    def stop() -> None:
        nonlocal asked
        asked = True
        for run in runs:
            run.worker.interrupt()

    with ExitStack() as stack:
        runs = [_Run(backend, _worker(job, backend, resume, stack)) for backend in BACKENDS]
        stack.enter_context(on_stop_signal(stop))
        try:
            for index, (event, fields) in merged([run.worker for run in runs]):
                runs[index].note(event, fields)
                observer.emit(event, backend=runs[index].backend, **fields)
                if (diverged := runs[index].diverged) is not None:
                    raise diverged
                _open_gates(runs, lambda: update_run(Path(job.out), job=job.as_dict()))
        except Died:
            if asked:
                # The signal came before the worker could handle it.
                raise KeyboardInterrupt from None
            raise
    if any(run.stopped for run in runs):
        raise Stopped(min(run.step for run in runs), max(run.steps for run in runs))
    results: dict[str, Any] = {run.backend: run.result for run in runs}
    results["ratio"] = ratio(Path(job.out))
    return results


def work(request: dict[str, Any], leader: Leader) -> dict[str, Any] | None:
    """One run, in a worker. One that ends early sends "stopped" or "diverged", and returns None."""
    try:
        return train(Job(**request["job"]), leader, resume=request["resume"])
    except Stopped as stopped:
        leader.emit("stopped", step=stopped.step, steps=stopped.steps)
        return None
    except Diverged as diverged:
        step, loss, saved = diverged.args
        leader.emit("diverged", step=step, loss=loss, saved=saved)
        return None


def paired_steps(out: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The log entries of PEFT and fastlora, step by step."""
    peft, fastlora = (
        {entry["step"]: entry for entry in read_log(out / backend / LOG_FILE)}
        for backend in BACKENDS
    )
    return [(peft[step], fastlora[step]) for step in sorted(peft.keys() & fastlora.keys())]


def ratio(out: Path) -> dict[str, float] | None:
    """PEFT's time over fastlora's, step by step: median, 20th and 80th percentile, number of steps.

    The first step after a start warms up and does not count. None if there is no other step.
    """
    ratios = sorted(
        peft["seconds"] / fastlora["seconds"]
        for peft, fastlora in paired_steps(out)
        if not (peft["first"] or fastlora["first"])
    )
    if not ratios:
        return None
    last = len(ratios) - 1
    return {
        "median": statistics.median(ratios),
        "p20": ratios[round(0.2 * last)],
        "p80": ratios[round(0.8 * last)],
        "steps": len(ratios),
    }


# ---- leading the workers ---------------------------------------------------------------------


@dataclass
class _Run:
    """A worker, and what it has reported so far."""

    backend: str
    worker: Worker
    gate: str | None = None
    step: int = 0
    steps: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    stopped: bool = False
    diverged: Diverged | None = None

    def go(self) -> None:
        """Lets the worker through its gate."""
        self.gate = None
        self.worker.go()

    def note(self, event: str, fields: dict[str, Any]) -> None:
        """Notes what an event reports."""
        match event:
            case "gate":
                self.gate, self.step = fields["name"], fields["step"]
            case "begin":
                self.steps = fields["steps"]
            case "step":
                self.step = fields["step"]
            case "facts":
                self.facts = fields
            case "result":
                self.result = fields["result"]
            case "stopped":
                self.stopped, self.step = True, fields["step"]
            case "diverged":
                self.stopped, self.diverged = True, Diverged(**fields)


def _worker(job: Job, backend: str, resume: bool, stack: ExitStack) -> Worker:
    out = Path(job.out) / backend
    out.mkdir(parents=True, exist_ok=True)
    part = dataclasses.replace(job, backend=backend, out=str(out))
    request = {"job": part.as_dict(), "resume": resume}
    log = stack.enter_context((out / WORKER_LOG).open("w"))
    return stack.enter_context(Worker(backend, __name__, request, log))


def _open_gates(runs: Sequence[_Run], accepted: Callable[[], None]) -> None:
    """Lets the next worker go, once all that still run are waiting.

    Args:
        accepted: called when all are ready to start.
    """
    running = [run for run in runs if not (run.stopped or run.result is not None)]
    if not running or any(run.gate is None for run in running):
        return
    if all(run.gate == "start" for run in running):
        _check_same_start(running)
        accepted()
    stepping = [run for run in running if run.gate == "step"]
    if not stepping:
        # One evaluates at a time: together they would compete for the cores.
        evaluating = [run for run in running if run.gate != "start"]
        for run in evaluating[:1] or running:
            run.go()
        return
    # The one that is behind goes first (it was resumed from an earlier save, or the other has just
    # stepped). At the same step the order alternates: A B, B A, A B, ...
    behind = min(run.step for run in stepping)
    candidates = [run for run in stepping if run.step == behind]
    candidates[-1 if behind % 2 else 0].go()


def _check_same_start(runs: Sequence[_Run]) -> None:
    for fact in ("data_digest", "adapter_digest"):
        if len({run.facts[fact] for run in runs}) > 1:
            raise RuntimeError(f"the backends differ in {fact} before the first step")
