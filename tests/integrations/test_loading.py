"""What is loaded from files fits the model, or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers import AutoModelForSequenceClassification as Classifier

from fastlora.integrations.peft.loading import load_adapter, trained_tensors
from fastlora.integrations.transformers.loading import (
    empty_model,
    load_config,
    load_model,
    model_class,
)

pytestmark = pytest.mark.filterwarnings("ignore")
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder."""
    folder = tmp_path_factory.mktemp("models") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """An adapter for it, with a trained copy of its head."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(model.parent / "adapter")
    return model.parent / "adapter"


def changed(folder: Path, target: Path, change: Change) -> Path:
    """A copy of a folder with other tensors."""
    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = {name: t.clone() for name, t in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def in_codes(part: str, dtype: torch.dtype) -> Change:
    return lambda tensors: {n: t.to(dtype) if part in n else t for n, t in tensors.items()}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def without(part: str) -> Change:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def more(old: str, new: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        added = {name.replace(old, new): t for name, t in tensors.items() if old in name}
        return tensors | added

    return change


def test_an_adapter_that_fits(model: Path, adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    got = load_adapter(base, adapter).eval()
    want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(got(ids).logits, want(ids).logits)
    assert list(trained_tensors(adapter)) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed("model.layers", "transformer.h"),
            r"lacks 8 tensors: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight, .* and 4 more; "
            r"it has, and the model has no place for, 8 tensors: transformer\.h\.0",
        ),
        (without("layers.1"), r"it lacks 4 tensors: model\.layers\.1\.self_attn\.q_proj\.lora_A"),
        (without("v_proj.lora_B"), r"it lacks 2 tensors: model\.layers\.0\.self_attn\.v_proj"),
        (more("layers.1.", "layers.7."), r"has no place for, 4 tensors: model\.layers\.7\."),
        (without("lm_head"), r"it lacks 1 tensor: lm_head\.weight"),
        (
            lambda tensors: {name: t[:2] if "lora_A" in name else t for name, t in tensors.items()},
            r"size mismatch for .*q_proj\.lora_A",
        ),
    ],
    ids=["renamed", "a layer less", "tensors less", "a layer more", "no head", "other shapes"],
)
def test_an_adapter_that_does_not_fit(
    change: Change, message: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = changed(adapter, tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        load_adapter(AutoModelForCausalLM.from_pretrained(model), folder)


def test_other_adapters_and_broken_files(model: Path, adapter: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with adapter_config\.json"):
        load_adapter(base, model)
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), ia3).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(ValueError, match="peft_type must be LORA or ADALORA, got IA3"):
        load_adapter(base, tmp_path / "ia3")

    def broken(name: str, file: str, content: bytes | None) -> Path:
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
        return folder

    weights, config = "adapter_model.safetensors", "adapter_config.json"
    whole = (adapter / weights).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    fields: dict[str, Any] = json.loads((adapter / config).read_text())
    for folder, error, message in (
        (broken("none", weights, None), FileNotFoundError, r"but no adapter_model\.safetensors"),
        (broken("cut", weights, whole[:500]), ValueError, "the weights in .*cut can't be read"),
        (broken("lfs", weights, pointer), ValueError, "the weights in .*lfs can't be read"),
        (broken("json", config, b"{"), ValueError, "is no adapter's config"),
        (broken("list", config, b"[]"), ValueError, "is no adapter's config"),
        (
            broken("kind", config, json.dumps(fields | {"peft_type": "NEW"}).encode()),
            ValueError,
            "peft_type must be LORA or ADALORA, got NEW",
        ),
    ):
        with pytest.raises(error, match=message):
            load_adapter(base, folder)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_model_that_lacks_weights(quantised: bool, model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if quantised:
        options |= {"quantization_config": FOUR_BIT, "device_map": {"": "cpu"}}
    assert load_model(model, **options).num_parameters() > 0
    lacking = changed(model, tmp_path / "lacking", without("layers.0.self_attn.q_proj"))
    message = r"it lacks 1 tensor: model\.layers\.0\.self_attn\.q_proj\.weight"
    with pytest.raises(ValueError, match=message):
        load_model(lacking, **options)
    deeper = changed(model, tmp_path / "deeper", more("layers.1.", "layers.2."))
    with pytest.raises(ValueError, match=r"no place for, 9 tensors: model\.layers\.2"):
        load_model(deeper, **options)


def test_a_model_of_other_shapes_or_broken(model: Path, tmp_path: Path) -> None:
    narrow = changed(
        model,
        tmp_path / "narrow",
        lambda tensors: {n: t[:, :2] if "q_proj" in n else t for n, t in tensors.items()},
    )
    message = r"q_proj\.weight must be \[64, 64\], got \[64, 2\], and 1 more"
    with pytest.raises(ValueError, match=message):
        load_model(narrow)
    cut = tmp_path / "cut"
    shutil.copytree(model, cut)
    (cut / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"the model in .*cut can't be loaded"):
        load_model(cut)
    (cut / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"can't be loaded: .*no file named"):
        load_model(cut)


def test_a_classifier_on_a_language_model(model: Path) -> None:
    """Its head comes from the adapter; the language model's own is left out."""
    assert model_class(model) is LlamaForCausalLM
    assert model_class(model, "CAUSAL_LM") is LlamaForCausalLM
    assert model_class(model, "SEQ_CLS") is Classifier
    with pytest.raises(ValueError, match=r"it lacks 1 tensor: score\.weight; .* lm_head\.weight"):
        load_model(model, Classifier)
    assert load_model(model, Classifier, ["score.weight"], num_labels=3).score.out_features == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_codes_in_place_of_weights(
    dtype: torch.dtype, model: Path, adapter: Path, tmp_path: Path
) -> None:
    """As those of a model in 8 bits whose config has lost what says so: the peers cast them."""
    broken = changed(model, tmp_path / "model", in_codes("0.mlp.up_proj", dtype))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight must be a float"):
        load_model(broken)
    broken = changed(adapter, tmp_path / "adapter", in_codes("0.self_attn.q_proj.lora_A", dtype))
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight must be a float of 16 bits"):
        load_adapter(load_model(model), broken)


def test_codes_in_other_files(model: Path, tmp_path: Path) -> None:
    """In a pickle, or in a shard of any name; files that are not the model's don't count."""
    weights = {n: t.clone() for n, t in load_file(model / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj.weight"
    codes = {**weights, name: weights[name].to(torch.int8)}
    pickled, sharded, beside = (tmp_path / n for n in ("pickled", "sharded", "beside"))
    for folder in (pickled, sharded, beside):
        shutil.copytree(model, folder)
    (pickled / "model.safetensors").unlink()
    torch.save(codes, pickled / "pytorch_model.bin")
    (sharded / "model.safetensors").unlink()
    save_file(codes, sharded / "weights-1.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(codes, "weights-1.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in (pickled, sharded):
        with pytest.raises(ValueError, match=r"up_proj\.weight must be a float of 16 bits"):
            load_model(folder)
    save_file(codes, beside / "model-old.safetensors")
    load_model(beside)


def test_code_of_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for load in (load_model, empty_model, load_config):
        with pytest.raises(ValueError, match=str(folder)):
            load(folder)
    assert not (tmp_path / "ran").exists()


def test_fields_of_an_adapter_that_peft_does_not_know(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_new": False}))
    load_adapter(load_model(model), folder)  # switched off
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_new": True}))
    with pytest.raises(ValueError, match=r"has use_new, of which PEFT .* knows nothing"):
        load_adapter(load_model(model), folder)


def test_a_pickle_that_is_none(model: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="can't be read"):
        load_adapter(load_model(model), folder)
