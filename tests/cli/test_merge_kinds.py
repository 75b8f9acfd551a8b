"""`fastlora merge` and `fastlora spectrum` on models that are no plain decoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fastlora.cli import main
from fastlora.integrations.names import plain_name
from fastlora.integrations.spectrum import peft_target, spectrum
from fastlora.integrations.transformers.loading import empty_model

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LANGUAGE = r".*language_model.*(q_proj|down_proj)"


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


def gemma3() -> Any:
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 63, "boi_token_index": 62, "eoi_token_index": 61}
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16}, vision_config=vision, mm_tokens_per_image=4, **tokens
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": rope}, vision_config=vision
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


KINDS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "T5": (t5, ["q", "v", "wi", "wo"], "SEQ_2_SEQ_LM"),
    "Gemma-3 with vision": (gemma3, LANGUAGE, "CAUSAL_LM"),
    "Qwen2-VL": (qwen2_vl, LANGUAGE, "CAUSAL_LM"),
}


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A folder with model/ and adapter/, and the model with the adapter."""
    make, targets, task = KINDS[request.param]
    torch.manual_seed(0)
    model = make().bfloat16()
    model.save_pretrained(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=targets, task_type=task, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path, adapted


def merge(folder: Path, *options: str) -> int:
    paths = (f"--{name}={folder / name}" for name in ("model", "adapter"))
    return main(["merge", *paths, f"--out={folder / 'out'}", *options])


def test_merged_models_keep_their_class(saved: tuple[Path, Any]) -> None:
    folder, adapted = saved
    assert merge(folder) == 0
    want = adapted.merge_and_unload()
    got = type(want).from_pretrained(folder / "out", dtype=torch.bfloat16).state_dict()
    assert got.keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=1e-6)


def test_merging_into_4_bits(saved: tuple[Path, Any]) -> None:
    """The names in the files of some differ from those of the layers."""
    pytest.importorskip("bitsandbytes")
    folder, adapted = saved
    assert merge(folder, "--into=4bit") == 0
    kind = type(adapted.get_base_model())
    got = kind.from_pretrained(folder / "out", dtype=torch.bfloat16)
    assert any(type(module).__name__ == "Linear4bit" for module in got.modules())


def test_spectrum(saved: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved
    assert main(["spectrum", f"--model={folder / 'model'}", "--share=0.5"]) == 0
    regex = capsys.readouterr().out.strip().splitlines()[-1]
    ranking = spectrum(folder / "model", 0.5)
    assert regex == peft_target(folder / "model", ranking) == ranking.regex
    assert {name for name, _ in empty_model(folder / "model").named_modules()} >= set(
        ranking.target_modules
    )


def test_a_weight_that_spectrum_does_not_find(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    weights = load_file(tiny_model / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    assert main(["spectrum", f"--model={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "--model: source must have one weight for layer model.layers.1.mlp.down_proj" in error


# ---- experts -----------------------------------------------------------------------------------


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=4))


def deepseek() -> Any:
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
    config = transformers.DeepseekV3Config(
        **TEXT, **ranks, **experts, v_head_dim=8, first_k_dense_replace=1
    )
    return transformers.DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize("make", [mixtral, deepseek])
def test_what_peft_takes_on_models_with_experts(
    make: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT makes last names of an expression there, and of some names those of experts."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["spectrum", f"--model={tmp_path}", "--share=0.4"]) == 0
    *_, heading, target = capsys.readouterr().out.strip().splitlines()
    chosen = spectrum(tmp_path, 0.4).target_modules
    assert json.loads(target) == chosen
    if make is deepseek:
        assert heading.endswith("The chosen layers are")
        return
    assert heading == "target_modules for PEFT:"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=chosen))
    found = [plain_name(n) for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
    assert sorted(found) == sorted(chosen)
