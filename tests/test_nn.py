"""LoraLinear and QLoraLinear against PEFT's own layers."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_exact
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora import LoraLinear, QLoraLinear, lora_linear, reference
from fastlora.layer import Layer, Needs
from fastlora.nn import Linear4bit, MergeError
from fastlora.quant import packed_bytes

peft = pytest.importorskip("peft", reason="PEFT, the measure of these layers, is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

N, K, R = 72, 128, 8  # bitsandbytes' AVX-512 decoder needs K to be a multiple of the blocksize

# dtype of the base and x, dtype of the adapters
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float32, id="fp16-fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
]
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


class Net(nn.Module):
    """The smallest model that PEFT wraps: one linear layer."""

    def __init__(self, lin: nn.Module) -> None:
        super().__init__()
        self.lin = lin


def peft_layer(
    base: nn.Module, adapter_dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """PEFT's own layer around `base`, as get_peft_model builds it."""
    config = peft.LoraConfig(target_modules=["lin"], **options)
    net = Net(base)
    net.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)
    model = peft.get_peft_model(net, config)
    layer = model.base_model.model.lin
    for adapters in (layer.lora_A, layer.lora_B):
        adapters.to(adapter_dtype)
    return layer


def linear4bit(
    dense: nn.Linear,
    nested: bool = False,
    quant_type: str = "nf4",
    storage: torch.dtype = torch.uint8,
) -> Any:
    """bitsandbytes' layer with the weight of `dense`, its in-place repacking switched off."""
    layer = bnb.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    weight = dense.weight.detach().clone()
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    if dense.bias is not None:
        layer.bias = nn.Parameter(dense.bias.detach().clone())
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def fill_B(layer: Any) -> None:
    """PEFT starts with B = 0, where the LoRA term and dA vanish and nothing would be tested."""
    B = layer.lora_B["default"].weight
    with torch.no_grad():
        B.copy_(torch.randn(B.shape) / math.sqrt(B.shape[1]))


def copy_adapters(source: Any, target: Any) -> None:
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(target, name)["default"].weight.copy_(getattr(source, name)["default"].weight)


class Replay(nn.Module):
    """Dropout for PEFT's layer with the mask that ours draws."""

    def __init__(self, p: float, seed: Tensor) -> None:
        super().__init__()
        self.p, self.dropout_seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        mask = reference.dropout_mask(
            x.numel() // x.shape[-1], x.shape[-1], self.p, self.dropout_seed
        )
        return x * mask.view(x.shape) * reference.dropout_threshold(self.p)[1]


def run(
    forward: Callable[[Tensor], Tensor], layer: Any, x: Tensor, dy: Tensor
) -> dict[str, Tensor | None]:
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    y.backward(dy)
    bias = layer.base_layer.bias
    result = {
        "y": y.detach(),
        "dx": x.grad,
        "dA": layer.lora_A["default"].weight.grad,
        "dB": layer.lora_B["default"].weight.grad,
        "dbias": None if bias is None else bias.grad,
    }
    layer.zero_grad()
    return result


def exact_results(
    layer: Any, weight: Tensor, x: Tensor, dy: Tensor, p: float = 0.0, seed: Tensor | None = None
) -> dict[str, Tensor | None]:
    """Results in float64 for the same rounded inputs, `weight` dense."""
    A = layer.lora_A["default"].weight.detach().double()
    B = layer.lora_B["default"].weight.detach().double()
    bias = layer.base_layer.bias
    x2, dy2 = x.double().reshape(-1, x.shape[-1]), dy.double().reshape(-1, dy.shape[-1])
    bias64 = None if bias is None else bias.detach().double()
    wide = Layer(weight.double(), A, B, layer.scaling, bias64, dropout_p=p, seed=seed)
    y, S = reference.lora_linear_fwd(x2, wide)
    needs = Needs(bias=bias is not None and bias.requires_grad)
    dx, dA, dB, dbias = reference.lora_linear_bwd(dy2, x2, wide, S, needs)
    assert dx is not None
    return {
        "y": y.view(dy.shape),
        "dx": dx.view(x.shape),
        "dA": dA,
        "dB": dB,
        "dbias": dbias,
    }


