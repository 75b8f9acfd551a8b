"""`fastlora finetune` stops where going on would lose something, and says so."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MixtralConfig

from fastlora.cli import main
from fastlora.cli.errors import CliError
from fastlora.cli.finetune import command

pytestmark = pytest.mark.filterwarnings("ignore")
Command = Callable[..., int]


@pytest.fixture
def finetune(tiny_model: Path, text_file: Path, tmp_path: Path) -> Command:
    """Runs a short run; flags stand for themselves, keywords change an option."""

    def run(*flags: str, **changed: Any) -> int:
        options: dict[str, Any] = {"model": tiny_model, "data": text_file, "out": tmp_path / "out"}
        options |= {"backend": "fastlora", "quant": "none", "steps": 3, "batch-size": 2}
        options |= {"seq-len": 32, "save-every": 1, "threads": 1, "eval-split": 0}
        options |= {name.replace("_", "-"): value for name, value in changed.items()}
        given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        return main(["finetune", *given, *flags])

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_loss_that_is_not_finite(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(lr=1e30, steps=6) == 3
    assert "Diverged at step 2" in (text := capsys.readouterr().out)
    assert "the save after step 1 is kept" in text and "done" not in text
    left = names(tmp_path / "out")
    assert "checkpoint-1" in left and "checkpoint-2" not in left
    assert not {"adapter_model.safetensors", ".lock"} & left
    assert not any(name.startswith(".replaced") for name in left)


@pytest.mark.parametrize("backend", ["fastlora", pytest.param("both", marks=pytest.mark.slow)])
def test_a_base_that_is_not_finite(
    backend: str,
    finetune: Command,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert finetune(model=broken, backend=backend) == 3
    assert "Diverged at step 1" in (text := capsys.readouterr().out) and "nothing was saved" in text
    assert not list((tmp_path / "out").rglob("adapter_model.safetensors"))


def test_two_runs_in_one_folder(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert finetune() == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with FileLock(out / ".lock"):
        for flag in ("--overwrite", "--resume"):
            assert finetune(flag) == 2
            assert "--out: another run is writing to" in capsys.readouterr().err
        (out / ".lock").unlink(missing_ok=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")}.keys() == before.keys()
    assert finetune("--overwrite") == 0


@pytest.mark.parametrize(
    ("option", "value"), [("target_modules", "no_such_layer"), ("seq_len", 1000)]
)
def test_a_refused_command_leaves_no_trace(
    option: str, value: Any, finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert finetune(**{option: value}) == 2
    assert f"--{option.replace('_', '-')}: " in capsys.readouterr().err and not out.exists()
    assert finetune() == 0
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert finetune("--overwrite", **{option: value}) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    out_of_place = out / "notes.txt"
    out_of_place.write_text("mine")
    assert finetune("--overwrite", steps=2) == 0
    assert out_of_place.read_text() == "mine" and not (out / "checkpoint-3").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def with_nan(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def without_one(path: Path) -> None:
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path, metadata={"format": "pt"})


def remove(path: Path) -> None:
    path.unlink()


def garble(path: Path) -> None:
    path.write_bytes(b"\xff\x00}")


def rescale(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 3}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("optimizer.pt", remove, "it has no optimizer.pt"),
        ("rng_state.pth", remove, "it has no rng_state"),
        ("trainer_state.json", garble, "trainer_state.json can't be read"),
        ("adapter_config.json", rescale, "lora_alpha must be 32.0, got 3"),
        ("adapter_config.json", garble, "is no adapter's config"),
        ("adapter_model.safetensors", cut, "can't be read"),
        ("adapter_model.safetensors", with_nan, "must be finite"),
        ("adapter_model.safetensors", without_one, "lacks 1 tensor"),
        ("optimizer.pt", cut, "optimizer.pt: File is not a zip file"),
        ("optimizer.pt", flip, "optimizer.pt: .* checksum|optimizer.pt: .*"),
        ("rng_state.pth", cut, "rng_state.pth: "),
    ],
)
def test_a_damaged_checkpoint(
    name: str,
    damage: Callable[[Path], None],
    message: str,
    finetune: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is named, kept, and the one before it offered, from which the run then goes on."""
    out = tmp_path / "out"
    assert finetune(steps=2) == 0
    damage(out / "checkpoint-2" / name)
    capsys.readouterr()
    assert finetune("--resume", steps=3) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-2 is damaged" in error and re.search(message, error), error
    assert "remove it to go on from checkpoint-1" in error
    shutil.rmtree(out / "checkpoint-2")
    assert finetune("--resume", steps=3) == 0
    assert "resuming from step 1" in capsys.readouterr().out
    shutil.rmtree(out / "checkpoint-2")
    damage(out / "checkpoint-3" / name)
    assert finetune("--resume", steps=4) == 2
    assert "no save before it, --overwrite starts anew" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_a_broken_run_file(
    content: str, finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert finetune(steps=1) == 0
    (out / "run.json").write_bytes(content.encode("latin-1"))
    assert finetune("--resume", steps=1) == 2
    assert "run.json can't be read" in capsys.readouterr().err
    assert finetune("--overwrite", steps=1) == 0


def test_a_dry_run_writes_nothing(
    finetune: Command, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(tmp_path)
    assert finetune("--dry-run", data=f"{text_file}:2") == 0
    text = capsys.readouterr().out
    assert names(tmp_path) == before
    assert "3 steps of 2 examples" in text and f"An example of {text_file.name}" in text
    assert "weight" in text and "seconds a step" not in text
    assert finetune("--dry-run", data=tmp_path / "none.txt") == 2


def test_an_interrupt_before_the_first_save_gives_the_earlier_run_back(
    finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert finetune() == 0
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupt)
    assert finetune("--overwrite") == 130
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_a_run_that_diverges_before_it_saves_gives_the_earlier_one_back(
    finetune: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert finetune() == 0
    (out / "checkpoint-mine").mkdir()
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert finetune("--overwrite", lr=1e30, steps=6, save_every=5) == 3
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert finetune("--overwrite", steps=1) == 0
    assert (out / "checkpoint-mine").is_dir() and not (out / "checkpoint-3").exists()


def test_a_refused_command_leaves_no_parents(
    finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    assert finetune(out=tmp_path / "here" / "a" / "b", target_modules="nothing") == 2
    assert names(tmp_path / "here") == set()
    out = tmp_path / "there" / "a"

    def beside(*args: Any, **options: Any) -> None:
        (tmp_path / "there" / "b").mkdir()
        raise CliError("no")

    monkeypatch.setattr(command, "train", beside)
    assert finetune(out=out) == 2
    assert names(tmp_path / "there") == {"b"}


def test_a_refused_resume_changes_nothing(finetune: Command, tmp_path: Path) -> None:
    assert finetune(steps=2) == 0
    run = (tmp_path / "out" / "run.json").read_text()
    garble(tmp_path / "out" / "checkpoint-2" / "optimizer.pt")
    assert finetune("--resume", steps=9) == 2
    assert (tmp_path / "out" / "run.json").read_text() == run


@pytest.mark.parametrize("content", ["{}", '{"job": {"model": "m", "odd": 1}}'])
def test_a_run_file_of_another_version(
    content: str, finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(steps=1) == 0
    (tmp_path / "out" / "run.json").write_text(content)
    assert finetune("--resume", steps=1) == 2
    assert "is of another version of fastlora, or damaged" in capsys.readouterr().err


def test_brackets_in_names_are_no_markup(
    finetune: Command, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "[bold]x.txt"
    data.write_text(text_file.read_text() + "\x1b]0;title\x07")
    assert finetune(data=data, out=tmp_path / "x[/red]y", steps=1) == 0
    text = capsys.readouterr().out
    assert "[bold]x.txt" in text and "\x1b]0" not in text


def test_runs_of_one_file_as_it_was_stored_before(finetune: Command, tmp_path: Path) -> None:
    path = tmp_path / "out" / "run.json"
    assert finetune(steps=1) == 0
    run = json.loads(path.read_text())
    (run["job"]["data"],) = run["job"]["data"]
    path.write_text(json.dumps(run))
    assert finetune("--resume", steps=2) == 0


def test_more_steps_at_resume(finetune: Command, tmp_path: Path) -> None:
    assert finetune(steps=2) == 0
    assert main(["finetune", "--resume", "--out", str(tmp_path / "out"), "--steps", "4"]) == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["job"]["steps"] == 4


def random_model(kind: str, tiny_model: Path, folder: Path) -> Path:
    """A model of another kind with the tiny one's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}
    configs = {
        "mixtral": lambda: MixtralConfig(**sizes, **heads, num_local_experts=3),
        "mamba": lambda: MambaConfig(**sizes, state_size=4),
    }
    model = AutoModelForCausalLM.from_config(configs[kind]())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_experts_take_no_dropout(
    finetune: Command, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command's defaults, and said."""
    model = random_model("mixtral", tiny_model, tmp_path / "model")
    assert finetune(model=model, steps=1) == 0
    assert "dropout 0, since PEFT's adapters on experts have none" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.0 and config["target_parameters"]


def test_what_peft_refuses(
    finetune: Command, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(model=random_model("mamba", tiny_model, tmp_path / "model")) == 2
    assert "--target-modules: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_with_an_adapter_beside_it(
    finetune: Command, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    assert finetune(model=tmp_path / "both") == 2
    assert "holds an adapter beside the model" in capsys.readouterr().err
