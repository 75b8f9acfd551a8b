"""bitsandbytes' layers: their parts, keeping and restoring their layout, train-eval-train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import (
    _convert_weight_packed_for_cpu,
    dequantize_4bit,
    has_avx512bf16,
)
from peft import prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastlora
from fastlora.integrations import bitsandbytes as bnb
from fastlora.integrations import peft as integration
from tests.integrations.models import (
    MLP,
    VOCAB,
    MLP4bit,
    assert_all_close,
    assert_network_close,
    exact,
    gradients,
    last_reasons,
    linear4bit,
    llama,
    lora_layers,
    peft_model,
    replaying,
    train_step,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def repack(linear: bitsandbytes.nn.Linear4bit) -> None:
    """What `Linear4bit.forward` does in eval mode on a CPU with AVX512-BF16."""
    linear.weight.data, linear.weight.quant_state = _convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )


def contents(linear: bitsandbytes.nn.Linear4bit) -> dict[str, Tensor]:
    """Every byte of a 4-bit layer."""
    state = linear.weight.quant_state
    tensors = {"weight": linear.weight.data, "absmax": state.absmax, "code": state.code}
    if state.nested:
        tensors |= {"absmax2": state.state2.absmax, "code2": state.state2.code}
        tensors["offset"] = state.offset
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        # As bytes: a 4-bit weight stored as bf16 holds NaNs.
        left_bytes, right_bytes = (
            t.contiguous().view(-1).view(torch.uint8) for t in (tensor, other)
        )
        assert torch.equal(left_bytes, right_bytes), name


# ---- what a layer is and has -------------------------------------------------------------------


def test_exact_types() -> None:
    class Derived(bitsandbytes.nn.Linear4bit):
        pass

    for kind in ("Linear4bit", "LinearNF4", "LinearFP4"):
        layer = getattr(bitsandbytes.nn, kind)(8, 8)
        assert bnb.is_linear4bit(layer) and bnb.is_params4bit(layer.weight)
    assert not bnb.is_linear4bit(Derived(8, 8))
    assert not bnb.is_linear4bit(bitsandbytes.nn.Linear8bitLt(8, 8))
    assert not bnb.is_linear4bit(nn.Linear(8, 8))
    assert not bnb.is_params4bit(nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize("storage", [torch.uint8, BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_parts_decode_to_the_weight(
    quant_type: str, nested: bool, storage: torch.dtype, backend: str
) -> None:
    linear = linear4bit(72, 40, quant_type=quant_type, nested=nested, storage=storage)
    weight, _ = bnb.packed(linear)
    assert weight is linear.weight
    decoded = bnb.dense_weight(linear, FP32)
    assert torch.equal(decoded, dequantize_4bit(linear.weight.data, linear.weight.quant_state))


def test_the_state_of_the_module_serves_a_plain_parameter() -> None:
    """FSDP replaces the weight by a parameter that has lost its quant_state."""
    linear = linear4bit(72, 40, storage=BF16)
    state = linear.quant_state
    assert bnb.raw_quant_state(linear) is linear.weight.quant_state
    linear._parameters["weight"] = nn.Parameter(linear.weight.data, requires_grad=False)
    assert bnb.raw_quant_state(linear) is state
    weight, quant_state = bnb.packed(linear)
    assert type(weight) is nn.Parameter and quant_state.shape == (40, 72)


def test_the_state_of_the_weight_comes_first() -> None:
    linear = linear4bit(72, 40)
    linear.quant_state = copy.deepcopy(linear.quant_state)
    assert bnb.raw_quant_state(linear) is linear.weight.quant_state


def test_parts_of_an_unquantised_layer() -> None:
    with pytest.raises(ValueError, match=r"linear: expected a quantised Linear4bit.*move it"):
        bnb.packed(bitsandbytes.nn.Linear4bit(8, 8))


@pytest.mark.parametrize("given", [None, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16], ids=str)
def test_compute_dtype_is_settled_by_the_first_call(
    given: torch.dtype | None, x_dtype: torch.dtype
) -> None:
    """A layer without compute_dtype takes that of its first input for good, unless it is fp16."""
    theirs, ours = linear4bit(72, 40, compute_dtype=given), linear4bit(72, 40, compute_dtype=given)
    x = torch.randn(2, 72)
    for dtype in (x_dtype, FP32 if x_dtype == BF16 else BF16):
        predicted = bnb.compute_dtype(ours, dtype)
        before = (ours.compute_dtype, ours.compute_type_is_set)
        assert before == (theirs.compute_dtype, theirs.compute_type_is_set)
        theirs(x.to(dtype))
        bnb.settle_compute_dtype(ours, x.to(dtype))
        assert (ours.compute_dtype, ours.compute_type_is_set) == (theirs.compute_dtype, True)
        assert predicted == (theirs.compute_dtype or dtype)


def test_fast_layers_settle_compute_dtype_as_bitsandbytes_does() -> None:
    stock = peft_model(MLP4bit(compute_dtype=None)).train()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    x = torch.randn(3, 64).to(BF16)
    for model in (fast, stock):
        assert not model.base_model.model.up.base_layer.compute_type_is_set
        model(x)
    for name in ("up", "down"):
        ours, theirs = (getattr(m.base_model.model, name).base_layer for m in (fast, stock))
        assert (ours.compute_dtype, ours.compute_type_is_set) == (BF16, True)
        assert (theirs.compute_dtype, theirs.compute_type_is_set) == (BF16, True)
    # The second call comes in fp32 and is computed in bf16.
    results = [train_step(m, x.float()) for m in (fast, exact(stock), replaying(stock))]
    assert last_reasons(fast) == {""}
    assert_network_close(*results)


# ---- repacking ---------------------------------------------------------------------------------


def test_disable_and_restore_repacking() -> None:
    model = nn.Sequential(linear4bit(64, 32), nn.Linear(32, 32), linear4bit(32, 32))
    model[0].support_avx512bf16_for_cpu = True
    keys = set(model[0].__dict__)
    assert bnb.disable_cpu_repacking(model) == 1
    assert bnb.disable_cpu_repacking(model) == 0
    assert not model[0].support_avx512bf16_for_cpu
    assert bnb.restore_cpu_repacking(model) == 1
    assert bnb.restore_cpu_repacking(model) == 0
    assert model[0].support_avx512bf16_for_cpu and not model[2].support_avx512bf16_for_cpu
    assert set(model[0].__dict__) == keys


@pytest.mark.parametrize("way", ["accelerate", "register", "patch_peft", "constructor"])
def test_every_way_in_switches_repacking_off(way: str) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.bnb import Linear4bit

    model = MLP4bit()
    for layer in (model.up, model.down):
        layer.support_avx512bf16_for_cpu = True
    config = LoraConfig(target_modules=["up", "down"])
    if way == "register":
        model = get_peft_model(model, fastlora.register(config))
    elif way == "patch_peft":
        fastlora.patch_peft()
        model = get_peft_model(model, config)
        fastlora.unpatch_peft()
    elif way == "constructor":
        stock = get_peft_model(copy.deepcopy(model), config)
        assert {type(m) for m in lora_layers(stock)} == {Linear4bit}
        config._register_custom_module(
            {bitsandbytes.nn.Linear4bit: integration.FastLoraLinear4bit}  # type: ignore[dict-item]
        )
        model = get_peft_model(model, config)
    else:
        model = fastlora.accelerate(get_peft_model(model, config), verbose=False)
    assert {type(layer) for layer in lora_layers(model)} == {integration.FastLoraLinear4bit}
    assert not any(layer.base_layer.support_avx512bf16_for_cpu for layer in lora_layers(model))
    if way != "constructor":
        fastlora.restore(model)
        assert all(layer.base_layer.support_avx512bf16_for_cpu for layer in lora_layers(model))


@pytest.mark.parametrize("storage", [torch.uint8, BF16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_unpack_is_exact_for_weights_quantised_from_bf16(
    quant_type: str, storage: torch.dtype
) -> None:
    linear = linear4bit(128, 96, quant_type=quant_type, storage=storage, dtype=BF16)
    before, fields = contents(linear), set(linear.weight.quant_state.__dict__)
    assert not bnb.is_repacked(linear) and not bnb.unpack(linear)
    repack(linear)
    assert not torch.equal(
        linear.weight.data.view(torch.uint8).flatten(), before["weight"].view(torch.uint8).flatten()
    )
    assert bnb.is_repacked(linear)
    with pytest.raises(ValueError, match="repacked in place"):
        bnb.packed(linear)
    assert bnb.unpack(linear)
    assert_same(contents(linear), before)
    assert linear.weight.shape == before["weight"].shape
    assert linear.weight.quant_state.dtype == BF16
    assert set(linear.weight.quant_state.__dict__) == fields | {"packing_format_for_cpu"}
    assert not bnb.is_repacked(linear) and not bnb.unpack(linear)
    repack(linear)
    assert bnb.unpack(linear)
    assert_same(contents(linear), before)


def test_unpack_after_state_dict() -> None:
    """bitsandbytes turns the nibbles back in state_dict(), and leaves absmax transposed in bf16."""
    linear = linear4bit(128, 96, dtype=BF16)
    before = contents(linear)
    repack(linear)
    linear.state_dict()
    assert not linear.weight.quant_state.packing_format_for_cpu
    assert linear.weight.quant_state.absmax.dim() == 2
    assert bnb.is_repacked(linear)
    assert bnb.unpack(linear)
    assert_same(contents(linear), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nested": True, "dtype": BF16}, "its nested absmax is lost. Load the model again"),
        ({"dtype": FP32}, "rounded to bf16 the absmax of a weight quantised from torch.float32"),
        ({"dtype": FP16}, "rounded to bf16 the absmax of a weight quantised from torch.float16"),
    ],
    ids=["nested", "fp32", "fp16"],
)
def test_unpack_refuses_what_was_lost(options: dict[str, object], message: str) -> None:
    linear = linear4bit(128, 96, **options)  # type: ignore[arg-type]
    repack(linear)
    data = linear.weight.data.clone()
    with pytest.raises(ValueError, match=message):
        bnb.unpack(linear)
    assert torch.equal(linear.weight.data, data) and bnb.is_repacked(linear)
    # And it was lost: bitsandbytes' own way back does not give the same absmax.
    absmax = linear.weight.quant_state.absmax.T.reshape(-1).float()
    assert not torch.equal(absmax, linear4bit_absmax(options))


def linear4bit_absmax(options: dict[str, object]) -> Tensor:
    torch.manual_seed(0)
    from fastlora.quant import as_quant_state
    from fastlora.reference import dequantize_absmax

    return dequantize_absmax(as_quant_state(linear4bit(128, 96, **options).quant_state))  # type: ignore[arg-type]


def test_accelerate_unpacks_where_it_can() -> None:
    model = peft_model(MLP4bit(dtype=BF16))
    before = [contents(layer.base_layer) for layer in lora_layers(model)]
    for layer in lora_layers(model):
        repack(layer.base_layer)
    fastlora.accelerate(model, verbose=False)
    for layer, was in zip(lora_layers(model), before, strict=True):
        assert_same(contents(layer.base_layer), was)


def test_accelerate_refuses_before_it_changes_anything() -> None:
    model = peft_model(MLP4bit(dtype=BF16))
    up, down = lora_layers(model)
    repack(up.base_layer)
    down.base_layer = linear4bit(128, 32, nested=True)
    repack(down.base_layer)
    down.base_layer.support_avx512bf16_for_cpu = True
    with pytest.raises(ValueError, match=r"layer base_model.model.down.base_layer: .* is lost"):
        fastlora.accelerate(model, verbose=False)
    assert bnb.is_repacked(up.base_layer)
    assert down.base_layer.support_avx512bf16_for_cpu
    assert not any(isinstance(layer, integration.FastLoraLinear4bit) for layer in (up, down))


# ---- train, evaluate, train on -----------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute_dtype", [FP32, BF16], ids=str)
def test_training_after_an_evaluation(compute_dtype: torch.dtype, nested: bool) -> None:
    """Gradients and weights do not change because the model was evaluated in between."""
    model = MLP4bit(compute_dtype=compute_dtype, nested=nested)
    for layer in (model.up, model.down):
        layer.support_avx512bf16_for_cpu = True
    fast = fastlora.accelerate(peft_model(model, lora_dropout=0.1), verbose=False)
    x = torch.randn(4, 64)
    before = [contents(layer.base_layer) for layer in lora_layers(fast)]
    first = train_step(fast.train(), x)
    with torch.no_grad():
        fast.eval()(x)
        with fast.disable_adapter():
            fast(x)
    again = train_step(fast.train(), x)
    assert_same({k: v.clone() for k, v in again.items()}, first)
    for layer, was in zip(lora_layers(fast), before, strict=True):
        assert_same(contents(layer.base_layer), was)
    assert first["dx"].any()


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 CPUs only")
def test_bitsandbytes_still_repacks() -> None:
    """What the precaution is for: without it an evaluation cuts the gradient of the frozen weight.

    When this fails, bitsandbytes has mended it.
    """
    linear = linear4bit(64, 32, bias=False)
    linear.support_avx512bf16_for_cpu = True
    x = torch.randn(2, 64, requires_grad=True)
    assert linear(x).requires_grad
    with torch.no_grad():
        linear.eval()(x.detach())
    assert bnb.is_repacked(linear)
    linear.train()(x).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora_as_transformers_sets_it_up(checkpointing: bool, tmp_path: Path) -> None:
    """`prepare_model_for_kbit_training`: a residual stream in fp32, base products in bf16."""
    llama().to(BF16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=BF16,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    stock = peft_model(model, lora_dropout=0.2).train()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    assert {type(layer) for layer in lora_layers(fast)} == {integration.FastLoraLinear4bit}
    ids = torch.randint(0, VOCAB, (2, 9))
    results = [train_step(m, ids) for m in (fast, exact(stock), replaying(stock))]
    assert last_reasons(fast) == {""}
    assert_network_close(*results)


# ---- merging -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:Merge lora module to 4-bit", "ignore:Unmerge lora module to 4-bit"
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(safe_merge=True),
        lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    ],
    ids=["merge", "safe_merge", "unmerge"],
)
def test_merge_4bit(merge: Callable[[nn.Module], object], nested: bool) -> None:
    """Merging requantises the weight, in PEFT's code; the fast layer goes on with the result."""
    stock = peft_model(MLP4bit(nested=nested)).eval()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    x = torch.randn(4, 64)
    with torch.no_grad():
        fast(x)
        for model in (fast, stock):
            merge(model)
        for ours, theirs in zip(lora_layers(fast), lora_layers(stock), strict=True):
            assert_same(contents(ours.base_layer), contents(theirs.base_layer))
        reference = exact(stock)
        results = [{"y": y} for y in (fast(x), reference(x.double()), stock(x))]
    assert last_reasons(fast) == {""}
    assert_all_close(*results)
    unloaded = [model.merge_and_unload() for model in (fast, stock)]
    with torch.no_grad():
        assert torch.equal(unloaded[0](x), unloaded[1](x))
    assert type(unloaded[0].up) is bitsandbytes.nn.Linear4bit


