"""Times forward and backward of one layer for each of PEFT's configurations, beside PEFT.

    python -m benchmarks.measure.peft_family                # appends to results/peft_family.csv
    python -m benchmarks.measure.peft_family --only DoRA    # the rows whose name has that in it
    python -m benchmarks.measure.peft_family --write        # the table of docs/peft.md, from it

Each round times one step of PEFT's layer, of the same layer on fastlora, and of plain LoRA on
fastlora, one after the other; a ratio is the median over the rounds. 512 tokens, 1024 features in
and out, a bf16 base (NF4 where the row says so) under adapters of PEFT's default dtype.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from benchmarks.report.document import markdown, quantiles_text, rewrite
from fastlora.cli.bench.measure import interleave
from fastlora.cli.bench.plan import Budget
from fastlora.cli.bench.rows import append, machine, quantile_columns
from fastlora.integrations.peft.plan.reasons import LAST_REASON
from tests.integrations.models import gradients, linear4bit, lora_layers
from tests.integrations.peft_case import Case
from tests.integrations.peft_table import CASES

RESULTS = Path(__file__).parents[1] / "results" / "peft_family.csv"
PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
COLUMNS = (
    *("configuration", "rounds", "peft_ms", "fastlora_ms", "lora_ms"),
    *("ratio_p20", "ratio_p50", "ratio_p80", "to_lora_p20", "to_lora_p50", "to_lora_p80"),
)
# Configurations with a computation of their own; the others only initialise LoRA differently.
MEASURED = (
    "LoRA",
    "LoRA on NF4",
    "lora_dropout=0.3",
    "lora_dropout=0.3 on NF4",
    "bias='all'",
    "lora_bias",
    "DoRA",
    "DoRA on NF4",
    "DoRA with dropout, training",
    "DoRA with dropout on NF4",
    "KaSA",
    "BD-LoRA",
    "aLoRA",
    "AdaLoRA",
    "GPT-2's Conv1D (fan_in_fan_out)",
    "embedding",
)
WIDTH, BATCH, TOKENS, VOCAB = 1024, 4, 128, 32000
# Of the result and of each gradient, |fastlora - PEFT| / |PEFT|: bf16 rounds by up to 1 / 256.
_TOLERANCE = 0.02


class Layers(nn.Module):
    """Layers that a configuration may target, named as in the models of the table."""

    def __init__(self, four_bit: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"compute_dtype": torch.bfloat16, "dtype": torch.bfloat16}
        make: Callable[[], nn.Module] = lambda: nn.Linear(WIDTH, WIDTH)  # noqa: E731
        if four_bit:
            make = lambda: linear4bit(WIDTH, WIDTH, **options)  # noqa: E731
        self.up, self.down = make(), make()
        self.embed, self.gpt = nn.Embedding(VOCAB, WIDTH), Conv1D(WIDTH, WIDTH)
        nn.init.normal_(self.gpt.weight, std=WIDTH**-0.5)
        self.is_loaded_in_4bit = four_bit


def layer_of(case: Case) -> nn.Module:
    """A PEFT layer with the case's configuration and no zero parameters."""
    torch.manual_seed(0)
    model = Layers(case.four_bit)
    if not case.four_bit:
        model = model.to(torch.bfloat16)
    config = case.config
    if not isinstance(config, AdaLoraConfig):
        settings = {"r": 16, "lora_alpha": 32, "target_modules": ["up", "down"], **config}
        config = LoraConfig(**copy.deepcopy(settings))
    for name, parameter in get_peft_model(model, config).named_parameters():
        if "lora_" in name and not parameter.any():
            parameter.data.normal_(0, 0.05)
    return lora_layers(model)[0].train()  # type: ignore[no-any-return,operator]


