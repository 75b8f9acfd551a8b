"""Merging and unmerging: PEFT's results to rounding, one rounding, and what it keeps."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import fastlora
from fastlora import ops
from fastlora.integrations import bitsandbytes as bnb
from fastlora.integrations.peft.layers import FastLoraLinear
from fastlora.integrations.peft.merge import layer as peft_merge_layer
from fastlora.integrations.peft.merge.merge import INTO
from fastlora.integrations.peft.merge.moments import InputMoments
from tests.integrations.merging import (
    DENSE,
    FOUR_BIT,
    as_dense,
    base_parameters,
    merged_by_peft,
    pair,
    quantised,
    weights_of,
)
from tests.integrations.models import (
    MLP,
    MLP4bit,
    exact,
    fill_adapters,
    last_reasons,
    llama,
    lora_layers,
    peft_model,
    train_step,
)
from tests.integrations.peft_table import CASES
from tests.tolerance import assert_close_to_exact

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("name", "several"),
    [
        *((name, False) for name in (*DENSE, *FOUR_BIT)),
        *((name, True) for name in ("LoRA", "lora_bias", "DoRA", *FOUR_BIT)),
    ],
)
def test_dense_merges_are_pefts(name: str, several: bool) -> None:
    ours, double, plain = pair(name, several)
    for model in (double, plain):
        model.merge_adapter()
    report = fastlora.merge_adapter(ours, into="dense", dtype=torch.float32)
    want, theirs = base_parameters(double), base_parameters(plain)
    got = base_parameters(ours)
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert_close_to_exact(value, want[key], theirs[key], what=key)
    assert all(layer.merged for layer in lora_layers(ours))
    assert len(report.rows) == len([m for m in ours.modules() if hasattr(m, "merged_adapters")])


def test_low_precision_adapters_are_rounded_once() -> None:
    """PEFT rounds the delta of bf16 adapters before it adds it; here only the sum is rounded."""
    torch.manual_seed(0)
    stock = peft_model(MLP()).to(torch.bfloat16)
    want = base_parameters(merged_by_peft(exact(stock)))
    report = fastlora.merge_adapter(stock)
    for key, value in base_parameters(stock).items():
        if key.endswith("weight"):
            # fp32 sums leave a tie in doubt, in one value of thousands.
            assert (value != want[key].to(torch.bfloat16)).float().mean() < 2e-3
    # Half a unit in the last of 8 bits, RMS over a binade: between 2^-10 and 2^-9.
    assert all(2**-10 < row.error < 2**-9 for row in report.rows)
    assert all(row.peft_error > row.error for row in report.rows)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_merges_are_quantised_once(quant_type: str, nested: bool) -> None:
    torch.manual_seed(0)
    model = peft_model(MLP4bit(quant_type=quant_type, nested=nested))
    sums = base_parameters(merged_by_peft(as_dense(exact(model))))
    states = [bnb.raw_quant_state(layer.get_base_layer()) for layer in lora_layers(model)]
    fastlora.merge_adapter(model)
    for layer, before, (key, value) in zip(
        lora_layers(model), states, weights_of(model), strict=True
    ):
        packed, state = ops.quantize_4bit(sums[key].float(), 64, quant_type, nested)
        off = (value - sums[key]).norm() / sums[key].norm()
        plain = ops.dequantize_4bit(packed, state, torch.float32)
        assert torch.allclose(off, (plain - sums[key]).norm() / sums[key].norm(), rtol=1e-4)
        after = bnb.raw_quant_state(layer.get_base_layer())
        for field in ("blocksize", "quant_type", "dtype", "shape"):
            assert getattr(after, field) == getattr(before, field)
        assert after.nested == nested
        # The layer computes with what the report has measured.
        x = torch.randn(3, value.shape[1])
        base = layer.get_base_layer()
        torch.testing.assert_close(base(x), x @ value.T + base.bias)


def test_two_adapters_on_4_bit_are_quantised_once() -> None:
    """PEFT quantises after each adapter. The report says what that costs, and is right."""
    ours, double, _ = pair("LoRA on NF4", several=True)
    peft = merged_by_peft(copy.deepcopy(ours))
    double.merge_adapter()
    report = fastlora.merge_adapter(ours)
    sums, theirs, got = (base_parameters(model) for model in (double, peft, ours))
    for row in report.rows:
        key = f"{row.name}.weight"
        size = sums[key].norm()
        assert row.error == pytest.approx(float((got[key] - sums[key]).norm() / size), rel=1e-4)
        assert row.peft_error == pytest.approx(
            float((theirs[key] - sums[key]).norm() / size), rel=1e-4
        )
        assert row.error < 0.85 * row.peft_error


def test_the_reports_figures() -> None:
    """Each against its formula, on a bf16 base, where the update is a few units of rounding."""
    torch.manual_seed(0)
    model = peft_model(MLP(), lora_alpha=0.05)
    for layer in lora_layers(model):
        layer.base_layer.to(torch.bfloat16)
    before = base_parameters(model)
    sums = base_parameters(merged_by_peft(exact(model)))
    theirs = merged_by_peft(copy.deepcopy(model))
    report = fastlora.merge_adapter(model)
    after = base_parameters(model)
    peft = base_parameters(theirs)
    for row in report.rows:
        key = f"{row.name}.weight"
        W, M, update = before[key].double(), after[key].double(), sums[key] - before[key].double()
        figures = {
            "size": update.norm() / W.norm(),
            "error": (M - W - update).norm() / (W + update).norm(),
            "lost": (M - W - update).norm() / update.norm(),
            "kept": ((M - W) * update).sum() / update.square().sum(),
            "peft_kept": ((peft[key].double() - W) * update).sum() / update.square().sum(),
            "peft_error": (peft[key].double() - W - update).norm() / (W + update).norm(),
        }
        for name, value in figures.items():
            assert getattr(row, name) == pytest.approx(float(value), rel=1e-3), name
        assert row.base == "bf16"
        assert row.lost > 0.2
    assert "2 layers merged" in str(report)


def test_a_small_update_is_swallowed_by_4_bits_unless_the_original_weights_are_at_hand() -> None:
    torch.manual_seed(0)
    # Many weights: the rounding of each is noise beside the update, which only their sum shows.
    dense = MLP(256, 512, 256)
    model = quantised(dense)
    for layer in lora_layers(model):
        layer.scaling["default"] = 0.02
    plain, original = copy.deepcopy(model), copy.deepcopy(model)
    for row in fastlora.merge_adapter(plain).rows:
        assert row.size < 0.005 and row.lost > 0.9 and row.kept < 0.2
    for row in fastlora.merge_adapter(original, base=dense).rows:
        assert 0.5 < row.kept < 1.5 and row.peft_kept < 0.2


@pytest.mark.parametrize("kind", ["model", "PEFT model", "state dict", "file", "shards"])
@pytest.mark.parametrize("into", INTO)
def test_sources_of_original_weights(kind: str, into: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = MLP(64, 128, 32)
    model = quantised(dense)
    tensors = {f"model.{name}": t.detach().clone() for name, t in dense.named_parameters()}
    source: Any = tmp_path
    if kind == "model":
        source = dense
    elif kind == "PEFT model":
        source = peft_model(copy.deepcopy(dense))
    elif kind == "state dict":
        source = tensors
    elif kind == "file":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        files = {name: f"{name.split('.')[1]}.safetensors" for name in tensors}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, tmp_path / file)
    want = {
        name: getattr(dense, name.split(".")[2]).weight + layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "merged_adapters")
    }
    report = fastlora.merge_adapter(model, base=source, into=into)
    got = base_parameters(model)
    for row in report.rows:
        value = want[row.name].detach()
        if into == "4bit":
            packed, state = ops.quantize_4bit(value, 64, "nf4")
            value = ops.dequantize_4bit(packed, state, torch.float32)
        torch.testing.assert_close(got[f"{row.name}.weight"], value, atol=2e-3, rtol=0)
        assert row.peft_error is not None


# ---- unmerging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mine", [True, False], ids=["ours", "PEFT's"])
@pytest.mark.parametrize(
    "name", ["LoRA", "LoRA, bf16 base, fp32 adapters", "lora_bias", "DoRA", "embedding"]
)
def test_unmerge_gives_the_weights_back(name: str, mine: bool) -> None:
    model = pair(name)[0]
    before = base_parameters(model)
    fastlora.merge_adapter(model)
    if mine:
        assert fastlora.unmerge_adapter(model) == len(lora_layers(model))
    else:
        model.unmerge_adapter()
    eps = max(torch.finfo(p.dtype).eps for p in before.values())
    for key, value in base_parameters(model).items():
        assert value.dtype == before[key].dtype
        torch.testing.assert_close(value, before[key], atol=4 * eps, rtol=4 * eps)
    assert not any(layer.merged for layer in lora_layers(model))


def test_unmerge_of_4_bit_takes_all_of_lora_bias_out() -> None:
    """PEFT's own 4-bit merge and unmerge leave out its scaling."""
    model = pair("lora_bias on NF4")[0]
    before = base_parameters(model)
    fastlora.merge_adapter(model)
    fastlora.unmerge_adapter(model)
    after = base_parameters(model)
    for key, value in before.items():
        if key.endswith("bias"):
            torch.testing.assert_close(after[key], value)
        else:
            assert (after[key] - value).norm() < 0.2 * value.norm()


