"""The benchmark harness: rounds, the gate, models, memory and its commands, on tiny layers."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import benchmarks
from benchmarks import shapes
from benchmarks.measure import run
from fastlora.backends import native
from fastlora.cli import main
from fastlora.cli.bench import allocators, model, rows, table
from fastlora.cli.bench.case import MODEL_MODES, MODES, Case, Layer, grid
from fastlora.cli.bench.execute import Output, execute
from fastlora.cli.bench.inputs import Built, Setup
from fastlora.cli.bench.measure import Bench, Refused, Timing, interleave
from fastlora.cli.bench.plan import Budget, ModelPlan, Plan
from fastlora.cli.bench.providers import PROVIDERS
from fastlora.cli.errors import CliError

QUICK = Budget(rounds=2, sample_seconds=1e-4)
TINY = Layer(64, 128, 4, quant="nf4", dropout=0.1)
NATIVE = native.unavailable_reason() is None
OURS = "fastlora" if NATIVE else "reference"
# Compiling takes seconds, and repacking needs AVX512-BF16.
NEVER_SKIPPED = {
    name
    for name in PROVIDERS
    if name not in ("compile", "bnb-packed") and (NATIVE or not name.startswith("fastlora"))
}

PROGRAMS = [m.name for m in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]

needs_peers = pytest.mark.usefixtures("peers")


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_import(name: str) -> None:
    importlib.import_module(name)


@pytest.fixture
def peers() -> None:
    pytest.importorskip("peft", reason="the baseline is PEFT")
    pytest.importorskip("bitsandbytes", reason="the baseline's 4-bit layer is bitsandbytes'")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The layers here are tiny: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- measuring ---------------------------------------------------------------------------------


def test_every_round_runs_everyone_once_in_a_rotated_order() -> None:
    calls: list[str] = []
    timed = {name: [lambda name=name: calls.append(name)] for name in "abc"}
    ticks: list[None] = []
    order: list[str] = []
    budget = Budget(rounds=6, sample_seconds=1e-9)
    timings = interleave(timed, budget, lambda: ticks.append(None), order.append)
    assert {name: len(t.seconds) for name, t in timings.items()} == dict.fromkeys("abc", 6)
    assert len(ticks) == 18
    assert set(calls) == set("abc")
    # After one turn that finds how many calls a sample takes, each order once.
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert rounds == ["abc", "acb", "cab", "cba", "bca", "bac"]


def test_copies_of_the_weight_are_taken_in_turn() -> None:
    calls: list[int] = []
    timed = {"a": [lambda i=i: calls.append(i) for i in range(3)]}
    interleave(timed, QUICK)
    assert calls[:9] == [0, 1, 2] * 3
    setup = Setup(dataclasses.replace(TINY, quant="none"))
    pointers = {weight.data_ptr() for weight, _ in setup.weights}
    assert len(pointers) == len(setup.weights) > 1


@needs_peers
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_every_provider_passes_the_gate(quant: str, mode: str) -> None:
    bench = Bench([name for name in PROVIDERS if name != "compile"], QUICK)
    cases = grid([dataclasses.replace(TINY, quant=quant)], [5], [mode])
    if mode == "dequantize" and quant == "none":
        assert not cases
        return
    outcomes = bench.run(cases[0])
    wrong = {n: o for n, o in outcomes.items() if isinstance(o, Refused) and o.wrong}
    assert not wrong
    needs_4bit = {"frozen-dense", "fastlora-dense"} if quant == "none" else set()
    expected = {name for name in NEVER_SKIPPED - needs_4bit if mode in PROVIDERS[name].modes}
    assert {n for n, o in outcomes.items() if isinstance(o, Timing)} >= expected


def _wrong_result(setup: Setup, index: int) -> Built:
    right = PROVIDERS["reference"].build(setup, index)
    return dataclasses.replace(right, call=lambda x: right.call(x) * 1.05)


def _wrong_gradient(setup: Setup, index: int) -> Built:
    right = PROVIDERS["reference"].build(setup, index)
    B = right.adapter[1]

    def call(x: torch.Tensor) -> torch.Tensor:
        # The value is right; B's gradient is 5 % too long.
        B.register_hook(lambda grad: grad * 1.05) if not B._backward_hooks else None
        return right.call(x)

    return dataclasses.replace(right, call=call)


def _without_dropout(setup: Setup, index: int) -> Built:
    right = PROVIDERS["reference"].build(setup, index)
    right.train(False)
    return dataclasses.replace(right, train=lambda training: None)


@pytest.mark.parametrize(
    ("build", "what"),
    [(_wrong_result, "y"), (_wrong_gradient, "dB"), (_without_dropout, "y")],
    ids=["result", "gradient", "dropout"],
)
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_gate_refuses_a_wrong_provider(
    quant: str, build: object, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheat = dataclasses.replace(PROVIDERS["reference"], name="cheat", build=build)
    monkeypatch.setitem(PROVIDERS, "cheat", cheat)
    layer = dataclasses.replace(TINY, quant=quant)
    outcomes = Bench(["reference", "cheat"], QUICK).run(Case(layer, 33, "step"))
    assert isinstance(outcomes["reference"], Timing)
    refused = outcomes["cheat"]
    assert isinstance(refused, Refused)
    assert refused.wrong
    assert refused.reason.startswith(f"{what} is wrong: ")


def test_gate_refuses_a_wrong_dequantisation(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(setup: Setup, index: int) -> Built:
        right = PROVIDERS["fastlora-fresh"].build(setup, index)
        return dataclasses.replace(right, call=lambda x: right.call(x).nextafter(torch.tensor(1.0)))

    cheat = dataclasses.replace(
        PROVIDERS["fastlora-fresh"],
        name="cheat",
        build=build,
        backend=None,
    )
    monkeypatch.setitem(PROVIDERS, "cheat", cheat)
    (case,) = grid([dataclasses.replace(TINY, dtype="fp32")], [], ["dequantize"])
    outcome = Bench(["cheat"], QUICK).run(case)["cheat"]
    assert isinstance(outcome, Refused)
    assert outcome.wrong


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and no weights."""
    pytest.importorskip("transformers", reason="models are Transformers'")
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(folder)
    return folder


