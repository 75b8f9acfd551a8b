"""What a run will train on, before it does: a table of the files, and an example of each."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .data import Data, Example, Source
from .examples import IGNORED
from .job import Job
from .terminal import plain_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a longer part of an example, its beginning and its end are shown: characters.
_BEGINNING, _END = 160, 60
_SAMPLES = 3


def print_data(console: Console, data: Data, tokenizer: PreTrainedTokenizerBase, job: Job) -> None:
    """Prints the table, what was left out and why, and an example for each of the first files."""
    console.print(_table(data))
    if any(source.left_out for source in data.sources):
        console.print(
            f"Left out: nothing to learn within --seq-len {job.seq_len} (the prompt fills it), or "
            "the rest of a text, shorter than half of it.",
            highlight=False,
            markup=False,
        )
    examples = len(data.train)
    in_step = job.batch_size * job.grad_accum
    steps = job.steps or math.ceil(math.ceil(examples / in_step) * (job.epochs or 1))
    console.print(
        f"{steps:,} steps of {in_step} examples, {steps * in_step / examples:.3g} epochs",
        highlight=False,
    )
    for source in data.sources[:_SAMPLES]:
        console.print(
            f"\nAn example of {source.name}; the loss counts what «» enclose:",
            highlight=False,
            markup=False,
        )
        console.print(Padding(rendered(source.train[0], tokenizer), (0, 0, 0, 2)))
    console.print()


def _table(data: Data) -> Table:
    table = plain_table()
    table.add_column("data", overflow="fold")
    weighted = any(source.weight != 1.0 for source in data.sources)
    numbers = ["examples", "held out", "left out", "cut", "tokens", "learned"]
    for name in ["weight"] * weighted + numbers:
        table.add_column(name, justify="right", no_wrap=True)
    rows = [(source.name, source.weight, _counts(source)) for source in data.sources]
    for name, weight, counts in rows:
        table.add_row(Text(name), *[f"{weight:g}"] * weighted, *(f"{count:,}" for count in counts))
    if len(rows) > 1:
        totals = (sum(column) for column in zip(*(counts for *_, counts in rows), strict=True))
        table.add_row("together", *[""] * weighted, *(f"{total:,}" for total in totals))
    return table


def _counts(source: Source) -> tuple[int, ...]:
    """Of an epoch: examples, held out, left out, cut, tokens, and tokens that the loss counts."""
    return (
        len(source.train),
        len(source.held_out),
        source.left_out,
        source.cut,
        sum(len(example.input_ids) for example in source.train),
        sum(example.learned for example in source.train),
    )


def rendered(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The text of an example, with what the loss counts in «»."""
    text = Text()
    pairs = zip(example.input_ids, example.labels, strict=True)
    for learned, part in groupby(pairs, lambda pair: pair[1] != IGNORED):
        words = str(tokenizer.decode([token for token, _ in part]))
        if len(words) > _BEGINNING + _END:
            words = f"{words[:_BEGINNING]} […] {words[-_END:]}"
        words = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in words)
        text.append(f"«{words}»" if learned else words, "bold" if learned else "dim")
    return text
