"""LoRA on parameters (`target_parameters`): experts, routers, plain weights, against PEFT's code.

The models are those of Transformers, tiny and with random weights, in its three ways of calling
experts; then models that use the weight in ways that fastlora does not know.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import fastlora
from fastlora.integrations.peft import fast_path
from fastlora.integrations.peft.layers import FastParamWrapper
from fastlora.integrations.peft.plan.parameter import param_parts
from fastlora.integrations.peft.run.adapted_weight import AdaptedWeight, adapted_weight
from tests.integrations.conftest import BACKENDS
from tests.integrations.models import (
    VOCAB,
    assert_all_close,
    assert_network_close,
    exact,
    fill_adapters,
    last_reasons,
    lora_layers,
    train_step,
)
from tests.tolerance import assert_close_to_exact

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_small(), num_local_experts=5, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_small(), **sizes))


def gpt_oss() -> nn.Module:
    sizes = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**_small(), **sizes, rope_parameters=ROPE))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {"Mixtral": mixtral, "Qwen3-MoE": qwen3_moe, "gpt-oss": gpt_oss}
ROUTERS = {"Mixtral": "gate.weight", "Qwen3-MoE": "gate.weight", "gpt-oss": "router.weight"}


def _small() -> dict[str, int]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }


def moe(name: str, implementation: str = "grouped_mm", **options: Any) -> nn.Module:
    """A PEFT model with LoRA on all experts and routers, nothing zero."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": [],
        "target_parameters": [*EXPERTS, ROUTERS[name]],
        **options,
    }
    return fill_adapters(get_peft_model(model, LoraConfig(**settings)))


def double(model: nn.Module) -> nn.Module:
    """The model in float64, which torch's grouped_mm does not take."""
    model = exact(model)
    base = model.get_base_model()
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")
    return model


def trio(stock: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    assert all(type(layer) is FastParamWrapper for layer in lora_layers(fast))
    return fast, double(stock), stock


def compare(stock: nn.Module, step: Callable[[nn.Module], Any], reasons: set[str]) -> nn.Module:
    models = trio(stock)
    assert_network_close(*(step(model) for model in models))
    assert last_reasons(models[0]) == reasons
    return models[0]


def train(model: nn.Module) -> dict[str, Tensor]:
    return train_step(model.train(), IDS)


def evaluate(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model.eval()(input_ids=IDS).logits}


# ---- Transformers' models ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_training_and_evaluation(name: str, implementation: str, backend: str) -> None:
    stock = moe(name, implementation)
    fast = compare(stock, train, {""})
    compare(stock, evaluate, {""})
    assert len(lora_layers(fast)) == 6
    rows = fastlora.explain(fast).rows
    assert {row.reason or row.last_call for row in rows} == {""}
    assert {row.base for row in rows} == {"fp32", "fp32 x 5 experts"}
    assert {row.kernel.split(" ")[0] for row in rows} == {"lora_linear", "grouped_lora_linear"}
    assert all(row.fast and row.r == 3 for row in rows)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_experts_with_fp32_adapters(name: str) -> None:
    """As PEFT makes them of a model loaded in bf16; PEFT rounds W + BA, fastlora does not."""
    torch.manual_seed(0)
    stock = moe(name)
    for layer in lora_layers(stock):
        layer.get_base_layer().to(torch.bfloat16)
    stock = stock.to(torch.bfloat16)
    for parameter_name, parameter in stock.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.float()
    fast = compare(stock, train, {""})
    assert {row.adapter for row in fastlora.explain(fast).rows} == {"fp32"}


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name: str) -> None:
    fast, _, _ = trio(moe(name))
    expected = train(fast)
    fast.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    fast.enable_input_require_grads()
    for key, value in train(fast).items():
        torch.testing.assert_close(value, expected[key])
    assert last_reasons(fast) == {""}