def model_rows(folder: Path, modes: list[str]) -> tuple[list[rows.Row], list[str]]:
    """The rows that `fastlora bench --model` makes, and what it refused; in this process."""
    plan = ModelPlan(str(folder), modes, TINY, 1, 16, ["glibc"], Budget(2, 1e-4), 1)
    made: list[rows.Row] = []
    refused: list[str] = []

    def take(event: str, **fields: Any) -> None:
        made.extend([fields["row"]] if event == "row" else [])
        refused.extend([fields["reason"]] if event == "refused" else [])

    request = json.loads(json.dumps({"plan": dataclasses.asdict(plan), "allocator": "glibc"}))
    assert ModelPlan.from_dict(request["plan"]) == plan
    model.work(request, SimpleNamespace(emit=take))  # type: ignore[arg-type]
    return made, refused


@needs_peers
def test_a_model_is_timed_in_every_mode(tiny_llama: Path) -> None:
    made, refused = model_rows(tiny_llama, list(MODEL_MODES))
    assert not refused
    measured = {(row["mode"], row["provider"]) for row in made} - {("decode", "bnb-packed")}
    assert measured == set(itertools.product(MODEL_MODES, ("peft", "fastlora")))
    assert {row["M"] for row in made if row["mode"] != "decode"} == {"16"}
    (grid_,) = table.models(made)
    assert len(grid_.lines) == len(made)


@needs_peers
def test_a_wrong_model_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.integrations import peft

    def wrong(model: torch.nn.Module, verbose: bool) -> None:
        for name, parameter in model.named_parameters():
            if "layers.1" in name and "lora_B" in name:
                parameter.data.add_(0.3)

    monkeypatch.setattr(peft, "accelerate", wrong)
    made, refused = model_rows(tiny_llama, ["train"])
    assert not made
    assert len(refused) == 1


@needs_peers
@pytest.mark.parametrize(("provider", "saved"), [(OURS, 2.0), ("peft", 8.0)])
def test_saved_bytes_are_those_of_the_formula(provider: str, saved: float) -> None:
    from fastlora.cli.bench.memory import measure

    layer = Layer(128, 128, 4, dropout=0.1)
    memory = measure(Case(layer, 64, "step"), provider)
    # S [M, R] is kept in fp32 by both.
    assert memory["saved_bytes"] == pytest.approx(saved + 4 * layer.R / layer.K, abs=0.01)
    assert memory["peak_mb"] >= 0


