"""Data files as training examples: which are trained on, how often, and which are held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CliError
from .examples import IGNORED, ids_of, tokens_of
from .read import Record, read

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# The split doesn't depend on --seed: all seeds are compared on the same held-out text.
_SPLIT_SEED = 0
# More than this of one example in an epoch is a mistake.
_MOST = 1000


@dataclass(frozen=True)
class Example:
    """One row: token ids, and the same ids as labels, or IGNORED."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """How many of its tokens the loss counts: nothing predicts the first."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Source:
    """The examples of one file.

    Args:
        name: of the file.
        weight: how often an epoch takes each example.
        train: an epoch's examples, `weight` times each.
        held_out: for the perplexity.
        left_out: examples without a token to learn within --seq-len; of a text, a rest shorter than
            half of it.
        cut: examples at --seq-len.
    """

    name: str
    weight: float
    train: list[Example]
    held_out: list[Example]
    left_out: int
    cut: int


@dataclass(frozen=True)
class Data:
    """What a run trains on."""

    sources: list[Source]

    @property
    def train(self) -> list[Example]:
        """The examples of an epoch, file by file."""
        return [example for source in self.sources for example in source.train]

    @property
    def held_out(self) -> list[Example]:
        """The examples for the perplexity."""
        return [example for source in self.sources for example in source.held_out]

    def digest(self) -> str:
        """A hash of every token and label, in order: equal for equal data."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            digest.update(repr((example.input_ids, example.labels)).encode())
        return digest.hexdigest()


class Collator:
    """Pads a batch to its longest row: input_ids, attention_mask and labels, int64 [B, T].

    Args:
        tokenizer: whose padding token, or else end token, is taken.
        vocab_size: rows of the model's embedding. Padding is masked, so that any row will do where
            the tokenizer's has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(
            token for token in candidates if token is not None and token < vocab_size
        )

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        import torch

        width = max(len(example.input_ids) for example in examples)

        def padded(rows: Iterator[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        return {
            "input_ids": padded((e.input_ids for e in examples), self.pad_id),
            "attention_mask": padded(([1] * len(e.input_ids) for e in examples), 0),
            "labels": padded((e.labels for e in examples), IGNORED),
        }


def check_ids(data: Data, vocab_size: int) -> None:
    """Checks that the model's embedding has a row for every token.

    Raises:
        CliError: it has not.
    """
    largest = max(max(example.input_ids) for example in (*data.train, *data.held_out))
    if largest >= vocab_size:
        raise CliError(
            f"--model: its tokenizer gives token {largest}, its embedding has {vocab_size} rows; "
            "the tokenizer is another model's"
        )


def collator_for(model: Any, tokenizer: PreTrainedTokenizerBase, data: Data) -> Collator:
    """Pads batches of `data` for `model`, which has a row for each token; else as `check_ids`."""
    vocab_size = len(model.get_input_embeddings().weight)
    check_ids(data, vocab_size)
    return Collator(tokenizer, vocab_size)


def batches(
    examples: Sequence[Example], collator: Collator, size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The examples in order, `size` at a time."""
    for start in range(0, len(examples), size):
        yield collator(examples[start : start + size])


def load_data(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, eval_split: float
) -> Data:
    """Reads and tokenises files.

    A text is cut into windows of seq_len tokens, a record at seq_len; see `tokens_of`.

    Args:
        files: "FILE" or "FILE:WEIGHT"; see `read.read` and `split_weight`.
        tokenizer: the model's.
        seq_len: most tokens in an example.
        eval_split: share of each file's examples to hold out, 0 to 0.5.

    Raises:
        CliError: a file is missing, empty, not UTF-8 or malformed, or gives too few examples.
    """
    return Data([_source(*split_weight(file), tokenizer, seq_len, eval_split) for file in files])


def split_weight(file: str) -> tuple[str, float]:
    """ "FILE:WEIGHT" as both; the weight is 1 if there is none, or a file of the whole name.

    Raises:
        CliError: the weight is not above 0, or too large.
    """
    path, colon, number = file.rpartition(":")
    if not colon or Path(file).expanduser().exists():
        return file, 1.0
    try:
        weight = float(number)
    except ValueError:
        return file, 1.0
    if not 0.0 < weight <= _MOST:
        raise CliError(
            f"--data: the weight of {path} must be above 0 and at most {_MOST}, got {number}"
        )
    return path, weight


def _source(
    path: str, weight: float, tokenizer: PreTrainedTokenizerBase, seq_len: int, eval_split: float
) -> Source:
    content = read(path)
    if isinstance(content, str):
        examples, left_out = _windows(path, content, tokenizer, seq_len)
        cut, kind = 0, f"windows of {seq_len} tokens"
    else:
        examples, left_out, cut = _examples(path, content, tokenizer, seq_len)
        kind = "examples"
    held_out_count = max(1, round(eval_split * len(examples))) if eval_split else 0
    if held_out_count >= len(examples):
        raise CliError(
            f"--data: {path} gives {len(examples)} {kind}, too few to hold out "
            f"--eval-split {eval_split:g} of them; give more text, a shorter --seq-len or "
            "--eval-split 0"
        )
    order = list(range(len(examples)))
    generator = random.Random(_SPLIT_SEED)
    generator.shuffle(order)
    held_out, train = sorted(order[:held_out_count]), sorted(order[held_out_count:])
    whole, part = divmod(weight, 1.0)
    some = sorted(generator.sample(train, round(part * len(train))))
    if not (taken := train * int(whole) + some):
        raise CliError(f"--data: {path} gives {len(train)} {kind}, of which {weight:g} is none")
    return Source(
        name=Path(path).name,
        weight=weight,
        train=[examples[i] for i in taken],
        held_out=[examples[i] for i in held_out],
        left_out=left_out,
        cut=cut,
    )


def _windows(
    path: str, text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> tuple[list[Example], int]:
    ids = ids_of(tokenizer, text)
    # Drops a remainder shorter than half a window: a padded row costs as much as a full one.
    starts = [s for s in range(0, len(ids), seq_len) if len(ids) - s >= max(2, seq_len // 2)]
    if not starts:
        raise CliError(
            f"--data: {path} gives {len(ids)} tokens, too few for a window of --seq-len {seq_len}"
        )
    windows = [Example(ids[s : s + seq_len], ids[s : s + seq_len]) for s in starts]
    return windows, int(starts[-1] + seq_len < len(ids))


def _examples(
    path: str, records: list[Record], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> tuple[list[Example], int, int]:
    """The examples, how many records are left out, and how many examples are cut."""
    examples, cut = [], 0
    for record in records:
        ids, labels = tokens_of(record, tokenizer)
        example = Example(ids[:seq_len], labels[:seq_len])
        # A prompt of seq_len tokens leaves nothing to learn.
        if example.learned:
            examples.append(example)
            cut += len(ids) > seq_len
    if not examples:
        raise CliError(
            f"--data: {path} gives no example with a token to learn within --seq-len {seq_len}"
        )
    return examples, len(records) - len(examples), cut
