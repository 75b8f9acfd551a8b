"""Merging into weights that layers share: each gets its own update, saved models included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastlora.integrations.peft.merge.merge import merge_adapter
from fastlora.integrations.transformers import make_savable

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(8)[None]
ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "table": {"target_modules": ["embed_tokens"]},
    "both, one adapter": {
        "target_modules": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "a trained copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "replicated layers": {
        "target_modules": ["q_proj", "down_proj"],
        "layer_replication": [[0, 2], [0, 2]],
    },
}


def adapted(tied: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=tied, **sizes)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", ADAPTERS)
def test_shared_weights_are_parted(name: str, tmp_path: Path) -> None:
    want = logits(adapted(**ADAPTERS[name]))
    model = adapted(**ADAPTERS[name])
    merge_adapter(model, into="dense")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-5)
    make_savable(merged)
    merged.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(saved), want, rtol=0, atol=1e-5)


def test_what_nothing_is_merged_into_stays_tied(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"])
    merge_adapter(model, into="dense")
    merged = model.merge_and_unload()
    make_savable(merged)
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    again = adapted(tied=False, target_modules=["lm_head"])
    before = again.base_model.model.model.embed_tokens.weight
    merge_adapter(again, into="dense")
    assert again.base_model.model.model.embed_tokens.weight is before
