"""`fastlora merge` and `finetune` on files that don't fit, and on a classifier's adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from fastlora.cli import main
from fastlora.integrations.bitsandbytes import disable_cpu_repacking

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(6, 20)[None]


def merge(model: Path, adapter: Path, out: Path, *more: str) -> int:
    return main(
        ["merge", "--model", str(model), "--adapter", str(adapter), "--out", str(out), *more]
    )


def without(folder: Path, target: Path, part: str) -> Path:
    """A copy of a folder without the tensors that have `part` in their names."""
    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = {name: t.clone() for name, t in load_file(file).items() if part not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(folder)
    return folder


def test_an_adapter_that_lacks_tensors(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = without(adapter, tmp_path / "lacking", "q_proj")
    assert merge(tiny_model, lacking, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--adapter: " in error and "it lacks 4 tensors: model.layers.0.self_attn" in error
    assert not (tmp_path / "out").exists()
    kind = json.loads((lacking / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
    (lacking / "adapter_config.json").write_text(json.dumps(kind))
    assert merge(tiny_model, lacking, tmp_path / "out") == 2
    assert "peft_type must be LORA or ADALORA, got IA3" in capsys.readouterr().err


def test_a_model_that_lacks_weights(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = without(tiny_model, tmp_path / "lacking", "layers.0.self_attn.q_proj")
    message = "it lacks 1 tensor: model.layers.0.self_attn.q_proj.weight"
    for more in ((), ("--into", "4bit")):
        assert merge(lacking, adapter, tmp_path / "out", *more) == 2
        error = capsys.readouterr().err
        assert "--model: " in error and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_no_training_on_a_model_that_lacks_weights(
    quant: str,
    tiny_model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lacking = without(tiny_model, tmp_path / "lacking", "layers.0.self_attn.q_proj")
    places = {"model": lacking, "data": text_file, "out": tmp_path / "out", "quant": quant}
    options = [str(part) for name, value in places.items() for part in (f"--{name}", value)]
    assert main(["finetune", *options, "--steps", "1", "--seq-len", "32"]) == 2
    assert "--model: " in (error := capsys.readouterr().err) and "it lacks 1 tensor" in error


@pytest.mark.parametrize("into", ["dense", "4bit"])
def test_a_classifier(into: str, tiny_model: Path, tmp_path: Path) -> None:
    """Its head is the adapter's, and what is written is a classifier."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"num_labels": 3, "pad_token_id": 2, "dtype": torch.bfloat16}
    kind = AutoModelForSequenceClassification
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(kind.from_pretrained(tiny_model, **options), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tiny_model, tmp_path / "adapter", tmp_path / "out", "--into", into) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    merged = kind.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged.score.weight, model.base_model.model.score.weight.to(
        merged.score.weight.dtype
    ))  # fmt: skip
    if into == "dense":
        fresh = PeftModel.from_pretrained(
            kind.from_pretrained(tiny_model, **options), tmp_path / "adapter"
        ).eval()
        got, want = merged(IDS).logits, fresh(IDS).logits
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("how", [["--quant", "nf4"], ["--into", "4bit"]], ids=" ".join)
def test_conv1d_in_4_bits(how: list[str], tiny_model: Path, tmp_path: Path) -> None:
    """Transformers turns GPT-2's weights for bitsandbytes; what is written is GPT-2 again."""
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, **sizes)).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    # Square, so that a turned weight would have the same shape.
    config = LoraConfig(r=4, target_modules=["attn.c_proj", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    want = model.eval()(IDS).logits.float()
    assert merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", *how) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    disable_cpu_repacking(merged)
    got = merged(IDS).logits.float()
    with model.disable_adapter():
        moved = (model(IDS).logits.float() - want).abs().mean()
    # Four bits move the logits less than the adapter does.
    assert (got - want).abs().mean() < 0.6 * moved
    if how == ["--quant", "nf4"]:
        assert type(merged.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