@pytest.mark.parametrize("name", FOUR_BIT)
def test_dense_layers_for_4_bit_ones_unmerge_and_train(name: str) -> None:
    model = CASES[name].trio()[0]
    before = base_parameters(model)
    fastlora.merge_adapter(model, into="dense", dtype=torch.float32)
    assert {type(layer) for layer in lora_layers(model)} == {FastLoraLinear}
    model.unmerge_adapter()
    for key, value in base_parameters(model).items():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=1e-5)
    assert {row.reason for row in fastlora.explain(model).rows} == {""}
    merged = copy.deepcopy(model)
    fastlora.merge_adapter(merged)
    x = torch.randn(5, lora_layers(model)[0].in_features)
    y = [lora_layers(m)[0](x) for m in (model, merged)]
    torch.testing.assert_close(*y, atol=1e-5, rtol=1e-5)


def test_the_merged_model_stands_alone() -> None:
    torch.manual_seed(0)
    model = peft_model(MLP4bit())
    x = torch.randn(4, 64)
    with torch.no_grad():
        want = model(x)
        fastlora.merge_adapter(model, into="dense", dtype=torch.float32)
        alone = model.merge_and_unload()
        assert {type(m) for m in (alone.up, alone.down)} == {nn.Linear}
        torch.testing.assert_close(alone(x), want, atol=1e-5, rtol=1e-5)