# ---- commands ----------------------------------------------------------------------------------


def test_suites_name_known_providers_and_give_cases() -> None:
    for name, suite in shapes.SUITES.items():
        assert suite.cases(), name
        assert set(suite.providers) <= set(PROVIDERS), name


def test_run_measures_suites_at_other_sizes() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("suites", nargs="*")
    run.bench.add_options(parser)
    plans = run._plans(parser.parse_args(["main", "memory", "--tokens", "2,3", "--threads", "1"]))
    assert [sorted({case.M for case in plan.cases}) for plan in plans] == [[2, 3], [2, 3]]
    assert [plan.memory for plan in plans] == [False, True]
    with pytest.raises(CliError, match="no such suite"):
        run._plans(parser.parse_args(["everything"]))


def test_environment_of_an_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/x/libjemalloc.so.2:/x/other.so")
    assert allocators.environment("glibc")["LD_PRELOAD"] == "/x/other.so"
    monkeypatch.setattr(allocators, "tcmalloc", lambda: "/y/libtcmalloc_minimal.so.4")
    assert (
        allocators.environment("tcmalloc")["LD_PRELOAD"]
        == "/y/libtcmalloc_minimal.so.4:/x/other.so"
    )
    assert os.environ["LD_PRELOAD"] == "/x/libjemalloc.so.2:/x/other.so"
    monkeypatch.setattr(allocators, "tcmalloc", lambda: None)
    with pytest.raises(CliError, match="libtcmalloc-minimal4"):
        allocators.environment("tcmalloc")


def test_a_plan_survives_the_pipe() -> None:
    cases = grid([TINY], [1, 2], ["step", "dequantize"])
    plan = Plan(cases, ["peft"], ["glibc"], Budget(3, 0.01))
    assert Plan.from_dict(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


@pytest.mark.slow
@needs_peers
def test_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, markdown = tmp_path / "rows.csv", tmp_path / "table.md"
    command = ["bench", "--shape", "64,128", "--tokens", "1,3", "--mode", "step", "--rank", "4"]
    command += ["--providers", f"peft,{OURS},frozen-dense", "--quant", "none"]
    command += ["--compare", f"{OURS}:peft", "--rounds", "2", "--sample-ms", "0.1"]
    allocator = "tcmalloc" if allocators.tcmalloc() else "glibc"
    command += ["--allocators", allocator, "--threads", "1"]
    assert main([*command, "--csv", str(csv), "--markdown", str(markdown)]) == 0
    written = rows.read(csv)
    assert [(r["allocator"], r["provider"], r["M"]) for r in written] == [
        (allocator, provider, M) for M in ("1", "3") for provider in ("peft", OURS)
    ]
    filled = set(rows.COLUMNS) - {"commit", "peak_mb", "saved_bytes"}
    assert all(row[name] for row in written for name in filled)
    assert all(len(rows.samples(row)) == 2 for row in written)
    assert f"| {allocator}, forward + backward | " in markdown.read_text()
    out = capsys.readouterr().out
    assert f"time of peft / time of {OURS}" in out
    assert out.count("frozen-dense was left out: the weight is dense.") == 1


def test_a_failing_worker_is_reported(tmp_path: Path) -> None:
    plan = Plan(grid([TINY], [1], ["step"]), ["nobody"], ["glibc"], threads=1)
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        execute([plan], Output(csv=tmp_path / "rows.csv"))
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--providers", "unsloth"], "--providers"),
        (["--shape", "64"], "expected N,K"),
        (["--quant", "int8"], "expected none, nf4, fp4"),
        (["--dropout", "1"], "expected a number from 0 to below 1, got 1"),
        (["--tokens", "0"], "expected a whole number from 1 on, got 0"),
        (["--compare", "peft"], "expected A:B"),
        (["--compare", "fastlora:unsloth"], "--compare: expected some of frozen, "),
        (["--compare", "addmm:peft", "--quick"], "expected some of frozen, peft, fastlora, "),
    ],
)
def test_wrong_arguments_take_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["bench", *options])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