class Step:
    """One forward and backward of a layer."""

    def __init__(self, layer: nn.Module, case: Case) -> None:
        generator = torch.Generator().manual_seed(1)
        self.layer = layer
        self.kwargs: dict[str, Any] = {}
        if getattr(case.config, "get", {}.get)("alora_invocation_tokens"):
            self.kwargs["alora_offsets"] = [TOKENS // 4] * BATCH
        shape = (BATCH, TOKENS, WIDTH)
        self.dy = torch.randn(shape, generator=generator).to(torch.bfloat16)
        if isinstance(layer, Embedding):
            self.x = torch.randint(0, VOCAB, shape[:2], generator=generator)
        else:
            self.x = torch.randn(shape, generator=generator).to(torch.bfloat16).requires_grad_()

    def __call__(self) -> Tensor:
        self.layer.zero_grad()
        self.x.grad = None
        y: Tensor = self.layer(self.x, **self.kwargs)
        y.backward(self.dy.to(y.dtype))
        return y.detach()

    def results(self) -> dict[str, Tensor]:
        """The result and every gradient."""
        found = {"y": self(), **gradients(self.layer)}
        return found if self.x.grad is None else found | {"dx": self.x.grad}


def check(fast: Step, stock: Step) -> None:
    """Raises RuntimeError if the two differ without dropout."""
    dropouts = [m for s in (fast, stock) for m in s.layer.modules() if type(m) is nn.Dropout]
    rates = [m.p for m in dropouts]
    for module in dropouts:
        module.p = 0.0
    got, want = fast.results(), stock.results()
    for module, p in zip(dropouts, rates, strict=True):
        module.p = p
    if got.keys() != want.keys():
        raise RuntimeError(f"gradients differ: {sorted(got)} and {sorted(want)}")
    for name, tensor in got.items():
        off = float((tensor.float() - want[name].float()).norm() / want[name].float().norm())
        if not off < _TOLERANCE:
            raise RuntimeError(f"{name} is off by {off:.3g}")


def measure(name: str, rounds: int) -> dict[str, str]:
    """The row of one configuration."""
    case = CASES[name]
    plain = CASES["LoRA on NF4" if case.four_bit else "LoRA"]
    stock, fast, lora = layer_of(case), layer_of(case), layer_of(plain)
    for layer in (fast, lora):
        fastlora.accelerate(layer, verbose=False)
    steps = {"peft": Step(stock, case), "fastlora": Step(fast, case), "lora": Step(lora, plain)}
    check(steps["fastlora"], steps["peft"])
    reason = fast.__dict__.get(LAST_REASON)
    if reason:
        raise RuntimeError(f"{name} ran on PEFT's code: {reason}")
    timings = interleave({who: [step] for who, step in steps.items()}, Budget(rounds))
    row = {"configuration": name, "rounds": str(rounds)}
    for who, timing in timings.items():
        row[f"{who}_ms"] = f"{statistics.median(timing.seconds) * 1e3:.2f}"
    for what, above, below in (("ratio", "peft", "fastlora"), ("to_lora", "fastlora", "lora")):
        row |= quantile_columns(what, timings[above].over(timings[below]), ".3f")
    return row


def table() -> str:
    """The newest row of each configuration, as Markdown."""
    with RESULTS.open(newline="") as file:
        rows = {row["configuration"]: row for row in csv.DictReader(file)}

    lines = []
    for name in MEASURED:
        row = rows[name]
        times = (f"{float(row[which]):.3g}" for which in ("peft_ms", "fastlora_ms"))
        to_lora = "" if name == "embedding" else quantiles_text(row, "to_lora")  # no linear layer
        lines.append((name, *times, quantiles_text(row, "ratio"), to_lora))
    ratios = ("PEFT / fastlora", "fastlora / its plain LoRA")
    return markdown(("configuration", "PEFT, ms", "fastlora, ms", *ratios), lines, numbers=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="names with this in them")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of each row (15)")
    parser.add_argument("--write", action="store_true", help="write the table, measure nothing")
    args = parser.parse_args()
    if args.write:
        rewrite(PAGE, {"family": table()})
        return
    warnings.simplefilter("ignore")
    facts = machine()
    for name in MEASURED:
        if args.only in name:
            row = measure(name, args.rounds)
            print(row, flush=True)
            append(RESULTS, [facts | row], (*facts, *COLUMNS))


if __name__ == "__main__":
    main()
