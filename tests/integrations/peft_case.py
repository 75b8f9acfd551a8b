"""One configuration of PEFT: its model on fastlora, in float64 and on PEFT's code, compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import fastlora
from tests.integrations.models import (
    Results,
    exact,
    gradients,
    last_reasons,
    linear4bit,
    replay_dropout,
    replaying,
)

VOCAB, WIDTH, HIDDEN, BATCH, LENGTH = 31, 64, 128, 3, 7


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