@pytest.mark.parametrize("name", MODELS)
def test_merged_unmerged_disabled(name: str) -> None:
    merged = "the adapter is merged into the base weight"

    def merge(model: nn.Module) -> dict[str, Tensor]:
        model.merge_adapter()
        return evaluate(model)

    def unmerge(model: nn.Module) -> dict[str, Tensor]:
        model.merge_adapter()
        model.unmerge_adapter()
        return train(model)

    def disable(model: nn.Module) -> dict[str, Tensor]:
        with model.disable_adapter():
            return evaluate(model)

    compare(moe(name), merge, {merged})
    compare(moe(name), unmerge, {""})
    compare(moe(name), disable, {"the adapters are disabled"})
    fast, _, stock = trio(moe(name))
    plain = fast.merge_and_unload()
    assert not lora_layers(plain)
    want = stock.merge_and_unload().state_dict()
    assert all(torch.equal(value, want[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_two_adapters(name: str) -> None:
    """PEFT adds two deltas to the weight; fastlora stacks them into one of the summed rank."""

    def both(model: nn.Module) -> dict[str, Tensor]:
        targets = [*EXPERTS, ROUTERS[name]]
        config = LoraConfig(r=2, lora_alpha=7, target_modules=[], target_parameters=targets)
        model.add_adapter("other", config)
        generator = torch.Generator().manual_seed(4)
        for key, parameter in model.named_parameters():
            if ".other." in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.base_model.set_adapter(["default", "other"])
        return train(model)

    compare(moe(name), both, {""})


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"bias": "all"}])
def test_options(options: dict[str, Any]) -> None:
    compare(moe("Mixtral", **options), train, {""})


@pytest.mark.parametrize("targets", [["experts.down_proj"], ["gate.weight"]])
def test_some_parameters(targets: list[str]) -> None:
    compare(moe("Qwen3-MoE", target_parameters=targets), train, {""})


def test_next_to_linear_layers() -> None:
    stock = moe("Mixtral", target_modules=["q_proj", "v_proj"])
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    assert_network_close(*(train(model) for model in (fast, double(stock), stock)))
    assert last_reasons(fast) == {""}
    assert fastlora.explain(fast).summary().count("10/10 LoRA layers accelerated") == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_weight_for_each_token(name: str) -> None:
    """Transformers' batched_mm, which it takes for decoding on GPUs."""
    compare(moe(name, "batched_mm"), train, {""})
    compare(moe(name, "batched_mm"), evaluate, {""})


def test_autocast() -> None:
    """Autocast narrows fp32 weights at each call: they are built, and cast as in PEFT's code."""

    def step(model: nn.Module) -> dict[str, Tensor]:
        if next(model.parameters()).dtype == torch.float64:
            return train(model)
        with torch.autocast("cpu", torch.bfloat16):
            return train(model)

    fast, *others = trio(moe("Mixtral", "eager"))
    results = [step(model) for model in (fast, *others)]
    assert_network_close(*results)
    assert all(reason and "was built" in reason for reason in last_reasons(fast))
    narrow = fastlora.accelerate(moe("Mixtral", "eager"), verbose=False)
    for layer in lora_layers(narrow):
        layer.get_base_layer().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        train(narrow)
    assert last_reasons(narrow) == {""}


# ---- ways in and out -----------------------------------------------------------------------------


def test_accelerate_and_restore_leave_everything_in_place(tmp_path: Path) -> None:
    stock = moe("gpt-oss")
    names = [name for name, _ in stock.named_parameters()]
    state = stock.state_dict()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    train(fast)
    assert [name for name, _ in fast.named_parameters()] == names
    assert all(torch.equal(value, state[key]) for key, value in fast.state_dict().items())
    assert repr(fast) == repr(stock)
    assert pickle.loads(pickle.dumps(FastParamWrapper)) is FastParamWrapper
    for layer in lora_layers(fast):
        assert layer.parameter_name not in layer.get_base_layer().__dict__
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(stock.get_base_model().__class__(stock.config), tmp_path)
    loaded = {key: value for key, value in again.state_dict().items() if "lora_" in key}
    assert loaded and all(torch.equal(value, state[key]) for key, value in loaded.items())
    fastlora.restore(fast)
    assert all(type(layer) is ParamWrapper for layer in lora_layers(fast))
    want = train(stock)
    assert all(torch.equal(value, want[key]) for key, value in train(fast).items())


