"""What LoraLinear and QLoraLinear hold: how it begins, is saved, loaded, copied, moved and cast."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import LoraLinear, QLoraLinear, reference
from fastlora.nn import Linear4bit, MergeError
from fastlora.quant import packed_bytes
from tests.peft_layers import NESTED, K, N, R, bnb, copy_adapters, fill_B, linear4bit, peft_layer

# ---- initialisation ----------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4bit"])
def test_the_seed_gives_pefts_own_weights(init: Any, dtype: torch.dtype, quantised: bool) -> None:
    dense = nn.Linear(K, N, dtype=dtype)
    base = linear4bit(dense) if quantised else dense
    build = QLoraLinear.from_linear4bit if quantised else LoraLinear.from_linear
    torch.manual_seed(11)
    ours = build(base, r=R, init_lora_weights=init)
    torch.manual_seed(11)
    theirs = peft_layer(base, r=R, init_lora_weights=init)
    for name in ("lora_A", "lora_B"):
        a, b = getattr(ours, name)["default"].weight, getattr(theirs, name)["default"].weight
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b), name


def test_initialisation_has_the_stated_distribution() -> None:
    K, N, r = 512, 256, 64
    for init, std in ((True, 1 / math.sqrt(3 * K)), ("gaussian", 1 / r), (False, None)):
        layer = LoraLinear(K, N, r=r, init_lora_weights=init)  # type: ignore[arg-type]
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        if std is None:
            std = 1 / math.sqrt(3 * K)
            assert abs(B.std() - 1 / math.sqrt(3 * r)) < 0.02 / math.sqrt(3 * r)
        else:
            assert not B.any()
        # 32768 draws: the standard error of the mean is std / 181, that of the std below std / 256.
        assert abs(A.mean()) < 5 * std / math.sqrt(A.numel())
        assert abs(A.std() - std) < 5 * std / math.sqrt(2 * A.numel())


def test_adapters_stay_fp32_over_a_bf16_base_unless_asked() -> None:
    assert LoraLinear(K, N, dtype=torch.bfloat16).lora_A["default"].weight.dtype == torch.float32
    layer = LoraLinear(K, N, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert layer.lora_B["default"].weight.dtype == torch.bfloat16
    assert layer.to(torch.float32)(torch.randn(2, K)).dtype == torch.float32


# ---- state dicts -------------------------------------------------------------------------------


def test_dense_state_dict_goes_both_ways_with_peft() -> None:
    ours = LoraLinear(K, N, r=R, dtype=torch.bfloat16)
    fill_B(ours)
    theirs = peft_layer(nn.Linear(K, N, dtype=torch.bfloat16), r=R)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, K, dtype=torch.bfloat16)
    again = LoraLinear(K, N, r=R, dtype=torch.bfloat16)
    assert not torch.equal(again(x), ours(x))
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again(x), ours(x))
    named = LoraLinear(K, N, adapter_name="french")
    assert {"lora_A.french.weight", "lora_B.french.weight"} < named.state_dict().keys()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@NESTED
def test_4bit_state_dict_comes_from_bitsandbytes(
    storage: torch.dtype, assign: bool, nested: bool
) -> None:
    theirs = peft_layer(linear4bit(nn.Linear(K, N), nested, storage=storage), r=R)
    fill_B(theirs)
    saved = theirs.state_dict()
    ours = QLoraLinear(K, N, r=R, blocksize=128, quant_type="fp4")
    ours.load_state_dict(saved, assign=assign)
    assert torch.equal(packed_bytes(ours.weight), packed_bytes(theirs.base_layer.weight))
    state = theirs.base_layer.weight.quant_state
    assert torch.equal(ours.base_layer.quant_state.absmax, state.absmax)
    assert (ours.base_layer.quant_state.absmax.data_ptr() == state.absmax.data_ptr()) == assign
    want = QLoraLinear.from_linear4bit(theirs.base_layer, r=R)
    copy_adapters(theirs, want)
    x = torch.randn(3, K)
    assert torch.equal(ours(x), want(x))


@NESTED
def test_4bit_state_dict_goes_to_bitsandbytes(nested: bool) -> None:
    ours = QLoraLinear(K, N, r=R, compress_statistics=nested)
    saved = ours.state_dict()
    keys = {key.removeprefix("base_layer.weight.") for key in saved if ".weight." in key}
    assert keys - {"lora_A.default.weight", "lora_B.default.weight"} == (
        {"absmax", "quant_map", "quant_state.bitsandbytes__nf4"}
        | ({"nested_absmax", "nested_quant_map"} if nested else set())
    )
    prefix = "base_layer.weight."
    entries = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    weight = bnb.nn.Params4bit.from_prequantized(
        saved["base_layer.weight"], entries, device="cpu", requires_grad=False
    )
    expected = reference.dequantize_4bit(ours.weight, ours.base_layer.quant_state)
    decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(decoded, expected)


@NESTED
def test_4bit_state_dict_round_trip(nested: bool) -> None:
    ours = QLoraLinear(31, 9, r=3, compress_statistics=nested, dtype=torch.bfloat16)
    fill_B(ours)
    other = QLoraLinear(31, 9, r=3, compress_statistics=not nested, dtype=torch.bfloat16)
    x = torch.randn(3, 31, dtype=torch.bfloat16)
    assert not torch.equal(other(x), ours(x))
    buffer = io.BytesIO()
    torch.save(nn.ModuleDict({"a": ours}).state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    nn.ModuleDict({"a": other}).load_state_dict(saved)
    assert torch.equal(other(x), ours(x))
    with torch.device("meta"):
        empty = QLoraLinear(31, 9, r=3, dtype=torch.bfloat16)
    nn.ModuleDict({"a": empty}).load_state_dict(saved, assign=True)
    assert torch.equal(empty(x), ours(x))


def test_4bit_state_dict_errors() -> None:
    ours = QLoraLinear(K, N, r=R)
    saved = ours.state_dict()
    bare = {key: value for key, value in saved.items() if "weight." not in key or "lora" in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*base_layer\.weight\.absmax"):
        ours.load_state_dict(bare)
    with pytest.raises(RuntimeError, match=r"shape must be \(128, 72\), got \(72, 128\)"):
        QLoraLinear(N, K, r=R).load_state_dict(
            {k: v for k, v in saved.items() if k.startswith("base_layer.weight")}, strict=False
        )
    partial = {k: v for k, v in saved.items() if not k.endswith("absmax")}
    with pytest.raises(RuntimeError, match="missing \\['absmax', 'nested_absmax'\\]"):
        ours.load_state_dict(partial)


# ---- copies, moves, casts ----------------------------------------------------------------------


def saved_and_loaded(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_pickles_name_one_module() -> None:
    """So that they load wherever in fastlora.nn a class may stand."""
    classes = (LoraLinear, QLoraLinear, Linear4bit, MergeError)
    assert {kind.__module__ for kind in classes} == {"fastlora.nn"}


@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize("build", [LoraLinear, QLoraLinear])
def test_deepcopy_and_pickle(build: Any, merged: bool) -> None:
    layer = build(K, N, r=R, dtype=torch.bfloat16)
    fill_B(layer)
    original = layer.weight.detach().clone()
    if merged:
        layer.merge()
    x = torch.randn(3, K, dtype=torch.bfloat16)
    for other in (copy.deepcopy(layer), saved_and_loaded(layer)):
        assert torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        other.unmerge()
        assert torch.equal(other.weight, original)
        assert layer.merged == merged


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
    ],
)
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@NESTED
def test_no_cast_reaches_the_packed_weight(cast: Any, merged: bool, nested: bool) -> None:
    layer = QLoraLinear(K, N, r=R, compress_statistics=nested)
    fill_B(layer)
    if merged:
        layer.merge()
    packed = layer.weight.detach().clone()
    before = [None if t is None else t.clone() for t in layer.base_layer.quant_state.tensors()]
    model = cast(nn.Sequential(layer))
    assert model[0].lora_A["default"].weight.dtype != torch.float32
    assert layer.bias.dtype == layer.lora_A["default"].weight.dtype
    assert layer.weight.dtype == torch.uint8 and torch.equal(layer.weight, packed)
    for old, new in zip(before, layer.base_layer.quant_state.tensors(), strict=True):
        assert (old is None and new is None) or (old.dtype == new.dtype and torch.equal(old, new))
    layer.unmerge()
    assert layer.weight.dtype == torch.uint8
    assert layer.base_layer.quant_state.absmax.dtype == (torch.uint8 if nested else torch.float32)


@pytest.mark.parametrize("build", [LoraLinear, QLoraLinear])
def test_moves_take_everything_along(build: Any) -> None:
    layer = build(K, N, r=R)
    layer.merge()
    layer.to("meta")
    layer.unmerge()
    assert all(p.is_meta for p in layer.parameters())
    if build is QLoraLinear:
        assert all(t is None or t.is_meta for t in layer.base_layer.quant_state.tensors())


def test_from_linear4bit_shares_memory() -> None:
    for storage in (torch.uint8, torch.bfloat16):
        base = linear4bit(nn.Linear(K, N), storage=storage)
        layer = QLoraLinear.from_linear4bit(base)
        assert layer.weight.data_ptr() == base.weight.data_ptr()
        assert layer.weight.dtype == torch.uint8 and layer.weight.shape == (N * K // 2, 1)
        assert (layer.in_features, layer.out_features) == (K, N)
    fsdp = nn.Module()  # FSDP's view: a plain parameter, the state on the module alone
    fsdp.weight = nn.Parameter(base.weight.data, requires_grad=False)
    fsdp.bias, fsdp.quant_state, fsdp.compute_dtype = base.bias, base.weight.quant_state, None
    x = torch.randn(2, K)
    assert torch.equal(QLoraLinear.from_linear4bit(fsdp)(x), layer(x))


@pytest.mark.parametrize("quant_type", ["nf4", "mxfp4"])
def test_a_key_of_another_format_is_unexpected(quant_type: str) -> None:
    layer = QLoraLinear(64, 32, r=2, quant_type=quant_type)
    foreign = {"base_layer.weight_scale_inv": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_scale_inv"):
        layer.load_state_dict({**layer.state_dict(), **foreign})