def test_a_4bit_base_under_peft_s_dense_layer() -> None:
    """Without `is_loaded_in_4bit`, PEFT puts its dense layer around Linear4bit: fast too."""
    model = MLP4bit()
    model.is_loaded_in_4bit = False
    stock = peft_model(model).train()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    assert {type(layer) for layer in lora_layers(fast)} == {integration.FastLoraLinear}
    x = torch.randn(4, 64)
    results = [train_step(m, x) for m in (fast, exact(stock), replaying(stock))]
    assert last_reasons(fast) == {""}
    assert_network_close(*results)


def test_a_plain_parameter_trains() -> None:
    """As under FSDP2: bf16 storage, and only the module knows its quant_state."""
    stock = peft_model(MLP4bit(storage=BF16, nested=True)).train()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    for layer in lora_layers(fast):
        base = layer.base_layer
        base.quant_state = base.weight.quant_state
        base._parameters["weight"] = nn.Parameter(base.weight.data, requires_grad=False)
    x = torch.randn(4, 64)
    results = [train_step(m, x) for m in (fast, exact(stock), replaying(stock))]
    assert last_reasons(fast) == {""}
    assert all(type(layer.base_layer.weight) is nn.Parameter for layer in lora_layers(fast))
    assert_network_close(*results)


def test_nothing_is_imported_for_a_dense_model() -> None:
    """The helpers tell bitsandbytes' classes by name."""
    model = MLP()
    assert bnb.disable_cpu_repacking(model) == 0
    assert list(bnb.linear4bit_modules(model)) == []
    assert gradients(model) == {}


@pytest.mark.parametrize("K", [48, 80, 144])
def test_bitsandbytes_decodes_with_scales_of_other_blocks(K: int) -> None:
    """Its CPU kernel, where K is a multiple of 16 and not of the blocksize; fastlora's does not."""
    from bitsandbytes import functional

    # Rows of different sizes tell whose scale a block was decoded with.
    weight = torch.randn(32, K) * torch.rand(32, 1)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    mine = fastlora.dequantize_4bit(packed, state, torch.float32)
    assert (mine - weight).norm() < 0.1 * weight.norm()
    theirs = functional.dequantize_4bit(packed, state)
    if torch.equal(theirs, mine):
        pytest.skip("this bitsandbytes decodes it right on this processor")
    assert (theirs - weight).norm() > 0.2 * weight.norm()
