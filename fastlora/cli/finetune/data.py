"""Reads text and JSONL files as training examples: token ids, and labels for the loss."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CliError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_FORMS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'
# The split doesn't depend on --seed: all seeds are compared on the same held-out text.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Example:
    """One row: token ids, and the same ids as labels, or IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Data:
    """Examples to train on and to hold out, and a description in one line."""

    train: list[Example]
    held_out: list[Example]
    description: str

    def digest(self) -> str:
        """A hash of every token and label, in order: equal for equal data."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            digest.update(repr((example.input_ids, example.labels)).encode())
        return digest.hexdigest()


class Collator:
    """Pads a batch to its longest row: input_ids, attention_mask and labels, int64 [B, T]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(token for token in candidates if token is not None)

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


def batches(
    examples: Sequence[Example], collator: Collator, size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The examples in order, `size` at a time."""
    for start in range(0, len(examples), size):
        yield collator(examples[start : start + size])


def load_data(
    path: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, eval_split: float
) -> Data:
    """Reads and tokenises `path`.

    A text file is cut into windows of seq_len tokens. A JSONL file has one example a line, cut at
    seq_len. The loss counts all of "text"; of "prompt" and "completion", the completion; of
    "messages", rendered by the tokenizer's chat template, those of the assistant.

    Args:
        path: UTF-8 text, or JSONL by its suffix.
        tokenizer: the model's.
        seq_len: most tokens in an example.
        eval_split: share of the examples to hold out, 0 to 0.5.

    Raises:
        CliError: the file is missing, empty, not UTF-8 or malformed, or gives too few examples.
    """
    text = _read(path)
    if Path(path).suffix.lower() in JSONL_SUFFIXES:
        examples = _jsonl_examples(path, text, tokenizer, seq_len)
        kind = "examples"
    else:
        examples = _windows(path, text, tokenizer, seq_len)
        kind = f"windows of {seq_len} tokens"
    held_out_count = max(1, round(eval_split * len(examples))) if eval_split else 0
    if held_out_count >= len(examples):
        raise CliError(
            f"--data: {path} gives {len(examples)} {kind}, too few to hold out "
            f"--eval-split {eval_split:g} of them; give more text, a shorter --seq-len or "
            "--eval-split 0"
        )
    order = list(range(len(examples)))
    random.Random(_SPLIT_SEED).shuffle(order)
    held_out = sorted(order[:held_out_count])
    train = sorted(order[held_out_count:])
    return Data(
        train=[examples[i] for i in train],
        held_out=[examples[i] for i in held_out],
        description=f"{Path(path).name}: {len(train)} {kind} to train on, {len(held_out)} held out",
    )


def _read(path: str) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CliError(f"--data: no such file: {path}") from None
    except IsADirectoryError:
        raise CliError(f"--data: a text or JSONL file is needed, {path} is a folder") from None
    except UnicodeDecodeError as error:
        raise CliError(f"--data: {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise CliError(f"--data: can't read {path}: {error.strerror}") from None
    if not text.strip():
        raise CliError(f"--data: {path} is empty")
    return text


# ---- text ------------------------------------------------------------------------------------


def _windows(
    path: str, text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> list[Example]:
    ids = _ids(tokenizer, text)
    # Drops a remainder shorter than half a window: a padded row costs as much as a full one.
    starts = [s for s in range(0, len(ids), seq_len) if len(ids) - s >= max(2, seq_len // 2)]
    if not starts:
        raise CliError(
            f"--data: {path} gives {len(ids)} tokens, too few for a window of --seq-len {seq_len}"
        )
    return [Example(ids[s : s + seq_len], ids[s : s + seq_len]) for s in starts]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    # verbose=False: the text may be longer than the model's window, it is cut afterwards.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


# ---- JSONL -----------------------------------------------------------------------------------


def _jsonl_examples(
    path: str, text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> list[Example]:
    examples = []
    # Only "\n" ends a line: JSON strings may hold the other characters at which splitlines() cuts.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--data: {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CliError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        ids, labels = _record(record, tokenizer, where)
        ids, labels = ids[:seq_len], labels[:seq_len]
        # Nothing predicts the first label. A prompt of seq_len tokens leaves nothing to learn.
        if any(label != IGNORED for label in labels[1:]):
            examples.append(Example(ids, labels))
    if not examples:
        raise CliError(
            f"--data: {path} gives no example with a token to learn within --seq-len {seq_len}"
        )
    return examples


def _record(
    record: Any, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    if isinstance(record, dict):
        if isinstance(record.get("messages"), list):
            return _messages(record["messages"], tokenizer, where)
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            prompt = _ids(tokenizer, record["prompt"], special=True)
            completion = _with_eos(_ids(tokenizer, record["completion"]), tokenizer)
            return prompt + completion, [IGNORED] * len(prompt) + completion
        if isinstance(record.get("text"), str):
            ids = _with_eos(_ids(tokenizer, record["text"], special=True), tokenizer)
            return ids, list(ids)
    got = json.dumps(record, ensure_ascii=False)
    got = got if len(got) <= 60 else got[:57] + "..."
    raise CliError(f"{where}: expected {_FORMS}, got {got}")


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _messages(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise CliError(f'{where}: "messages" needs a chat template, --model\'s tokenizer has none')
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    ):
        raise CliError(f'{where}: every message needs "role" and "content"')
    if not any(m["role"] == "assistant" for m in messages):
        raise CliError(f"{where}: no message of the assistant, so there is nothing to learn")

    def render(count: int, prompt: bool) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=prompt
            )
            return _ids(tokenizer, text)
        except Exception as error:
            # Templates are programs and can raise anything, mostly for roles in the wrong order.
            raise CliError(f"{where}: the chat template refuses it: {error}") from error

    ids = render(len(messages), prompt=False)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, upto = render(i, prompt=True), render(i + 1, prompt=False)
        # If a template rewrites earlier turns (to drop their reasoning, say), this turn's tokens
        # can't be located in the whole.
        if ids[: len(upto)] != upto or upto[: len(before)] != before:
            raise CliError(
                f"{where}: the chat template rewrites earlier turns, so the assistant's tokens "
                "can't be told apart; give prompt and completion instead"
            )
        labels[len(before) : len(upto)] = upto[len(before) :]
    return ids, labels
