"""How ways of merging a trained adapter change a model: perplexity and divergence.

    fastlora demo --steps 60 --backend fastlora --out ADAPTER
    python -m benchmarks.measure.merging --adapter ADAPTER    # appends to results/merging.csv
    python -m benchmarks.measure.merging --docs               # the table in docs/peft.md

Model and text are those of `fastlora demo`; it tests on the examples that the demo held out.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastlora
from benchmarks.report.document import markdown, rewrite
from fastlora.cli.bench.rows import append, machine
from fastlora.cli.console import quiet_libraries
from fastlora.cli.finetune.data import Collator, batches, load_data
from fastlora.cli.finetune.demo import smollm2, topics
from fastlora.integrations import transformers as hf
from fastlora.integrations.bitsandbytes import disable_cpu_repacking
from fastlora.integrations.peft.merge.moments import InputMoments

RESULTS = Path(__file__).parents[1] / "results" / "merging.csv"
PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
COLUMNS = ("way", "perplexity", "kl", "size", "error", "kept", "lost", "output_error")
# Windows as in the demo; every seventh of the training part calibrates.
_LENGTH, _EVAL_SPLIT, _BATCH = 256, 0.05, 4
_CALIBRATION = slice(0, 420, 7)
_SHOWN = {
    "unmerged": "4-bit base, adapter beside it",
    "none": "4-bit base alone",
    "peft": "PEFT's `merge_adapter`",
    "4bit": '`into="4bit"`',
    "4bit, moments": '`into="4bit"`, `moments`',
    "4bit, base": '`into="4bit"`, `base`',
    "dense": '`into="dense"`',
}


def ways(folder: Path, calibration: list[Any]) -> dict[str, Callable[[Any], Any]]:
    """Functions that merge, by name."""

    def ours(**options: Any) -> Callable[[Any], Any]:
        def merge(model: Any) -> Any:
            if options.pop("moments", False):
                options["moments"] = InputMoments(model, calibration)
            return fastlora.merge_adapter(model, compare=False, **options)

        return merge

    return {
        "unmerged": lambda model: None,
        "none": lambda model: model.base_model.disable_adapter_layers(),
        "peft": lambda model: model.merge_adapter(),
        "4bit": ours(),
        "4bit, moments": ours(moments=True),
        "4bit, base": ours(base=folder),
        "dense": ours(into="dense"),
    }


def measure(adapter: str) -> list[dict[str, str]]:
    """A row for each way."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = hf.model_folder(smollm2())
    tokenizer = hf.load_tokenizer(folder)
    data = load_data([str(topics(None))], tokenizer, _LENGTH, _EVAL_SPLIT)
    collator = Collator(tokenizer, len(tokenizer))
    held_out = list(batches(data.held_out, collator, _BATCH))
    calibration = [
        {name: batch[name] for name in ("input_ids", "attention_mask")}
        for batch in batches(data.train[_CALIBRATION], collator, _BATCH)
    ]
    reference: list[torch.Tensor] = []
    rows = []
    for way, merge in ways(folder, calibration).items():
        config = hf.four_bit("nf4", True, torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
        )
        disable_cpu_repacking(model)
        model = PeftModel.from_pretrained(model, adapter).eval()
        fastlora.accelerate(model, verbose=False)
        report = merge(model)
        found = [log_probabilities(model, batch) for batch in held_out[:3]]
        reference = reference or found
        row = {
            "way": way,
            "perplexity": f"{hf.perplexity(model, held_out):.3f}",
            "kl": f"{divergence(reference, found):.5f}",
        }
        figures = {} if report is None else report.means()
        row |= {name: f"{value:.4g}" for name, value in figures.items() if name in COLUMNS}
        print(row, flush=True)
        rows.append(row)
    return rows


@torch.no_grad()
def log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float().log_softmax(-1)


def divergence(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """KL(reference || found) a token."""
    pairs = zip(reference, found, strict=True)
    return float(torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in pairs]).mean())


def table() -> str:
    """Markdown of the latest run."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    latest = [row for row in rows if row["date"] == rows[-1]["date"]]
    shown = ("perplexity", "kl", "kept", "output_error")
    return markdown(
        ("weights", "perplexity", "KL to unmerged", "kept of the update", "error in outputs"),
        ((_SHOWN[row["way"]], *(row[name] for name in shown)) for row in latest),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", metavar="FOLDER", help="measure; append to results/merging.csv")
    what.add_argument("--docs", action="store_true", help="write the table in docs/peft.md")
    args = parser.parse_args()
    if args.docs:
        rewrite(PAGE, {"merging": table()})
        return
    quiet_libraries()
    warnings.simplefilter("ignore")
    facts = machine()
    append(RESULTS, [facts | row for row in measure(args.adapter)], (*facts, *COLUMNS))


if __name__ == "__main__":
    main()
