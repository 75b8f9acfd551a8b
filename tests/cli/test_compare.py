"""Who goes when, when two runs take turns, and what is made of their times."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlora.cli import process
from fastlora.cli.errors import CliError
from fastlora.cli.finetune import command as finetune
from fastlora.cli.finetune import compare


class Worker:
    """Stands in for a process: it runs `steps` steps, and notes each in `order`."""

    def __init__(self, backend: str, steps: int, order: list[str], step: int = 0) -> None:
        self.backend, self.steps, self.order, self.step = backend, steps, order, step
        self.gate: str | None = "start"
        self.facts = {"data_digest": "d", "adapter_digest": "a"}
        self.stopped = False
        self.result: dict[str, Any] | None = None

    def go(self) -> None:
        if self.gate == "step":
            self.order.append(f"{self.backend}{self.step}")
            self.step += 1
        if self.gate == "end":
            self.result = {}
        self.gate = "step" if self.step < self.steps else "end"


def run(*workers: Worker) -> None:
    while any(worker.result is None for worker in workers):
        compare._open_gates(workers, lambda: None)  # type: ignore[arg-type]


def test_the_order_turns_round() -> None:
    order: list[str] = []
    run(Worker("A", 4, order), Worker("B", 4, order))
    assert order == ["A0", "B0", "B1", "A1", "A2", "B2", "B3", "A3"]


def test_whoever_is_behind_catches_up() -> None:
    order: list[str] = []
    run(Worker("A", 4, order, step=2), Worker("B", 4, order))
    assert order == ["B0", "B1", "A2", "B2", "B3", "A3"]


def test_nobody_starts_while_another_works() -> None:
    order: list[str] = []
    one, two = Worker("A", 2, order), Worker("B", 2, order)
    two.gate = None
    compare._open_gates([one, two], lambda: None)  # type: ignore[list-item]
    assert one.gate == "start"


@pytest.mark.parametrize("gate", ["evaluate", "end"])
def test_one_evaluates_at_a_time(gate: str) -> None:
    one, two = Worker("A", 0, []), Worker("B", 0, [])
    one.gate = two.gate = gate
    compare._open_gates([one, two], lambda: None)  # type: ignore[list-item]
    assert two.gate == gate and one.gate == "end"


def test_both_must_start_alike() -> None:
    one, two = Worker("A", 1, []), Worker("B", 1, [])
    two.facts["adapter_digest"] = "other"
    with pytest.raises(RuntimeError, match="differ in adapter_digest"):
        compare._open_gates([one, two], lambda: None)  # type: ignore[list-item]


def test_the_ratio_is_of_paired_steps_after_the_first(tmp_path: Path) -> None:
    for backend, seconds in (("peft", [9, 4, 6, 8, 4]), ("fastlora", [1, 2, 2, 2, 4, 7])):
        (tmp_path / backend).mkdir()
        lines = [
            json.dumps({"step": step, "seconds": s, "first": step == 1})
            for step, s in enumerate(seconds, 1)
        ]
        (tmp_path / backend / "log.jsonl").write_text("\n".join(lines))
    ratio = compare.ratio(tmp_path)
    assert ratio == {"median": 2.5, "p20": 2.0, "p80": 3.0, "steps": 4}


def test_no_ratio_from_one_step(tmp_path: Path) -> None:
    for backend in ("peft", "fastlora"):
        (tmp_path / backend).mkdir()
        entry = {"step": 1, "seconds": 1.0, "first": True}
        (tmp_path / backend / "log.jsonl").write_text(json.dumps(entry))
    assert compare.ratio(tmp_path) is None


# ---- processes -------------------------------------------------------------------------------


class Observer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append((fields["backend"], event))

    def gate(self, name: str, step: int) -> None:
        raise AssertionError("only workers wait")


def compare_with(
    program: str, out: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any
) -> tuple[dict[str, Any], Observer]:
    """A comparison whose workers run `program`, with `send(**event)` and `job` at hand."""
    frame = (
        "import json, os, sys\n"
        "job = json.loads(sys.stdin.readline())['job']\n"
        "def send(**event): print(json.dumps(event), flush=True)\n"
    )
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", frame + program))
    job = finetune.new_job(model="m", data="d", out=str(out), **{"backend": "both", **changed})
    observer = Observer()
    return compare.compare(job, observer, resume=False), observer


def test_a_worker_gets_its_job_and_its_events_come_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "send(event='status', text=job['backend'])\n"
        "send(event='gate', name='end', step=3)\n"
        "assert sys.stdin.readline() == 'go\\n'\n"
        "send(event='result', result={'out': job['out'], 'r': job['r']})\n"
    )
    results, observer = compare_with(program, tmp_path, monkeypatch, r=5)
    for backend in ("peft", "fastlora"):
        assert results[backend] == {"out": str(tmp_path / backend), "r": 5}
        told = [event for name, event in observer.events if name == backend]
        assert told == ["status", "gate", "result"]


def test_a_worker_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "if job['backend'] == 'fastlora': os.kill(os.getpid(), 9)\nsys.stdin.readline()\n"
    with pytest.raises(RuntimeError, match="the fastlora process was killed by signal 9"):
        compare_with(program, tmp_path, monkeypatch)


def test_a_worker_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "send(event='error', kind='failure', text='OSError: disk full')\n"
    with pytest.raises(RuntimeError, match=r"OSError: disk full \(see .*worker.log\)"):
        compare_with(program, tmp_path, monkeypatch)


def test_a_wrong_argument_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "send(event='error', kind='argument', text='--r: too large')\n"
    with pytest.raises(CliError, match=r"^--r: too large$"):
        compare_with(program, tmp_path, monkeypatch)


def test_a_worker_ends_with_the_process_that_leads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    leader = process.Leader(io.StringIO("go\n"), io.StringIO())
    leader.gate("step", 0)
    with pytest.raises(SystemExit):
        leader.gate("step", 1)