def test_the_parameter_is_back_after_an_error() -> None:
    fast = fastlora.accelerate(moe("Mixtral"), verbose=False)
    layer = next(layer for layer in lora_layers(fast) if layer.num_experts > 1)
    with pytest.raises(TypeError):
        layer(torch.randn(3, 32))  # without the router's choice
    owner = layer.get_base_layer()
    assert type(getattr(owner, layer.parameter_name)) is nn.Parameter


def test_patch_peft() -> None:
    fastlora.patch_peft()
    try:
        model = moe("Mixtral")
    finally:
        fastlora.unpatch_peft()
    assert all(type(layer) is FastParamWrapper for layer in lora_layers(model))


def test_register_serves_linear_weights() -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), fastlora.register(config))
    assert [type(layer) for layer in lora_layers(model)] == [FastParamWrapper]


def test_conditions() -> None:
    model = fastlora.accelerate(moe("Mixtral"), verbose=False)
    layer: Any = next(layer for layer in lora_layers(model) if layer.num_experts > 1)
    owner, name = layer.get_base_layer(), layer.parameter_name

    x = torch.randn(3, 32)

    def reason() -> str:
        found = param_parts(layer)
        assert isinstance(found, str)
        assert fast_path(layer, x) == (False, found)
        return found

    assert fast_path(layer, x) == (True, "")
    weight = owner._parameters[name]
    weight.requires_grad_()
    assert "is being trained" in reason()
    weight.requires_grad_(False)
    owner._parameters[name] = nn.Parameter(weight.double(), requires_grad=False)
    assert (
        reason() == f"the parameter {name} is in torch.float64; fastlora takes fp32, bf16 and fp16"
    )
    owner._parameters[name] = nn.Parameter(weight[:, :5].clone(), requires_grad=False)
    assert reason() == f"lora_A or lora_B does not fit the parameter {name} (sharded?)"
    owner._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
    assert "is on the meta device" in reason()
    owner._parameters[name] = weight
    nn.utils.parametrize.register_parametrization(owner, name, nn.Identity())
    assert reason() == f"{name} is no parameter of its module (parametrised or pruned)"
    nn.utils.parametrize.remove_parametrizations(owner, name)
    owner._parameters[name].requires_grad_(False)
    layer.scaling["default"] = torch.tensor(1.0)
    assert reason() == "scaling is a Tensor, not a number"
    layer.scaling["default"] = 1.0
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        layer(torch.randn(3, 32), adapter_names=["default"] * 3)
    layer.lora_A["default"].double()
    assert reason() == "the lora_A is in torch.float64; fastlora takes fp32, bf16 and fp16"
    layer.lora_A["default"].float()
    layer.set_adapter([])
    assert reason() == "no adapters are active on this layer"


def test_two_wrappers_of_one_parameter() -> None:
    """As PEFT 0.18 nests them for two adapters: both run PEFT's code, which adds both deltas."""
    torch.manual_seed(0)
    first, second = (
        LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"]) for _ in range(2)
    )
    model = get_peft_model(nn.Sequential(Stack(loop, False)), first).base_model.model
    model[0] = ParamWrapper(model[0], "default", parameter_name="weight", config=second, r=2)
    stock = fill_adapters(model)
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    assert_all_close(*(train_step(model, X) for model in (fast, exact(stock), stock)))
    assert last_reasons(fast) == {
        "another wrapper adapts the parameter weight, too",
        "weight is no parameter of its module (parametrised or pruned)",
    }


@pytest.mark.parametrize("trained", EXPERTS)
def test_one_wrapper_on_pefts_code_and_one_not(trained: str) -> None:
    """The nested wrappers of one module do not disturb each other."""
    stock = moe("Mixtral")
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(trained.split(".")[1]))
    fast, *others = trio(stock)
    assert_network_close(*(train(model) for model in (fast, *others)))
    reasons = last_reasons(fast)
    assert "" in reasons and len(reasons) == 2
    assert any(reason and "is being trained" in reason for reason in reasons)


# ---- models that fastlora does not know ----------------------------------------------------------


