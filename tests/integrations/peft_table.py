"""PEFT's LoRA configurations, one case each: on fastlora or on PEFT's code, and with what error.

`test_peft_table.py` holds every case to the error policy. Run as a program, this module writes
docs/peft.md from the same cases:

    python -m tests.integrations.peft_table
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    VeloraConfig,
)
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import fastlora
from benchmarks.report.document import fill
from tests.integrations.models import (
    ReplayDropout,
    Results,
    exact,
    gradients,
    last_reasons,
    linear4bit,
    lora_layers,
    replay_dropout,
    replaying,
)

VOCAB, WIDTH, HIDDEN, BATCH, LENGTH = 31, 64, 128, 3, 7
PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
IDS = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """An embedding, two linears, a convolution, GPT-2's Conv1D, a head, and experts if given."""

    def __init__(self, four_bit: bool = False, experts: nn.Module | None = None) -> None:
        super().__init__()
        linear: Callable[[int, int], nn.Module] = linear4bit if four_bit else nn.Linear
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.gpt = Conv1D(WIDTH, WIDTH)
        nn.init.normal_(self.gpt.weight, std=WIDTH**-0.5)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.is_loaded_in_4bit = four_bit
        self.experts = experts
        if experts is not None:
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=WIDTH**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.nn.functional.silu(self.up(x)))
        if self.experts is not None:
            # Two of five experts for each token; the third one gets none.
            chosen = torch.stack([ids % 2, 3 + ids % 2], -1).flatten(0, 1)
            shares = torch.tensor([0.7, 0.3], dtype=x.dtype).expand(chosen.shape)
            x = x + self.experts(x.flatten(0, 1), chosen, shares).view(x.shape)
        x = x + self.conv(x.mT).mT
        return self.head(torch.tanh(self.gpt(x)))


def experts(kind: str, implementation: str = "grouped_mm") -> Callable[[], nn.Module]:
    """Five experts of Mixtral, `[E, out, in]`, or of gpt-oss, `[E, in, out]` with biases."""

    def make() -> nn.Module:
        sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_local_experts": 5}
        config = MixtralConfig(**sizes) if kind == "Mixtral" else GptOssConfig(**sizes)
        config._experts_implementation = implementation
        return MixtralExperts(config) if kind == "Mixtral" else GptOssExperts(config)

    return make


class OnCPU(TorchFunctionMode):
    """PEFT's LoftQ computes on a GPU whatever there is; here what it moves there stays."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if function is Tensor.to:
            args = (args[0], *("cpu" if str(arg) == "cuda" else arg for arg in args[1:]))
            named = {name: "cpu" if str(arg) == "cuda" else arg for name, arg in named.items()}
        return function(*args, **named)


Act = Callable[[nn.Module], Results]


def step(model: nn.Module, **options: Any) -> Results:
    """Logits and every gradient."""
    torch.manual_seed(0)
    model.zero_grad()
    logits = model(IDS, **options)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view(logits.shape)
    (logits * weights).sum().backward()
    return {"logits": logits.detach(), **gradients(model)}


@dataclass(frozen=True)
class Case:
    """One configuration.

    Args:
        config: `LoraConfig`'s arguments, or another config.
        reasons: why layers ran PEFT's code; {""} when all ran on fastlora.
        explained: what `explain` says, where it judges without the call; `reasons` when None.
        act: what is done with the model.
        prepare: what PEFT does to the model once it is built.
        four_bit: `up` and `down` are bitsandbytes' Linear4bit.
        experts: makes the experts of the model.
    """

    config: Mapping[str, Any] | AdaLoraConfig = field(default_factory=dict)
    reasons: frozenset[str] = frozenset({""})
    explained: frozenset[str] | None = None
    act: Act = step
    prepare: Callable[[nn.Module, Any], None] = lambda model, config: None
    four_bit: bool = False
    experts: Callable[[], nn.Module] | None = None

    def trio(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The model on fastlora, in float64 and on PEFT's code, its zeros replaced."""
        torch.manual_seed(0)
        base = Net(self.four_bit, self.experts and self.experts())
        config = self.config
        if not isinstance(config, AdaLoraConfig):
            settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **config}
            config = LoraConfig(**copy.deepcopy(settings))
        if getattr(config, "lora_ga_config", None) is not None:
            preprocess_loraga(base, config, lambda: base(IDS).square().sum().backward())
        if getattr(config, "corda_config", None) is not None:
            preprocess_corda(base, config, run_model=lambda: [base(row[None]) for row in IDS])
        with OnCPU() if config.init_lora_weights == "loftq" else nullcontext():
            stock = get_peft_model(base, config)
        self.prepare(stock, config)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in stock.named_parameters():
            if "lora_" in name and not parameter.any():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
        wide = exact(stock)
        for module in wide.modules():
            if hasattr(module, "is_transposed"):
                module.config._experts_implementation = "eager"  # torch's grouped_mm has no float64
        return fast.train(), wide.train(), replaying(stock).train()

    def run(self) -> Outcome:
        """Runs it three times."""
        models = self.trio()
        # A mask that PEFT's code draws for a fast model, too, is one that can be replayed.
        with mock.patch("torch.nn.functional.dropout", replay_dropout):
            results = [self.act(model) for model in models]
        rows = fastlora.explain(models[0]).rows
        shown = {row.reason or row.last_call or "" for row in rows}
        return Outcome(*results, last_reasons(models[0]), shown)