def assert_results(
    ours: dict[str, Tensor | None],
    exact: dict[str, Tensor | None],
    theirs: dict[str, Tensor | None],
) -> None:
    for name, value in ours.items():
        base, true = theirs[name], exact[name]
        if true is None:
            assert value is None and base is None, name
            continue
        assert value is not None and base is not None, name
        assert value.dtype == base.dtype and value.shape == base.shape, name
        assert value.abs().max() > 0, name
        assert_close_to_exact(value, true, base, what=name)


def saved_and_loaded(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# ---- forward and gradients ---------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("bias", ["absent", "none", "lora_only"])
@pytest.mark.parametrize("shape", [(K,), (17, K), (2, 7, K)], ids=str)
def test_dense_matches_peft(
    dtype: torch.dtype, adapter_dtype: torch.dtype, bias: str, shape: tuple[int, ...]
) -> None:
    train_bias = "none" if bias == "absent" else bias
    dense = nn.Linear(K, N, bias=bias != "absent", dtype=dtype)
    options = {"r": R, "lora_alpha": 24, "use_rslora": True}
    ours = LoraLinear.from_linear(
        copy.deepcopy(dense), adapter_dtype=adapter_dtype, train_bias=train_bias, **options
    )
    fill_B(ours)
    theirs = peft_layer(dense, adapter_dtype, bias=train_bias, **options)
    copy_adapters(ours, theirs)
    assert ours.scaling == theirs.scaling["default"] == 24 / math.sqrt(R)
    x, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], N).to(dtype)
    got = run(ours, ours, x, dy)
    expected = run(theirs, theirs, x, dy)
    assert_results(got, exact_results(ours, dense.weight.detach(), x, dy), expected)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@NESTED
def test_4bit_matches_peft(
    dtype: torch.dtype, adapter_dtype: torch.dtype, quant_type: str, nested: bool
) -> None:
    dense = nn.Linear(K, N, dtype=dtype)
    theirs = peft_layer(linear4bit(dense, nested, quant_type), adapter_dtype, r=R, bias="all")
    assert type(theirs).__module__ == "peft.tuners.lora.bnb"
    fill_B(theirs)
    ours = QLoraLinear.from_linear4bit(
        theirs.base_layer, r=R, adapter_dtype=adapter_dtype, train_bias="all"
    )
    copy_adapters(theirs, ours)
    x, dy = torch.randn(19, K).to(dtype), torch.randn(19, N).to(dtype)
    expected = run(theirs, theirs, x, dy)
    ours.base_layer.compute_dtype = None
    got = run(ours, ours, x, dy)
    weight = reference.dequantize_4bit(ours.weight, ours.base_layer.quant_state, dtype)
    assert_results(got, exact_results(ours, weight, x, dy), expected)


def test_4bit_compute_dtype_matches_peft() -> None:
    dense = nn.Linear(K, N, dtype=torch.bfloat16)
    base = linear4bit(dense)
    base.compute_dtype, base.compute_type_is_set = torch.bfloat16, True
    theirs = peft_layer(base, r=R)
    fill_B(theirs)
    ours = QLoraLinear.from_linear4bit(base, r=R)
    copy_adapters(theirs, ours)
    assert ours.base_layer.compute_dtype == torch.bfloat16
    x, dy = torch.randn(19, K), torch.randn(19, N)
    expected = run(theirs, theirs, x, dy)
    got = run(ours, ours, x, dy)
    weight = reference.dequantize_4bit(ours.weight, ours.base_layer.quant_state, torch.bfloat16)
    assert_results(got, exact_results(ours, weight, x, dy), expected)
    ours.base_layer.compute_dtype = None
    wide = run(ours, ours, x, dy)
    assert not torch.equal(got["y"], wide["y"])  # type: ignore[arg-type]
    assert not torch.equal(got["dx"], wide["dx"])  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4bit"])