class Stack(nn.Module):
    """`use(x, weight)` on a stack of three experts, as PEFT lays it out for `transposed` or not."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], transposed: bool) -> None:
        super().__init__()
        self.is_transposed, self.use = transposed, use
        shape = (3, 16, 12) if transposed else (3, 12, 16)
        self.weight = nn.Parameter(torch.randn(shape) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


class Scale(torch.autograd.Function):
    """A custom function with a weight: it knows nothing of tensors that are more than they seem."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.einsum("tk,enk->etn", x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.einsum("etn,enk->tk", dy, weight), torch.einsum("etn,tk->enk", dy, x)


def loop(x: Tensor, w: Tensor) -> Tensor:
    return sum(F.linear(x, w[e]) for e in range(len(w)))  # type: ignore[return-value]


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """torch's grouped_mm; in float64, which it does not take, what it means."""
    if x.dtype != torch.float64:
        return F.grouped_mm(x, w, offs=torch.tensor([2, 2, 8], dtype=torch.int32))
    return torch.cat([x[:2] @ w[0], x[2:] @ w[2]])


ROWS = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1])
SERVED = {
    "linear": loop,
    "matmul with .T": lambda x, w: x @ w[2].T + torch.matmul(x, w[torch.tensor(0)].mT),
    "mm with t()": lambda x, w: torch.mm(x, w[-1].t()) + x.mm(w[1].transpose(0, 1)),
    "iteration": lambda x, w: sum(F.linear(x, one) for one in w),
    "unbind": lambda x, w: F.linear(x, w.unbind()[1]),
    "bmm": lambda x, w: torch.bmm(x.expand(3, *x.shape), w.transpose(1, 2)).sum(0),
    "matmul of stacks": lambda x, w: (x.expand(3, *x.shape).contiguous() @ w.mT).sum(0),
    "grouped_mm": lambda x, w: grouped(x, w.mT),
    "bmm with a weight for each row": lambda x, w: torch.bmm(w[ROWS], x[..., None]).squeeze(-1),
    "matmul with a weight for each row": lambda x, w: (x[:, None] @ w[ROWS].mT).squeeze(1),
    "more dimensions": lambda x, w: F.linear(x[None], w[0])[0],
}
SERVED_TRANSPOSED = {
    "matmul": lambda x, w: x @ w[0] + torch.matmul(x, w[1]),
    "bmm": lambda x, w: torch.bmm(x.expand(3, *x.shape), w).sum(0),
    "linear with .T": lambda x, w: F.linear(x, w[2].T, torch.ones(12, dtype=x.dtype)),
    "grouped_mm": lambda x, w: grouped(x, w),
    "bmm with a weight for each row": lambda x, w: torch.bmm(x[:, None], w[ROWS]).squeeze(1),
    "more dimensions": lambda x, w: (x[None] @ w[0])[0],
}
BUILT = {
    "einsum": lambda x, w: torch.einsum("tk,enk->tn", x, w),
    "slice": lambda x, w: F.linear(x, w[1, :, :]) + F.linear(x, w[:2][0]),
    "arithmetic": lambda x, w: F.linear(x, (w * 2 - 1)[0]),
    "reshape": lambda x, w: F.linear(x, w.flatten(0, 1)),
    "index by a list": lambda x, w: torch.bmm(w[[0, 2]], x.T.expand(2, 16, 8)).sum(0).T,
    "a function of its own": lambda x, w: Scale.apply(x, w).sum(0),
    "a mean": lambda x, w: F.linear(x, torch.stack([w[0], w[1]]).mean(0)),
    "numpy": lambda x, w: x[:, :12] * float(w.detach().numpy().sum()) + 0 * F.linear(x, w[0]),
    "out=": lambda x, w: x[:, :12] * torch.mm(x.detach(), w[0].T.detach(), out=x.new_empty(8, 12)),
}  # fmt: skip


def stack_models(
    use: Callable[[Tensor, Tensor], Tensor], transposed: bool
) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(Stack(use, transposed))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=["0.weight"])
    stock = fill_adapters(get_peft_model(model, config))
    return fastlora.accelerate(copy.deepcopy(stock), verbose=False), exact(stock), stock


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", SERVED)
def test_served_without_building(name: str, backend: str) -> None:
    check_use(SERVED[name], False, {""})


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", SERVED_TRANSPOSED)
def test_served_transposed(name: str, backend: str) -> None:
    check_use(SERVED_TRANSPOSED[name], True, {""})