def test_training_goes_on_after_unmerging() -> None:
    torch.manual_seed(0)
    model = fastlora.accelerate(peft_model(MLP()), verbose=False)
    x = torch.randn(6, 37)
    before = {k: v.clone() for k, v in train_step(model, x).items()}
    parameters = dict(model.named_parameters())
    fastlora.merge_adapter(model)
    fastlora.unmerge_adapter(model)
    # The very same parameters: optimizers and hooks hold them.
    assert all(p is parameters[name] for name, p in model.named_parameters())
    for name, value in train_step(model, x).items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4)


def test_merging_goes_on_with_further_adapters() -> None:
    model, double, _ = pair("LoRA", several=True)
    fastlora.merge_adapter(model, ["default", "default"])
    assert {tuple(layer.merged_adapters) for layer in lora_layers(model)} == {("default",)}
    fastlora.merge_adapter(model)
    assert {tuple(layer.merged_adapters) for layer in lora_layers(model)} == {("default", "other")}
    double.merge_adapter()
    want = base_parameters(double)
    for key, value in base_parameters(model).items():
        torch.testing.assert_close(value.double(), want[key], atol=1e-6, rtol=1e-5)


def test_a_shared_weight_is_parted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["head"])
    model = fill_adapters(get_peft_model(Tied(), config))
    ids, table = torch.arange(11), model.base_model.model.embed.weight.clone()
    want = model(ids)
    fastlora.merge_adapter(model)
    torch.testing.assert_close(model(ids), want)
    assert torch.equal(model.base_model.model.embed.weight, table)


def test_progress_counts_layers() -> None:
    calls: list[tuple[int, int]] = []
    fastlora.merge_adapter(peft_model(MLP()), progress=lambda *done: calls.append(done))
    assert calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize("with_graph", [True, False])
def test_tied_adapters(with_graph: bool) -> None:
    """PEFT keeps views of the embedding's A and B in lm_head, with their graph or without."""

    def tied() -> nn.Module:
        torch.manual_seed(0)
        targets = ["embed_tokens", "q_proj", "lm_head"]
        config = LoraConfig(r=3, target_modules=targets, ensure_weight_tying=True)
        with torch.set_grad_enabled(with_graph):
            return fill_adapters(get_peft_model(llama(tied=True), config)).eval()

    model, ids = tied(), torch.arange(6)[None]
    with torch.no_grad():
        want = model(ids).logits
        fastlora.merge_adapter(model)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_moments", [False, True], ids=["plain", "moments"])