def test_dropout_matches_peft_with_the_same_mask(
    dtype: torch.dtype, adapter_dtype: torch.dtype, quantised: bool
) -> None:
    p = 0.25
    dense = nn.Linear(K, N, dtype=dtype)
    options = {"r": R, "lora_dropout": p}
    base = linear4bit(dense) if quantised else dense
    theirs = peft_layer(copy.deepcopy(base), adapter_dtype, **options)
    fill_B(theirs)
    build = QLoraLinear.from_linear4bit if quantised else LoraLinear.from_linear
    ours = build(base, adapter_dtype=adapter_dtype, **options)
    copy_adapters(theirs, ours)
    x, dy = torch.randn(3, 11, K).to(dtype), torch.randn(3, 11, N).to(dtype)
    torch.manual_seed(5)
    got = run(ours, ours, x, dy)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    theirs.lora_dropout["default"] = Replay(p, seed)
    expected = run(theirs, theirs, x, dy)
    weight = dense.weight.detach()
    if quantised:
        weight = reference.dequantize_4bit(ours.weight, ours.base_layer.quant_state, dtype)
    exact = exact_results(ours, weight, x, dy, p, seed)
    assert_results(got, exact, expected)
    without = exact_results(ours, weight, x, dy)
    for name in ("y", "dx", "dA", "dB"):
        assert not torch.allclose(exact[name], without[name], rtol=0.1), name  # type: ignore[arg-type]


