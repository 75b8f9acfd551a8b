"""Measures what `accelerate(model, fuse="mlp")` gives a training step, in time and in memory.

    python -m benchmarks.measure.fuse            # appends to results/fuse.csv
    python -m benchmarks.measure.fuse --write    # the table of docs/peft.md, from it

One step (forward and backward) of four Llama layers, 1024 wide, with LoRA on every linear layer
(r = 16, dropout 0.05, fp32 adapters over bf16), on 512 tokens. Each round times the two ways one
after the other on one model; a ratio is the median over the rounds. `kept_mib` is the distinct
memory that the graph keeps for the backward, parameters and quant states left out.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from benchmarks.report.document import markdown, quantiles_text, rewrite
from fastlora.cli.bench.measure import interleave
from fastlora.cli.bench.memory import saved_bytes
from fastlora.cli.bench.plan import Budget
from fastlora.cli.bench.rows import append, machine, quantile_columns
from tests.integrations.models import linear4bit

RESULTS = Path(__file__).parents[1] / "results" / "fuse.csv"
PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
COLUMNS = ("base", "fuse", "rounds", "ms", "ratio_p20", "ratio_p50", "ratio_p80", "kept_mib")
BASES = ("bf16", "nf4")
WAYS = (None, "mlp")
TOKENS = 512


class Step:
    """A forward and a backward of one model, its layers joined in one way."""

    def __init__(self, base: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
        llama = LlamaForCausalLM(config).to(torch.bfloat16)
        if base == "nf4":
            pack(llama)
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
        self.model: Any = get_peft_model(llama, lora).train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
        self.tokens = torch.randint(0, 512, (1, TOKENS))

    def switch(self, way: str) -> None:
        """Joins the layers as `fuse=way` does; "None" joins none."""
        fastlora.restore(self.model)
        fuse: Any = None if way == "None" else way
        fastlora.accelerate(self.model, fuse=fuse, verbose=False)

    def __call__(self) -> None:
        self.model.zero_grad()
        self.forward().backward()

    def forward(self) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        return loss

    def kept_mib(self) -> float:
        """The distinct memory that the graph of `forward` keeps beyond the model's own."""
        own = self.model.state_dict().values()
        return saved_bytes(self.forward, own, Tensor.is_floating_point) / 2**20


def pack(model: Any) -> None:
    """Gives every linear layer of the decoder an NF4 weight of its shape."""
    options: dict[str, Any] = {"compute_dtype": torch.bfloat16, "dtype": torch.bfloat16}
    for layer in model.model.layers.modules():
        for name, child in list(layer.named_children()):
            if type(child) is nn.Linear:
                packed = linear4bit(child.in_features, child.out_features, bias=False, **options)
                setattr(layer, name, packed)
    model.is_loaded_in_4bit = True


def measure(base: str, rounds: int) -> list[dict[str, str]]:
    """The rows of one base."""
    step = Step(base)
    names = [str(way) for way in WAYS]
    timings = interleave({name: [step] for name in names}, Budget(rounds), switch=step.switch)
    rows = []
    for name in names:
        step.switch(name)
        ms = f"{statistics.median(timings[name].seconds) * 1e3:.1f}"
        row = {"base": base, "fuse": name, "rounds": str(rounds), "ms": ms}
        row |= quantile_columns("ratio", timings["None"].over(timings[name]), ".3f")
        rows.append(row | {"kept_mib": f"{step.kept_mib():.1f}"})
    return rows


def table() -> str:
    """The newest row of each base and way, as Markdown."""
    with RESULTS.open(newline="") as file:
        rows = {(row["base"], row["fuse"]): row for row in csv.DictReader(file)}
    rows = {key: row for key, row in rows.items() if key[1] in map(str, WAYS)}
    lines = []
    for row in rows.values():
        ratio = quantiles_text(row, "ratio")
        lines.append((row["base"], row["fuse"], row["ms"], ratio, row["kept_mib"]))
    head = ("base", "`fuse`", "step, ms", "without `fuse` / with it", "kept, MiB")
    return markdown(head, lines, numbers=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of each way (9)")
    parser.add_argument("--write", action="store_true", help="write the table, measure nothing")
    args = parser.parse_args()
    if args.write:
        rewrite(PAGE, {"fuse": table()})
        return
    facts = machine()
    for base in BASES:
        rows = measure(base, args.rounds)
        print(*rows, sep="\n", flush=True)
        append(RESULTS, [facts | row for row in rows], (*facts, *COLUMNS))


if __name__ == "__main__":
    main()
