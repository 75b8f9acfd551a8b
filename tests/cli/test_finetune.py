"""`fastlora finetune`: trains, saves for plain PEFT, resumes, compares, says what is wrong."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.cli import main
from fastlora.cli.finetune.records import newest_checkpoint, read_log

pytest.importorskip("bitsandbytes", reason="QLoRA quantises with bitsandbytes")

Arguments = Callable[..., list[str]]


@pytest.fixture
def arguments(tiny_model: Path, text_file: Path, tmp_path: Path) -> Arguments:
    """Arguments for a short run; keywords change or (with None) leave out an option."""

    def make(**changed: Any) -> list[str]:
        options: dict[str, Any] = {
            "model": tiny_model,
            "data": text_file,
            "out": tmp_path / "out",
            "backend": "peft",
            "steps": 6,
            "batch-size": 2,
            "seq-len": 32,
            "lr": 1e-2,
            "save-every": 3,
            "threads": 1,
        }
        options |= {name.replace("_", "-"): value for name, value in changed.items()}
        given = [(f"--{name}", value) for name, value in options.items() if value is not None]
        return ["finetune", *(str(part) for pair in given for part in pair)]

    return make


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(out / "log.jsonl")]


def run_json(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def process(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastlora", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(out: Path, step: int, run: subprocess.Popen[str]) -> None:
    while len(read_log(out / "log.jsonl")) < step:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.005)


# ---- one backend -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["peft", "fastlora"])
def test_it_learns(
    backend: str, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(backend=backend, steps=12)) == 0
    log = read_log(out / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    result = run_json(out)["result"]
    assert result["perplexity_after"] < 0.9 * result["perplexity_before"]
    for entry in log:
        assert 32 < entry["tokens"] <= 2 * 32
        assert math.isclose(entry["tokens_per_second"], entry["tokens"] / entry["seconds"])
        assert 0 < entry["start_memory_mb"] <= entry["peak_memory_mb"]
    output = capsys.readouterr().out
    assert "seconds a step" in output
    assert "perplexity after" in output
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("backend", ["peft", "fastlora"])
def test_plain_peft_loads_the_adapter(
    backend: str, arguments: Arguments, tmp_path: Path, tiny_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(arguments(backend=backend, quant="none", dtype="float32", r=4)) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokens = torch.arange(6, 22)[None]
    before = base(tokens).logits
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    assert model.peft_config["default"].r == 4
    lora_B = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(lora_B) == 14
    assert all(p.abs().max() > 0 for p in lora_B)
    assert (model(tokens).logits - before).abs().max() > 1e-2


def test_backends_agree(arguments: Arguments, tmp_path: Path) -> None:
    """In fp32 and without dropout, whose masks differ, the two give the same losses."""
    runs = {}
    for backend in ("peft", "fastlora"):
        out = tmp_path / backend
        options = {"quant": "none", "dtype": "float32", "dropout": 0}
        assert main(arguments(backend=backend, out=out, **options)) == 0
        runs[backend] = losses(out)
    # The sums are taken in another order; six steps of AdamW spread that a little.
    assert runs["fastlora"] == pytest.approx(runs["peft"], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "fp4", "grad_accum": 2},
        {"quant": "none", "adapter_dtype": "bfloat16"},
        {"target_modules": "q_proj,v_proj", "eval_split": 0},
        {"epochs": 0.1, "steps": None, "lr_schedule": "cosine", "warmup_steps": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(options: dict[str, Any], arguments: Arguments, tmp_path: Path) -> None:
    assert main(arguments(**{"steps": 2, **options})) == 0
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").is_file()
    result = run_json(out)["result"]
    assert (result["perplexity_after"] is None) == (options.get("eval_split") == 0)


def test_gradient_checkpointing_changes_nothing(arguments: Arguments, tmp_path: Path) -> None:
    for flag, out in (("--gradient-checkpointing", "a"), ("--no-gradient-checkpointing", "b")):
        assert main([*arguments(out=tmp_path / out, steps=3), flag]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_jsonl(arguments: Arguments, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    records = [{"prompt": "the cat", "completion": "sat on a mat"}] * 8
    assert main(arguments(data=jsonl(*records), steps=4, eval_split=0.2)) == 0
    first, *_, last = losses(tmp_path / "out")
    assert last < first


# ---- stop and go on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "peft", "grad_accum": 2},
        {"backend": "fastlora", "adapter_dtype": "bfloat16"},
        {"backend": "fastlora", "quant": "none", "save_every": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_an_earlier_save_resumes_on_the_same_curve(
    options: dict[str, Any], arguments: Arguments, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(arguments(**options)) == 0
    unbroken, result = losses(out), run_json(out)["result"]
    shutil.rmtree(out / "checkpoint-6")
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert losses(out) == unbroken
    assert run_json(out)["result"]["perplexity_after"] == result["perplexity_after"]


@pytest.mark.slow
def test_a_killed_run_resumes_on_the_same_curve(arguments: Arguments, tmp_path: Path) -> None:
    options = {"steps": 60, "save_every": 5, "backend": "fastlora"}
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    assert main(arguments(out=unbroken, **options)) == 0
    run = process(arguments(**options), OMP_NUM_THREADS="1")
    wait_for_step(out, 12, run)
    run.kill()
    run.wait()
    assert len(read_log(out / "log.jsonl")) < 60, "the run ended before it could be killed"
    # What a kill in the middle of a save leaves behind.
    shutil.copytree(newest_checkpoint(out), out / "checkpoint-59")
    (out / "checkpoint-59" / "trainer_state.json").write_text('{"global_step": 5')

    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert losses(out) == losses(unbroken)
    ours, theirs = (run_json(folder)["result"] for folder in (out, unbroken))
    assert ours["perplexity_before"] == theirs["perplexity_before"]
    assert ours["perplexity_after"] == theirs["perplexity_after"]
    # At most one save's worth of steps was done twice.
    assert sum(entry["first"] for entry in read_log(out / "log.jsonl")) == 2


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(arguments: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = process(arguments(steps=500, save_every=500), OMP_NUM_THREADS="1")
    wait_for_step(out, 3, run)
    run.send_signal(signal.SIGINT)
    output = run.communicate()[0]
    assert run.returncode == 130, output
    assert "Traceback" not in output
    steps = len(read_log(out / "log.jsonl"))
    assert f"Stopped after step {steps} of 500, and saved." in output
    assert f"fastlora finetune --resume --out {out}" in output
    checkpoint = newest_checkpoint(out)
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{steps}"


def test_only_a_cut_off_checkpoint_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that can't be read at the moment holds a run's work."""
    for name, text in (("3", '{"global_step": 3}'), ("5", '{"global_step"'), ("7", None)):
        folder = tmp_path / f"checkpoint-{name}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-notes.txt").touch()
    for others in ("checkpoint-best", "checkpoint-3-copy"):
        (tmp_path / others).mkdir()

    def refuse(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            newest_checkpoint(tmp_path)
    assert (tmp_path / "checkpoint-3").is_dir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4


def test_a_finished_run_resumes_to_its_result(arguments: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments()) == 0
    before = run_json(out)["result"]
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert len(losses(out)) == 6
    after = run_json(out)["result"]
    assert after["perplexity_after"] == before["perplexity_after"]
    assert after["loss"] == before["loss"]


def test_data_must_not_change_before_resuming(
    arguments: Arguments,
    jsonl: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = jsonl(*[{"text": "the cat sat"}] * 8)
    assert main(arguments(data=path, eval_split=0)) == 0
    path.write_text(path.read_text() + '{"text": "a dog"}\n')
    assert main(["finetune", "--resume", "--out", str(tmp_path / "out")]) == 2
    assert f"--data: the content of {path} has changed since" in capsys.readouterr().err


# ---- both ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both(
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    assert main(arguments(backend="both", dropout=0)) == 0
    output = capsys.readouterr().out
    assert all(len(line) <= 80 for line in output.splitlines() if str(tmp_path) not in line)
    rows = {line[:20].strip(): line[20:].split() for line in output.splitlines()}
    before = [float(figure) for figure in rows["perplexity before"]]
    assert before[1] == pytest.approx(before[0], rel=0.01)
    assert float(rows["seconds a step"][0]) > 0
    assert "CPU repacking off" in output
    assert "fastlora's layers: 14 " in output

    with (out / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [int(row["step"]) for row in steps] == list(range(1, 7))
    for row in steps:
        assert float(row["fastlora_loss"]) == pytest.approx(float(row["peft_loss"]), rel=0.02)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = run_json(out)["results"]
    assert results["ratio"]["steps"] == 5
    for backend in ("peft", "fastlora"):
        assert (out / backend / "adapter_model.safetensors").is_file()
        assert results[backend]["peak_memory_mb"] > 100


@pytest.mark.slow
def test_ctrl_c_stops_both_and_the_one_behind_catches_up(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = {"backend": "both", "steps": 30, "save_every": 30, "eval_split": 0}
    run = process(arguments(**options), OMP_NUM_THREADS="1")
    wait_for_step(out / "peft", 5, run)
    run.send_signal(signal.SIGINT)
    output = run.communicate()[0]
    assert run.returncode == 130, output
    assert "Traceback" not in output
    assert "of 30, and saved." in output
    saved = [newest_checkpoint(out / backend) for backend in ("peft", "fastlora")]
    assert all(checkpoint is not None for checkpoint in saved)

    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    for backend in ("peft", "fastlora"):
        log = read_log(out / backend / "log.jsonl")
        assert [entry["step"] for entry in log] == list(range(1, 31))
        assert sum(entry["first"] for entry in log) == 2
    # Two steps warmed up in each, perhaps not the same two.
    assert 26 <= run_json(out)["results"]["ratio"]["steps"] <= 28


# ---- what is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "--model: missing"),
        ({"data": None}, "--data: missing"),
        ({"out": None}, "--out: give the folder"),
        ({"model": "/no/model"}, "--model: no such folder or file: /no/model"),
        ({"data": "/no/data"}, "--data: no such file: /no/data"),
        ({"target_modules": "nose"}, "--target-modules: the model has no linear layer 'nose'"),
        ({"target_modules": ","}, "--target-modules: give all-linear or names"),
        ({"seq_len": 100000}, "too few for a window of --seq-len 100000"),
        ({"seq_len": 129}, "--seq-len: the model takes 128 tokens, not 129"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument(
    changed: dict[str, Any],
    message: str,
    arguments: Arguments,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(**changed)) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlora finetune: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--r", "0"], "argument --r: expected a whole number from 1 on, got 0"),
        (["--lr", "fast"], "argument --lr: expected a number above 0, got fast"),
        (["--dropout", "1"], "argument --dropout: expected a number from 0 to below 1, got 1"),
        (["--seed", "-1"], "argument --seed: expected a whole number from 0 on, got -1"),
        (["--quant", "int3"], "argument --quant: invalid choice: 'int3'"),
        (["--steps", "1", "--epochs", "1"], "argument --epochs: not allowed with argument --steps"),
        (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
    ],
)
def test_wrong_values_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_needs_a_tokenizer(
    arguments: Arguments, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, bare)
    assert main(arguments(model=bare)) == 2
    assert f"--model: no tokenizer in {bare}" in capsys.readouterr().err


def test_a_broken_tokenizer(
    arguments: Arguments, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "tokenizer.json").write_text("{}")
    assert main(arguments(model=broken)) == 2
    error = capsys.readouterr().err
    assert f"--model: the tokenizer in {broken} can't be loaded: " in error
    assert error.count("\n") == 1


def test_a_folder_without_a_model(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model=tmp_path)) == 2
    assert f"--model: no config.json in {tmp_path}" in capsys.readouterr().err


def test_a_file_that_is_no_model(
    arguments: Arguments, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model=text_file)) == 2
    assert "--model: neither a model folder nor a GGUF file" in capsys.readouterr().err


def test_foreign_files_are_left_alone(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert main([*arguments(), "--overwrite"]) == 2
    assert "holds files but no run of fastlora's" in capsys.readouterr().err
    (out / "run.json").write_text("{}")
    assert main(arguments()) == 2
    assert "--resume to go on or --overwrite to replace it" in capsys.readouterr().err
    (out / "log.jsonl").write_text("old")
    assert main([*arguments(steps=1, eval_split=0), "--overwrite"]) == 0
    assert (out / "thesis.tex").read_text() == "years of work"
    assert len(losses(out)) == 1


def test_a_wrong_argument_costs_no_earlier_run(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    (out / "log.jsonl").write_text("old")
    assert main([*arguments(data="/no/data"), "--overwrite"]) == 2
    assert (out / "log.jsonl").read_text() == "old"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "1"], "--lr: the run in {out} was started with 0.01, not 1.0"),
        (["--seq-len", "8"], "--seq-len: the run in {out} was started with 32, not 8"),
    ],
)
def test_resuming_keeps_the_settings(
    flags: list[str],
    message: str,
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(arguments(steps=1, eval_split=0)) == 0
    assert main(["finetune", "--resume", "--out", str(out), *flags]) == 2
    assert message.format(out=out) in capsys.readouterr().err


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--resume", "--out", str(tmp_path)]) == 2
    assert f"--resume: no run in {tmp_path}" in capsys.readouterr().err
