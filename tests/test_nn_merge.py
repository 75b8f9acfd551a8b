"""Merging in LoraLinear and QLoraLinear: what it rounds, and what comes back."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import LoraLinear, QLoraLinear, lora_linear, reference
from tests.peft_layers import NESTED, K, N, R, copy_adapters, fill_B, peft_layer
from tests.tolerance import assert_close_to_exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_merge_matches_peft_and_unmerge_restores_the_bits(dtype: torch.dtype) -> None:
    dense = nn.Linear(K, N, dtype=dtype)
    ours = LoraLinear.from_linear(copy.deepcopy(dense), r=R, lora_alpha=16)
    fill_B(ours)
    theirs = peft_layer(dense, r=R, lora_alpha=16)
    copy_adapters(ours, theirs)
    x = torch.randn(5, K).to(dtype)
    before, original = ours(x), ours.weight.detach().clone()
    exact = reference.merge_weight(
        ours.weight.detach().double(),
        ours.lora_A["default"].weight.detach(),
        ours.lora_B["default"].weight.detach(),
        ours.scaling,
    )
    error = ours.merge()
    theirs.merge()
    assert ours.merged and ours.merge() is error
    assert_close_to_exact(ours.weight, exact, theirs.base_layer.weight, what="merged weight")
    off = ours.weight.detach().double() - exact
    # The report is taken against fp32 sums, so in fp32 it is zero, and elsewhere right to fp32.
    slack = 1e-5
    assert abs(error.max_abs - (0.0 if dtype == torch.float32 else off.abs().max())) < slack
    assert error.relative < torch.finfo(dtype).eps
    assert not ours(x).requires_grad
    assert torch.equal(ours(x), nn.functional.linear(x, ours.weight, ours.bias))
    ours.unmerge()
    assert not ours.merged and torch.equal(ours.weight, original)
    assert torch.equal(ours(x), before)
    ours.unmerge()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@NESTED
def test_4bit_merge_reports_its_rounding_and_unmerge_restores_the_bits(
    quant_type: str, nested: bool
) -> None:
    ours = QLoraLinear(
        K,
        N,
        r=R,
        dtype=torch.bfloat16,
        quant_type=quant_type,
        compress_statistics=nested,
        blocksize=32,
    )
    fill_B(ours)
    state, packed = ours.base_layer.quant_state, ours.weight.detach().clone()
    kept = [None if t is None else t.clone() for t in state.tensors()]
    x = torch.randn(5, K, dtype=torch.bfloat16)
    before = ours(x)
    decoded = reference.dequantize_4bit(packed, state, torch.float64)
    update = ours.scaling * (
        ours.lora_B["default"].weight.detach().double()
        @ ours.lora_A["default"].weight.detach().double()
    )
    error = ours.merge()
    assert ours.merged and error is ours.merge_error and ours.merge() is error
    merged_state = ours.base_layer.quant_state
    assert merged_state.dtype == torch.bfloat16 and merged_state.nested == nested
    assert (merged_state.blocksize, merged_state.quant_type) == (32, quant_type)
    merged = reference.dequantize_4bit(ours.weight, merged_state, torch.float64)
    off = merged - (decoded + update)
    # The report is computed in fp32.
    assert error.max_abs == pytest.approx(float(off.abs().max()), rel=1e-4)
    assert error.relative == pytest.approx(float(off.norm() / (decoded + update).norm()), rel=1e-4)
    assert error.relative_to_update == pytest.approx(float(off.norm() / update.norm()), rel=1e-4)
    assert 0.01 < error.relative < 0.2  # 4 bits: a tenth of the weight, give or take
    zeros = (torch.zeros(1, K, dtype=x.dtype), torch.zeros(N, 1, dtype=x.dtype))
    want = lora_linear(x, ours.weight, ours.bias, *zeros, 1.0, quant_state=merged_state)
    assert torch.equal(ours(x), want)
    ours.unmerge()
    assert not ours.merged and torch.equal(ours.weight, packed)
    for old, new in zip(kept, ours.base_layer.quant_state.tensors(), strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert torch.equal(ours(x), before)


def test_merged_4bit_layer_passes_the_gradient_through() -> None:
    layer = QLoraLinear(K, N, r=R)
    fill_B(layer)
    layer.merge()
    x = torch.randn(7, K, requires_grad=True)
    dy = torch.randn(7, N)
    layer(x).backward(dy)
    weight = reference.dequantize_4bit(layer.weight, layer.base_layer.quant_state)
    assert x.grad is not None
    assert_close_to_exact(x.grad, dy.double() @ weight.double(), dy @ weight, what="dx")
    assert layer.lora_A["default"].weight.grad is None


def test_an_adapter_of_zeros_merges_without_an_update() -> None:
    for build in (LoraLinear, QLoraLinear):
        layer = build(K, N, r=R)
        saved = copy.deepcopy(layer.state_dict())
        error = layer.merge()
        assert (error.max_abs, error.relative, error.relative_to_update) == (0, 0, 0)
        for key, value in layer.state_dict().items():
            assert torch.equal(value, saved[key]), key
        layer.unmerge()
        assert not layer.merged


@pytest.mark.parametrize("build", [LoraLinear, QLoraLinear])
def test_merge_refuses(build: Any) -> None:
    layer = build(K, N, r=R)
    fill_B(layer)
    original = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, original)
    layer.reset_lora_parameters()
    fill_B(layer)
    saved = copy.deepcopy(layer.state_dict())
    layer.merge(keep_original=False)
    with pytest.raises(RuntimeError, match="keep_original=False"):
        layer.unmerge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(saved)


def test_the_readmes_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The block under "Models of your own" runs as it stands."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = readme.split("**Models of your own.**")[1].split("```python\n")[1].split("```")[0]
    exec(block, {"__name__": "readme"})
    assert re.match(r"MergeError\(max_abs=0\.\d+, relative=0\.\d+", capsys.readouterr().out)
