"""PEFT beside fastlora: the same run twice, a step of one, a step of the other, in turn.

Each backend has a process of its own, so that its peak memory is its own and nothing that one does
to the allocator, the random numbers or the threads reaches the other. Only one of them works at a
time: a worker waits at a gate before each step, and the order turns round with every step.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import signal
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import CliError
from ..process import on_stop_signal
from .job import BACKENDS, Job, Observer, Stopped
from .records import LOG_FILE, read_log

WORKER_LOG = "worker.log"
_COMMAND = (sys.executable, "-m", "fastlora.cli.finetune.worker")


@dataclass
class _Worker:
    backend: str
    process: subprocess.Popen[str]
    log: IO[str]
    gate: str | None = None
    step: int = 0
    steps: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    stopped: bool = False
    ended: bool = False

    def go(self) -> None:
        """Lets the worker through its gate."""
        self.gate = None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            # It has died; the end of its stdout says so.
            return


def compare(job: Job, observer: Observer, *, resume: bool) -> dict[str, Any]:
    """Runs `job` with each backend in `job.out/<backend>` and returns the results by backend.

    Raises:
        CliError: an argument is wrong. Stopped: interrupted, both have saved.
        RuntimeError: a worker failed, or the two did not start from the same adapter and data.
    """
    events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
    workers: list[_Worker] = []
    try:
        for backend in BACKENDS:
            workers.append(_start(job, backend, resume, events))
        stop = _Stop(workers)
        with on_stop_signal(stop.forward):
            _lead(workers, events, observer, stop)
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.wait()
            worker.log.close()
    if any(worker.stopped for worker in workers):
        raise Stopped(min(w.step for w in workers), max(w.steps for w in workers))
    results: dict[str, Any] = {worker.backend: worker.result for worker in workers}
    results["ratio"] = ratio(Path(job.out))
    return results


def paired_steps(out: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The log entries of PEFT and fastlora, step by step."""
    peft, fastlora = (
        {entry["step"]: entry for entry in read_log(out / backend / LOG_FILE)}
        for backend in BACKENDS
    )
    return [(peft[step], fastlora[step]) for step in sorted(peft.keys() & fastlora.keys())]


def ratio(out: Path) -> dict[str, float] | None:
    """PEFT's time over fastlora's, step by step: median, 20th and 80th percentile, number of steps.

    The first step after a start warms up and is left out. None when no other step is there.
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


def _start(job: Job, backend: str, resume: bool, events: queue.Queue[Any]) -> _Worker:
    out = Path(job.out) / backend
    out.mkdir(parents=True, exist_ok=True)
    log = (out / WORKER_LOG).open("w")
    process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        # Ctrl-C then reaches this process alone, which passes it on once.
        start_new_session=True,
    )
    worker = _Worker(backend, process, log)
    assert process.stdin is not None
    part = dataclasses.replace(job, backend=backend, out=str(out))
    process.stdin.write(json.dumps({"job": part.as_dict(), "resume": resume}) + "\n")
    process.stdin.flush()
    threading.Thread(target=_read, args=(worker, events), daemon=True).start()
    return worker


def _read(worker: _Worker, events: queue.Queue[Any]) -> None:
    assert worker.process.stdout is not None
    for line in worker.process.stdout:
        events.put((worker, json.loads(line)))
    events.put((worker, None))


def _lead(
    workers: list[_Worker], events: queue.Queue[Any], observer: Observer, stop: _Stop
) -> None:
    while not all(worker.ended for worker in workers):
        worker, event = events.get()
        if event is None:
            if worker.result is None and not worker.stopped:
                if stop.asked:
                    # The signal came before the worker was ready for one.
                    raise KeyboardInterrupt
                raise RuntimeError(_death(worker))
            worker.ended = True
        elif event["event"] == "error":
            _fail(worker, event)
        else:
            _note(worker, event)
            observer.emit(event.pop("event"), backend=worker.backend, **event)
        _open_gates(workers)


def _note(worker: _Worker, event: dict[str, Any]) -> None:
    match event["event"]:
        case "gate":
            worker.gate, worker.step = event["name"], event["step"]
        case "begin":
            worker.steps = event["steps"]
        case "step":
            worker.step = event["step"]
        case "facts":
            worker.facts = event.copy()
        case "result":
            worker.result = event["result"]
        case "stopped":
            worker.stopped, worker.step = True, event["step"]


def _open_gates(workers: list[_Worker]) -> None:
    """Lets the next worker go, once all of them wait (or have ended)."""
    running = [w for w in workers if not (w.ended or w.stopped or w.result is not None)]
    if not running or any(w.gate is None for w in running):
        return
    if all(w.gate == "start" for w in running):
        _check_same_start(running)
    stepping = [w for w in running if w.gate == "step"]
    if not stepping:
        # One evaluates at a time: together they would fight for the cores.
        evaluating = [w for w in running if w.gate != "start"]
        for worker in evaluating[:1] or running:
            worker.go()
        return
    # Whoever is behind goes first (one resumed from an earlier save, or the other has just
    # stepped). At the same step the order alternates: A B, B A, A B, ...
    behind = min(w.step for w in stepping)
    candidates = [w for w in stepping if w.step == behind]
    candidates[-1 if behind % 2 else 0].go()


def _check_same_start(workers: list[_Worker]) -> None:
    for fact in ("data_digest", "adapter_digest"):
        if len({worker.facts[fact] for worker in workers}) > 1:
            raise RuntimeError(f"the backends differ in {fact} before the first step")


def _fail(worker: _Worker, event: dict[str, Any]) -> None:
    if event["kind"] == "argument":
        raise CliError(event["text"])
    if event["kind"] == "interrupted":
        raise KeyboardInterrupt
    raise RuntimeError(f"{worker.backend}: {event['text']} (see {worker.log.name})")


def _death(worker: _Worker) -> str:
    status = worker.process.wait()
    how = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"the {worker.backend} process was {how} (see {worker.log.name})"


class _Stop:
    """Passes a request to stop on to the workers, which save and end."""

    def __init__(self, workers: list[_Worker]) -> None:
        self.workers = workers
        self.asked = False

    def forward(self) -> None:
        self.asked = True
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGINT)