def check_use(use: Callable[[Tensor, Tensor], Tensor], transposed: bool, reasons: set[str]) -> None:
    fast, wide, stock = stack_models(use, transposed)
    results = [train_step(model, X) for model in (fast, wide, stock)]
    assert_all_close(*results)
    assert last_reasons(fast) == reasons


@pytest.mark.parametrize("name", BUILT)
def test_built_for_all_else(name: str) -> None:
    fast, wide, stock = stack_models(BUILT[name], False)
    if name == "numpy":
        results = [evaluate_stack(model) for model in (fast, wide, stock)]
    else:
        results = [train_step(model, X) for model in (fast, wide, stock)]
    assert_all_close(*results)
    (reason,) = last_reasons(fast)
    assert reason is not None and reason.endswith("on the weight, so that W + BA was built")


def evaluate_stack(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"y": model(X.to(next(model.parameters()).dtype))}


def test_a_linear_layers_weight() -> None:
    """A 2-D parameter, with the layer's bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 10), nn.SiLU(), nn.Linear(10, 7))
    targets = ["0.weight", "2.weight"]
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=targets)
    stock = fill_adapters(get_peft_model(model, config))
    fast, wide, stock = trio(stock)
    assert_all_close(*(train_step(model, X) for model in (fast, wide, stock)))
    assert last_reasons(fast) == {""}
    kernels = {row.kernel.split(" ")[0] for row in fastlora.explain(fast).rows}
    assert kernels == {"lora_linear"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_a_tensor(dtype: torch.dtype) -> None:
    """Shape, dtype, device and gradients are those of `W + scaling * left right`."""
    base = torch.randn(3, 6, 4).to(dtype)
    left, right = torch.randn(3, 6, 2, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    built: list[str] = []
    weight = adapted_weight(base, left, right, 1.5, built)
    assert isinstance(weight, Tensor) and weight.shape == base.shape and weight.dtype == dtype
    assert weight.requires_grad and weight.dim() == 3 and len(weight) == 3
    assert type(weight[1]) is type(weight.mT) is AdaptedWeight and weight[1].mT.shape == (4, 6)
    assert built == []
    want = torch.baddbmm(base, left.to(dtype), right.to(dtype), alpha=1.5)
    value = weight + 0
    assert type(value) is Tensor and built == ["aten.add.Tensor"]
    dW = torch.randn(3, 6, 4).to(dtype)
    grads = torch.autograd.grad(value, (left, right), dW)
    for got, expected in zip(grads, torch.autograd.grad(want, (left, right), dW), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2)
        assert got.dtype == torch.float32
    assert torch.equal(value, want)
    assert weight.data_ptr() == weight.value().data_ptr() != 0 and built[-1] == "data_ptr"


def test_no_copy_of_the_stack() -> None:
    """A training step allocates no tensor as large as the experts, where PEFT's does."""
    stock = moe("Mixtral")
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    layer = next(layer for layer in lora_layers(fast) if layer.parameter_name == "gate_up_proj")
    size = layer.get_base_layer().gate_up_proj.numel() * 4

    def largest(model: nn.Module) -> int:
        ids = IDS[:1, :2]
        with torch.profiler.profile(profile_memory=True) as profile:
            model(input_ids=ids).logits.sum().backward()
        return max(event.cpu_memory_usage for event in profile.events())

    assert largest(fast) < size <= largest(stock)


def test_errors_are_torchs() -> None:
    weight = adapted_weight(torch.randn(6, 4), torch.randn(6, 2), torch.randn(2, 4), 1.0, [])
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        F.linear(torch.randn(3, 5), weight)
    with pytest.raises(RuntimeError, match="same dtype"):
        F.linear(torch.randn(3, 4).half(), weight)
    stack = adapted_weight(
        torch.randn(2, 6, 4), torch.randn(2, 6, 2), torch.randn(2, 2, 4), 1.0, []
    )
    with pytest.raises(IndexError, match="out of bounds"):
        stack[2]
    assert_close_to_exact(stack[-1] + 0, (stack[1] + 0).double(), stack[1] + 0, what="the last")