def test_no_layers_copies_outlive_it(with_moments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two layers, no dense copy of a weight is alive."""
    torch.manual_seed(0)
    dense = MLP(64, 128, 32)
    model = quantised(dense)
    moments = InputMoments(model, [{"x": torch.randn(9, 64)}]) if with_moments else None
    copies: list[weakref.ref[Tensor]] = []

    def noted(make: Any) -> Any:
        def call(*arguments: Any) -> Tensor:
            copies.append(weakref.ref(tensor := make(*arguments)))
            return tensor

        return call

    for name in ("_decoded", "_wide"):
        monkeypatch.setattr(peft_merge_layer, name, noted(getattr(peft_merge_layer, name)))
    alive: list[int] = []

    def count(done: int, of: int) -> None:
        gc.collect()
        alive.append(sum(copy() is not None for copy in copies))

    base = None if with_moments else dense
    fastlora.merge_adapter(model, base=base, moments=moments, progress=count)
    # Per layer: W and what PEFT has made of it, the original, the bias, and what is stored.
    assert len(copies) >= 8 - 2 * with_moments and alive == [0, 0]


def test_comparing_can_be_left_out() -> None:
    report = fastlora.merge_adapter(peft_model(MLP()), compare=False)
    assert all(row.peft_error is None and row.error is not None for row in report.rows)
    assert "PEFT" not in str(report)


# ---- error feedback ------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs() -> None:
    torch.manual_seed(0)
    model = fastlora.accelerate(peft_model(MLP4bit()), verbose=False).eval()
    batches = [{"x": torch.randn(2, 5, 64)}, {"x": torch.randn(3, 5, 64)}]
    x = torch.cat([batch["x"].reshape(-1, 64) for batch in batches])
    first, second = "base_model.model.up", "base_model.model.down"
    moments = InputMoments(model, batches)
    assert list(moments) == [first, second] and len(moments) == 2 and first in moments
    torch.testing.assert_close(moments[first], x.T @ x)
    assert last_reasons(model) == {""}
    hidden = torch.nn.functional.silu(model.base_model.model.up(x)).detach()
    torch.testing.assert_close(moments[second], hidden.T @ hidden)
    with pytest.raises(KeyError):
        moments["base_model.model.other"]
    # A budget of one layer: the others come in a later pass.
    small = InputMoments(model, batches, budget=1)
    torch.testing.assert_close(small[first], x.T @ x)
    assert list(small._held) == [first]
    torch.testing.assert_close(small[second], hidden.T @ hidden)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_without_inputs_is_named() -> None:
    with pytest.raises(ValueError, match=r"base_model\.model\.up got no input"):
        InputMoments(peft_model(MLP4bit()), [])["base_model.model.up"]


def test_merging_with_feedback_lowers_the_output_error() -> None:
    torch.manual_seed(0)
    dense = MLP(64, 128, 32)
    model = quantised(dense).eval()
    # Inputs of few directions, as those of language models are.
    mix = torch.randn(8, 64)
    inputs = [{"x": torch.randn(64, 8) @ mix + 0.1 * torch.randn(64, 64)} for _ in range(4)]
    plain = copy.deepcopy(model)
    given = dict(InputMoments(plain, inputs))
    moments = InputMoments(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = fastlora.merge_adapter(model, moments=moments).rows
    exact_layer = lora_layers(plain)[0]
    packed = exact_layer.get_base_layer().weight
    decoded = ops.dequantize_4bit(packed.data, packed.quant_state, torch.float32)
    want = exact_layer.get_delta_weight("default") + decoded
    held_out = torch.randn(200, 8) @ mix + 0.1 * torch.randn(200, 64)
    fastlora.merge_adapter(plain)
    errors = [
        float((held_out @ (base_parameters(m)["base_model.model.up.weight"] - want).T).norm())
        for m in (model, plain)
    ]
    assert errors[0] < 0.6 * errors[1]
    # What the report says of the first layer is what the moments give.
    off = base_parameters(model)["base_model.model.up.weight"] - want
    H = given["base_model.model.up"]
    ratio = ((off @ H * off).sum() / (want @ H * want).sum()).sqrt()
    assert rows[0].output_error == pytest.approx(float(ratio), rel=1e-3)
