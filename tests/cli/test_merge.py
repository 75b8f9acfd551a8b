"""`fastlora merge`: what it writes loads as any model, and computes what the adapter did."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fastlora
from fastlora.cli import main
from fastlora.integrations import bitsandbytes as bnb
from fastlora.integrations.bitsandbytes import disable_cpu_repacking, linear4bit_modules

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(6, 20)[None]


def load(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    disable_cpu_repacking(model)
    return model


def load_4bit(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return load(folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits.float()


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on some linears, B not zero, and a trained copy of the norm at the end."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    model = get_peft_model(load(tiny_model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def four_bit(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a 4-bit folder."""
    folder = tmp_path_factory.mktemp("four_bit")
    load_4bit(tiny_model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def merge(model: Path, adapter: Path, out: Path, *more: str) -> int:
    return main(
        ["merge", "--model", str(model), "--adapter", str(adapter), "--out", str(out), *more]
    )


def test_dense(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "merged"
    assert merge(tiny_model, adapter, out) == 0
    merged, peft = load(out), PeftModel.from_pretrained(load(tiny_model), adapter)
    peft = peft.merge_and_unload()
    assert merged.dtype == torch.bfloat16
    for name, parameter in peft.named_parameters():
        # fp32 adapters: PEFT rounds once as well, and the same sums round alike but for ties.
        other = merged.get_parameter(name)
        assert (other != parameter).float().mean() < 2e-3, name
    tokens = AutoTokenizer.from_pretrained(out)("the cat").input_ids
    assert tokens == AutoTokenizer.from_pretrained(tiny_model)("the cat").input_ids
    text = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj (x2)" in text and "4 layers merged" in text
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_quantised_then_dense(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    """What QLoRA trained, decoded: nothing is lost but the rounding to bf16."""
    out = tmp_path / "merged"
    assert merge(tiny_model, adapter, out, "--quant", "nf4", "--dtype", "float32") == 0
    merged = load(out, dtype=torch.float32)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not list(linear4bit_modules(merged))
    trained = PeftModel.from_pretrained(load_4bit(tiny_model), adapter).eval()
    # bitsandbytes decodes a weight wrongly on a CPU where a row is no multiple of its blocks.
    fastlora.accelerate(trained, verbose=False)
    assert (logits(merged) - logits(trained)).norm() < 0.02 * logits(trained).norm()
    # The layers without an adapter are decoded, too.
    linear = trained.base_model.model.model.layers[0].mlp.up_proj
    decoded = bnb.dense_weight(linear, torch.float32)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, decoded)


@torch.no_grad()
def test_calibration_lowers_the_error(
    four_bit: Path, tiny_model: Path, adapter: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "dense"
    assert merge(four_bit, adapter, out) == 0
    dense = load(out)
    ids = AutoTokenizer.from_pretrained(tiny_model)(text_file.read_text()).input_ids
    ids = torch.tensor(ids[-512:])[None]
    errors = []
    for name, more in {"plain": (), "calibrated": ("--calibrate", str(text_file))}.items():
        out = tmp_path / name
        assert merge(four_bit, adapter, out, "--into", "4bit", "--examples", "4", *more) == 0
        model = load(out)
        assert len(list(linear4bit_modules(model))) == 14
        assert torch.equal(model.model.norm.weight, dense.model.norm.weight)
        # What leaves the first layer: after it, layers without an adapter add errors of their own.
        states = [m(ids, output_hidden_states=True).hidden_states[1] for m in (model, dense)]
        errors.append(float((states[0] - states[1]).float().norm()))
    assert errors[1] < errors[0]


def test_a_4_bit_model(
    four_bit: Path,
    tiny_model: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert merge(four_bit, adapter, tmp_path / "a", "--into", "4bit", "--layers") == 0
    assert "model.layers.1.self_attn.q_proj" in capsys.readouterr().out
    base = ["--base", str(tiny_model)]
    assert merge(four_bit, adapter, tmp_path / "b", "--into", "4bit", *base) == 0
    assert merge(tiny_model, adapter, tmp_path / "c", "--into", "4bit") == 0
    models = [load(tmp_path / name) for name in "abc"]
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in models]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    assert merge(four_bit, adapter, tmp_path / "d") == 0
    assert not list(linear4bit_modules(load(tmp_path / "d")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"--calibrate": "x.txt", "--into": "4bit"},
            r"--calibrate: with 16-bit weights, .* plain rounding gives a better model",
        ),
        ({"--out": "."}, r"--out: \. exists; nothing is overwritten"),
        ({"--adapter": "/nowhere"}, r"--adapter: expected a folder with adapter_config\.json"),
        ({"--model": "/nowhere"}, r"--model: expected a folder with config\.json"),
        ({"--calibrate": "x.txt"}, r"--calibrate: only --into 4bit rounds by it"),
        ({"--base": "/nowhere"}, r"--base: expected a folder with \*\.safetensors files"),
    ],
)
def test_refused_before_anything_is_loaded(
    more: dict[str, str],
    message: str,
    tiny_model: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"--model": str(tiny_model), "--adapter": str(adapter), "--out": str(tmp_path / "o")}
    assert main(["merge", *(part for pair in {**given, **more}.items() for part in pair)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_refused_by_the_model(
    tiny_model: Path,
    four_bit: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert merge(tiny_model, adapter, out, "--base", str(tiny_model)) == 2
    assert "--base: --model is dense" in capsys.readouterr().err
    assert merge(four_bit, adapter, out, "--quant", "nf4") == 2
    assert "is stored quantised already" in capsys.readouterr().err
    config = LoraConfig(
        r=4, target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"
    )
    get_peft_model(load(tiny_model), config).save_pretrained(tmp_path / "alora")
    assert merge(tiny_model, tmp_path / "alora", out) == 2
    assert "aLoRA does not support merging" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["alora"]


def test_a_failed_write_leaves_nothing(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    def full(self: Any, folder: Any, **options: Any) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    assert merge(tiny_model, adapter, tmp_path / "out") == 1
    assert not list(tmp_path.iterdir())


def test_the_benchmark_measures_every_way(
    tiny_model: Path,
    adapter: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`python -m benchmarks.measure.merging`, on the tiny model."""
    from benchmarks.measure import merging

    monkeypatch.setattr(merging, "smollm2", lambda: tiny_model)
    monkeypatch.setattr(merging, "topics", lambda cache_dir: text_file)
    monkeypatch.setattr(merging, "RESULTS", tmp_path / "merging.csv")
    monkeypatch.setattr(merging, "_LENGTH", 64)
    monkeypatch.setattr("sys.argv", ["merging", "--adapter", str(adapter)])
    merging.main()
    with merging.RESULTS.open(newline="") as file:
        found = {row["way"]: float(row["kl"]) for row in csv.DictReader(file)}
    assert list(found) == list(merging._SHOWN)
    assert len(merging.table().splitlines()) == 2 + len(found)
    # The tiny adapter is as large as the weights: leaving it out is worst, decoding costs least.
    assert found["unmerged"] == 0 and found["dense"] < found["4bit"]
    assert max(found, key=found.__getitem__) == "none"