def test_eval_and_p_zero_switch_dropout_off() -> None:
    layer = LoraLinear(K, N, r=R, lora_dropout=0.5)
    fill_B(layer)
    x = torch.randn(5, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_base_is_frozen_and_gradients_follow_requires_grad() -> None:
    layer = LoraLinear(K, N, r=R)
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert names == {"lora_A.default.weight", "lora_B.default.weight"}
    fill_B(layer)
    layer.lora_A["default"].weight.requires_grad_(False)
    layer(torch.randn(5, K)).sum().backward()
    assert layer.lora_A["default"].weight.grad is None
    assert layer.lora_B["default"].weight.grad is not None
    trained = LoraLinear(K, N, r=R, train_bias="all")
    assert trained.bias is not None and trained.bias.requires_grad
    with torch.no_grad():
        assert not layer(torch.randn(5, K)).requires_grad


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_dropout_mask(quantised: bool, reentrant: bool) -> None:
    build = QLoraLinear if quantised else LoraLinear
    layer = build(K, N, r=R, lora_dropout=0.3)
    fill_B(layer)
    x, dy = torch.randn(23, K), torch.randn(23, N)
    torch.manual_seed(1)
    plain = run(layer, layer, x, dy)
    torch.manual_seed(1)
    again = run(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x, dy)
    torch.manual_seed(2)
    other = run(layer, layer, x, dy)
    for name in ("y", "dx", "dA", "dB"):
        assert torch.equal(plain[name], again[name]), name  # type: ignore[arg-type]
        assert not torch.equal(plain[name], other[name]), name  # type: ignore[arg-type]


def test_autocast_matches_peft() -> None:
    dense = nn.Linear(K, N)
    ours = LoraLinear.from_linear(copy.deepcopy(dense), r=R)
    fill_B(ours)
    theirs = peft_layer(dense, r=R)
    copy_adapters(ours, theirs)
    x, dy = torch.randn(17, K), torch.randn(17, N, dtype=torch.bfloat16)

    def under_autocast(layer: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x)

        return forward

    got = run(under_autocast(ours), ours, x, dy)
    expected = run(under_autocast(theirs), theirs, x, dy)
    assert got["y"].dtype == torch.bfloat16  # type: ignore[union-attr]
    assert got["dA"].dtype == torch.float32  # type: ignore[union-attr]
    assert_results(got, exact_results(ours, dense.weight.detach(), x, dy), expected)


# ---- training ----------------------------------------------------------------------------------


def train(layers: list[nn.Module], dtype: torch.dtype, steps: int = 20) -> Tensor:
    """Losses of a two-layer regression, SGD with momentum, the same data whoever the layers are."""
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    x = torch.randn(64, K, generator=generator).to(dtype)
    target = torch.randn(64, K, generator=generator).to(dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x).to(target.dtype), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4bit"])
def test_twenty_steps_of_training_follow_peft(quantised: bool) -> None:
    bases: list[Any] = [nn.Linear(K, N), nn.Linear(N, K)]
    if quantised:
        bases = [nn.Linear(K, 2 * K), nn.Linear(2 * K, K)]
    options = {"r": R, "lora_alpha": 16}
    theirs, ours, exact = [], [], []
    for dense in bases:
        base = linear4bit(dense) if quantised else dense
        layer = peft_layer(copy.deepcopy(base), **options)
        fill_B(layer)
        build = QLoraLinear.from_linear4bit if quantised else LoraLinear.from_linear
        own = build(base, **options)
        copy_adapters(layer, own)
        wide = nn.Linear(dense.in_features, dense.out_features).double()
        weight = dense.weight
        if quantised:
            weight = reference.dequantize_4bit(own.weight, own.base_layer.quant_state)
        wide.load_state_dict({"weight": weight.detach().double(), "bias": dense.bias.double()})
        true = peft_layer(wide, torch.float64, **options)
        copy_adapters(layer, true)
        theirs.append(layer)
        ours.append(own)
        exact.append(true)
    true_losses = train(exact, torch.float64)
    assert true_losses[-1] < 0.9 * true_losses[0]
    assert_close_to_exact(
        train(ours, torch.float32), true_losses, train(theirs, torch.float32), what="loss"
    )


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


# ---- merging -----------------------------------------------------------------------------------


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


# ---- arguments ---------------------------------------------------------------------------------


def test_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="r must be 1 or more, got 0"):
        LoraLinear(K, N, r=0)
    with pytest.raises(ValueError, match=r"lora_dropout must be between 0 and 1, got 1\.5"):
        LoraLinear(K, N, lora_dropout=1.5)
    with pytest.raises(ValueError, match="train_bias must be one of"):
        LoraLinear(K, N, train_bias="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a bias"):
        LoraLinear(K, N, bias=False, train_bias="all")
    with pytest.raises(ValueError, match="init_lora_weights must be True, False or 'gaussian'"):
        LoraLinear(K, N, init_lora_weights="pissa")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rank"):
        QLoraLinear(K, N, rank=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got Conv1d"):
        LoraLinear.from_linear(nn.Conv1d(3, 3, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Linear4bit; use QLoraLinear\.from_linear4bit"):
        LoraLinear.from_linear(linear4bit(nn.Linear(K, N)))
    with pytest.raises(ValueError, match="without quant_state"):
        QLoraLinear.from_linear4bit(bnb.nn.Linear4bit(K, N))
    packed, state = reference.quantize_4bit(torch.randn(64))
    with pytest.raises(ValueError, match=r"quant_state.shape must be \(N, K\), got \(64,\)"):
        Linear4bit(packed, state)


def test_repr_says_what_there_is() -> None:
    text = repr(QLoraLinear(K, N, r=4, lora_alpha=8, lora_dropout=0.1, train_bias="all"))
    for part in ("r=4", "scaling=2", "lora_dropout=0.1", "train_bias=True", "quant_type=nf4"):
        assert part in text
    layer = LoraLinear(K, N)
    layer.merge()
    assert "merged=True" in repr(layer)