@dataclass(frozen=True)
class Outcome:
    """The results of the three models, why layers ran PEFT's code, and what `explain` says."""

    fast: Results
    exact: Results
    stock: Results
    reasons: set[str | None]
    explained: set[str]

    def units(self) -> float:
        """Our largest error in units of PEFT's, each entry scaled by its largest value."""
        scales = {name: t.abs().max().clamp(min=1e-30) for name, t in self.exact.items()}
        errors = [
            max(
                float((results[name].double() - t).abs().max() / scales[name])
                for name, t in self.exact.items()
            )
            for results in (self.fast, self.stock)
        ]
        return errors[0] / errors[1] if errors[1] else 1.0


# ---- what is done with a model -----------------------------------------------------------------


def add(model: Any, name: str = "other", **options: Any) -> None:
    settings = {"r": 5, "lora_alpha": 3, "target_modules": ["up", "down"], **options}
    model.add_adapter(name, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in f"{parameter_name}.":
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(values)
    for layer in lora_layers(model):
        if any(type(d) is ReplayDropout for d in layer.lora_dropout.values()):
            p = getattr(layer.lora_dropout[name], "p", 0.0)
            layer.lora_dropout[name] = ReplayDropout(p)


def together(dtype: torch.dtype | None = None, **options: Any) -> Act:
    def act(model: Any) -> Results:
        add(model, **options)
        for name, parameter in model.named_parameters():
            if dtype is not None and ".other." in name:
                rounded = parameter.data.to(dtype)
                exactly = parameter.dtype == torch.float64
                parameter.data = rounded.double() if exactly else rounded
        model.base_model.set_adapter(["default", "other"])
        return step(model)

    return act


def mixed(training: bool) -> Act:
    def act(model: Any) -> Results:
        add(model)
        x = torch.linspace(-1, 1, BATCH * LENGTH * WIDTH).view(BATCH, LENGTH, WIDTH)
        layer = lora_layers(model)[0]
        x = x.to(next(layer.lora_A.parameters()).dtype).requires_grad_(training)
        for adapter in ("default", "other"):
            for part in (layer.lora_A, layer.lora_B):
                part[adapter].requires_grad_(training)
        names = ["other", "__base__", "default"]
        y = layer(x, adapter_names=names)
        # The others are called as well, so that each has a latest call.
        for further in lora_layers(model)[1:]:
            width = further.in_features
            further(x.detach().new_ones(BATCH, width), adapter_names=names)
        if not training:
            return {"y": y.detach()}
        y.square().sum().backward()
        return {"y": y.detach(), "dx": x.grad, **gradients(layer)}

    return act


def switched(model: Any) -> Results:
    add(model)
    model.set_adapter("other")
    return step(model)


def disabled(model: Any) -> Results:
    with model.disable_adapter(), torch.no_grad():
        return {"logits": model(IDS)}


def merged(**options: Any) -> Act:
    def act(model: Any) -> Results:
        model.merge_adapter(**options)
        return {"logits": model(IDS).detach()}

    return act


def merged_and_unmerged(model: Any) -> Results:
    model.merge_adapter()
    model.unmerge_adapter()
    return step(model)


def ranks_cut(model: Any) -> Results:
    """Gradients after AdaLoRA's allocator has switched singular values off."""
    step(model)
    model.base_model.peft_config["default"].tinit = 0
    model.base_model.update_and_allocate(4)
    zeros = [int((layer.lora_E["default"] == 0).sum()) for layer in lora_layers(model)]
    assert any(zeros), zeros
    return step(model)


def combined(kind: str, **options: Any) -> Act:
    def act(model: Any) -> Results:
        add(model, r=4)
        torch.manual_seed(0)
        model.add_weighted_adapter(
            ["default", "other"], [0.5, 0.7], "mix", combination_type=kind, **options
        )
        model.set_adapter("mix")
        return {"logits": model(IDS).detach()}

    return act


def optimised(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Act:
    """Gradients after a step of PEFT's own optimizer."""

    def act(model: Any) -> Results:
        optimizer = make(model=model, lr=1e-2, **options)
        step(model)
        optimizer.step()
        return step(model)

    return act


def evaluated(model: nn.Module) -> Results:
    with torch.no_grad():
        return {"logits": model.eval()(IDS)}


def invoked(*offsets: int | None, further: bool = False, training: bool = True) -> Act:
    """aLoRA with an offset for each row, and with a plain adapter beside it."""

    def act(model: Any) -> Results:
        if further:
            add(model, alora_invocation_tokens=None)
            model.base_model.set_adapter(["default", "other"])
        if training:
            return step(model, alora_offsets=list(offsets))
        with torch.no_grad():
            return {"logits": model.eval()(IDS, alora_offsets=list(offsets))}

    return act


def invoked_in_mixed_batches(model: Any) -> Results:
    """Rows with an aLoRA adapter, with a plain one, and with none."""
    add(model, alora_invocation_tokens=None)
    options = {"adapter_names": ["default", "other", "__base__"], "alora_offsets": [4, 2, 3]}
    with torch.no_grad():
        return {"logits": model.eval()(IDS, **options)}


# ---- what PEFT does to a model once it is built -------------------------------------------------


def by_eva(model: Any, config: LoraConfig) -> None:
    loader = [IDS, IDS.flip(1)]
    initialize_lora_eva_weights(
        model,
        loader,
        forward_fn=lambda model, ids: model(ids),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0].reshape(-1, x[0].shape[-1]),
        show_progress_bar=False,
    )


def narrow(model: Any, config: LoraConfig) -> None:
    """bf16 linears under fp32 adapters, as PEFT makes them of a model loaded in bf16."""
    for layer in lora_layers(model):
        layer.base_layer.to(torch.bfloat16)
        layer.register_forward_pre_hook(to_weight_dtype)
        layer.register_forward_hook(from_bf16)


def narrow_table(model: nn.Module, config: LoraConfig) -> None:
    """A bf16 table under fp32 adapters."""
    for layer in lora_layers(model):
        layer.base_layer.to(torch.bfloat16)
        layer.register_forward_hook(from_bf16)


def to_weight_dtype(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(layer.base_layer.weight.dtype),)


def from_bf16(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return y.float() if y.dtype == torch.bfloat16 else y


def why(*reasons: str) -> frozenset[str]:
    return frozenset(reasons)


def variant(name: str) -> frozenset[str]:
    return why(f"the adapter is a LoRA variant ({name})")


def no_class(*kinds: str) -> frozenset[str]:
    """The layers are PEFT's own, which keep no reason of a latest call."""
    return frozenset(f"fastlora has no layer for PEFT's {kind}" for kind in kinds)


EXPERTS = {
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
ALORA = {"alora_invocation_tokens": [1]}
VELORA = why("VeLoRA trains A on compressed activations, which fastlora does not make")
MERGED = why("the adapter is merged into the base weight")

# Those combinations of adapters that keep only a part of their values.
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")

CASES: dict[str, Case] = {
    "LoRA": Case(),
    "LoRA on NF4": Case(four_bit=True),
    "LoRA, bf16 base, fp32 adapters": Case(prepare=narrow),
    "lora_dropout=0.3": Case({"lora_dropout": 0.3}),
    "lora_dropout=0.3 on NF4": Case({"lora_dropout": 0.3}, four_bit=True),
    "use_rslora": Case({"use_rslora": True}),
    "rank_pattern, alpha_pattern": Case({"rank_pattern": {"up": 7}, "alpha_pattern": {"down": 9}}),
    "bias='lora_only'": Case({"bias": "lora_only"}),
    "bias='all'": Case({"bias": "all"}),
    "lora_bias": Case({"lora_bias": True}),
    "lora_bias with dropout, bias='all'": Case(
        {"lora_bias": True, "lora_dropout": 0.3, "bias": "all"}
    ),
    "lora_bias on NF4": Case({"lora_bias": True}, four_bit=True),
    "init gaussian": Case({"init_lora_weights": "gaussian"}),
    "init orthogonal": Case({"init_lora_weights": "orthogonal"}),
    "PiSSA": Case({"init_lora_weights": "pissa"}),
    "PiSSA, fast SVD": Case({"init_lora_weights": "pissa_niter_4"}),
    "OLoRA": Case({"init_lora_weights": "olora"}),
    "EVA": Case({"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}, prepare=by_eva),
    "LoRA-GA": Case({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}),
    "CorDA, IPM": Case({"init_lora_weights": "corda", "corda_config": CordaConfig()}),
    "CorDA, KPM": Case(
        {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}
    ),
    "LoftQ": Case({"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}),
    "LoRA-FA (optimizer)": Case(act=optimised(create_lorafa_optimizer, r=4, lora_alpha=6)),
    "LoRA+ (optimizer)": Case(
        act=optimised(
            create_loraplus_optimizer, optimizer_cls=torch.optim.SGD, loraplus_lr_ratio=4.0
        )
    ),
    "two active adapters": Case(act=together()),
    "two active adapters, one with dropout": Case(act=together(lora_dropout=0.3)),
    "two active adapters, each with dropout": Case(
        {"lora_dropout": 0.2}, act=together(lora_dropout=0.3)
    ),
    "two active adapters, fp32 and bf16": Case(act=together(torch.bfloat16)),
    "two active adapters with lora_bias": Case({"lora_bias": True}, act=together(lora_bias=True)),
    "two active adapters on NF4": Case(act=together(), four_bit=True),
    "adapter_names": Case(act=mixed(training=False)),
    "adapter_names, training": Case(act=mixed(training=True)),
    "adapter_names, training, lora_bias": Case({"lora_bias": True}, act=mixed(training=True)),
    # In training, PEFT changes bitsandbytes' output in place, which autograd refuses.
    "adapter_names on NF4": Case(act=mixed(training=False), four_bit=True),
    "set_adapter": Case(act=switched),
    "disable_adapter": Case(act=disabled, reasons=why("the adapters are disabled")),
    "merge_adapter": Case(act=merged(), reasons=MERGED),
    "merge_adapter(safe_merge=True)": Case(act=merged(safe_merge=True), reasons=MERGED),
    "merge, unmerge": Case(act=merged_and_unmerged),
    **{
        f"add_weighted_adapter, {kind}": Case(act=combined(kind, **options))
        for kind, options in {
            "linear": {},
            "cat": {},
            "svd": {},
            **{kind: {"density": 0.5} for kind in PRUNED},
            **{f"{kind}_svd": {"density": 0.5} for kind in PRUNED},
        }.items()
    },
    **{
        f"add_weighted_adapter, {kind} on NF4": Case(act=combined(kind, **options), four_bit=True)
        for kind, options in {
            **{kind: {} for kind in ("linear", "cat", "svd")},
            **{kind: {"density": 0.5} for kind in ("ties", "ties_svd", "dare_ties_svd")},
        }.items()
    },
    "modules_to_save": Case({"modules_to_save": ["head"]}),
    "lm_head": Case({"target_modules": ["up", "head"]}),
    "DoRA": Case({"use_dora": True}),
    "DoRA, bias='all'": Case({"use_dora": True, "bias": "all"}),
    "DoRA, bf16 base, fp32 adapters": Case({"use_dora": True}, prepare=narrow),
    "DoRA on NF4": Case({"use_dora": True}, four_bit=True),
    "DoRA with dropout, evaluated": Case({"use_dora": True, "lora_dropout": 0.3}, act=evaluated),
    "DoRA with dropout, training": Case({"use_dora": True, "lora_dropout": 0.25}),
    "DoRA with dropout, bias='all'": Case({"use_dora": True, "lora_dropout": 0.25, "bias": "all"}),
    "DoRA with dropout on NF4": Case({"use_dora": True, "lora_dropout": 0.25}, four_bit=True),
    "DoRA with dropout, bf16 base, fp32 adapters": Case(
        {"use_dora": True, "lora_dropout": 0.25}, prepare=narrow
    ),
    "DoRA, merge, unmerge": Case({"use_dora": True}, act=merged_and_unmerged),
    "MiCA": Case({"init_lora_weights": "mica"}),
    "KaSA": Case({"kasa_config": KasaConfig()}),
    "KaSA with dropout": Case({"kasa_config": KasaConfig(), "lora_dropout": 0.3}),
    "KaSA, bf16 base, fp32 adapters": Case({"kasa_config": KasaConfig()}, prepare=narrow),
    "VeLoRA": Case({"velora_config": VeloraConfig()}, reasons=VELORA),
    "VeLoRA, evaluated": Case({"velora_config": VeloraConfig()}, act=evaluated),
    "aLoRA": Case(ALORA, act=invoked(3, 3, 3)),
    "aLoRA, ragged offsets": Case(ALORA, act=invoked(None, 2, LENGTH + 5)),
    "aLoRA, nothing invoked but one token": Case(ALORA, act=invoked(0, None, 1)),
    "aLoRA, every token": Case(ALORA, act=invoked(LENGTH, LENGTH, LENGTH + 1)),
    "aLoRA with dropout": Case({**ALORA, "lora_dropout": 0.3}, act=invoked(None, 2, LENGTH)),
    "aLoRA with lora_bias": Case({**ALORA, "lora_bias": True}, act=invoked(1, 5, None)),
    "aLoRA, bf16 base, fp32 adapters": Case(ALORA, act=invoked(1, 5, None), prepare=narrow),
    # In training, PEFT changes bitsandbytes' output in place, which autograd refuses.
    "aLoRA on NF4": Case(ALORA, act=invoked(1, 5, None, training=False), four_bit=True),
    "aLoRA beside LoRA": Case(ALORA, act=invoked(1, 5, None, further=True)),
    "aLoRA, adapter_names": Case(ALORA, act=invoked_in_mixed_batches),
    "BD-LoRA": Case(
        {
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2
            )
        },
    ),
    "embedding": Case({"target_modules": ["embed"]}),
    "embedding, bf16 table, fp32 adapters": Case(
        {"target_modules": ["embed"]}, prepare=narrow_table
    ),
    "embedding and linear layers": Case({"target_modules": ["embed", "up", "down"]}),
    "embedding, MiCA": Case({"target_modules": ["embed"], "init_lora_weights": "mica"}),
    "embedding, DoRA": Case(
        {"target_modules": ["embed"], "use_dora": True}, reasons=variant("DoraEmbeddingVariant")
    ),
    "embedding, two active adapters": Case(
        {"target_modules": ["embed"]},
        act=together(target_modules=["embed"]),
        reasons=why("several adapters are active on an embedding"),
    ),
    "embedding, merge, unmerge": Case({"target_modules": ["embed"]}, act=merged_and_unmerged),
    "Conv1d": Case({"target_modules": ["conv"]}, reasons=no_class("Conv1d")),
    "GPT-2's Conv1D (fan_in_fan_out)": Case(
        {"target_modules": ["gpt"], "fan_in_fan_out": True},
    ),
    "GPT-2's Conv1D, bf16 base, fp32 adapters, dropout": Case(
        {"target_modules": ["gpt"], "fan_in_fan_out": True, "lora_dropout": 0.3}, prepare=narrow
    ),
    "GPT-2's Conv1D, DoRA": Case(
        {"target_modules": ["gpt"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "target_parameters, a linear layer's weight": Case(
        {"target_modules": [], "target_parameters": ["up.weight"]}
    ),
    "target_parameters, Mixtral's experts": Case(EXPERTS, experts=experts("Mixtral")),
    "target_parameters, Mixtral's experts in a loop": Case(
        EXPERTS, experts=experts("Mixtral", "eager")
    ),
    "target_parameters, Mixtral's experts, batched_mm": Case(
        EXPERTS, experts=experts("Mixtral", "batched_mm")
    ),
    "target_parameters, gpt-oss's experts": Case(EXPERTS, experts=experts("gpt-oss")),
    "target_parameters, gpt-oss's experts in a loop": Case(
        EXPERTS, experts=experts("gpt-oss", "eager")
    ),
    "target_parameters, experts and linear layers": Case(
        {**EXPERTS, "target_modules": ["up", "down"]}, experts=experts("Mixtral")
    ),
    "target_parameters, two active adapters": Case(
        EXPERTS, experts=experts("Mixtral"), act=together(**EXPERTS)
    ),
    "target_parameters, merge_adapter": Case(
        EXPERTS, experts=experts("gpt-oss"), act=merged(), reasons=MERGED
    ),
    "AdaLoRA": Case(
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["up", "down"])
    ),
    "AdaLoRA with dropout": Case(
        AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules=["up", "down"], lora_dropout=0.3
        )
    ),
    "AdaLoRA, ranks cut": Case(
        AdaLoraConfig(init_r=4, target_r=1, total_step=9, target_modules=["up", "down"]),
        act=ranks_cut,
    ),
    "AdaLoRA, merge, unmerge": Case(
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["up", "down"]),
        act=merged_and_unmerged,
    ),
}


# ---- docs/peft.md --------------------------------------------------------------------------------


def table() -> str:
    """Markdown: a row for each case, from running it."""
    lines = ["| configuration | runs on | error |", "|---|---|---|"]
    for name, case in CASES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = case.run()
        lines.append(f"| {name} | {served(case)} | {outcome.units():.2f} |")
    return "\n".join(lines)


def served(case: Case) -> str:
    """The table's second cell."""
    if case.reasons == {""}:
        return "fastlora"
    return "PEFT's code: " + "; ".join(sorted(case.reasons))


def main() -> None:
    torch.set_num_threads(1)
    PAGE.write_text(fill(PAGE.read_text(), {"configurations": table()}))


if __name__ == "__main__":
    main()
