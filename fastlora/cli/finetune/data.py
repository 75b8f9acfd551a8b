"""A data file as training examples: token ids, and labels for the loss."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CliError
from .read import FORMS, Record, read

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
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


@dataclass
class Losses:
    """What `--seq-len` takes from the examples."""

    left_out: int = 0  # nothing to learn within it
    cut: int = 0

    def __str__(self) -> str:
        parts = [f"{self.cut} cut"] if self.cut else []
        if self.left_out:
            parts.append(f"{self.left_out} left out, whose prompt alone is as long")
        return f"; by --seq-len {', '.join(parts)}" if parts else ""


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

    A text is cut into windows of seq_len tokens, a record at seq_len. The loss counts all of
    "text"; of "prompt" and "completion", the completion; of "messages", rendered by the tokenizer's
    chat template, those of the assistant. "tools" beside "messages" go to the template.

    Args:
        path: see `read.read`.
        tokenizer: the model's.
        seq_len: most tokens in an example.
        eval_split: share of the examples to hold out, 0 to 0.5.

    Raises:
        CliError: the file is missing, empty, not UTF-8 or malformed, or gives too few examples.
    """
    content, losses = read(path), Losses()
    if isinstance(content, str):
        examples = _windows(path, content, tokenizer, seq_len)
        kind = f"windows of {seq_len} tokens"
    else:
        examples = _examples(path, content, tokenizer, seq_len, losses)
        kind = "examples"
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
    counts = f"{len(train)} {kind} to train on, {len(held_out)} held out"
    return Data(
        train=[examples[i] for i in train],
        held_out=[examples[i] for i in held_out],
        description=f"{Path(path).name}: {counts}{losses}",
    )


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


# ---- records ---------------------------------------------------------------------------------


def _examples(
    path: str,
    records: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    losses: Losses,
) -> list[Example]:
    examples = []
    for record in records:
        ids, labels = _tokens(record, tokenizer)
        losses.cut += len(ids) > seq_len
        ids, labels = ids[:seq_len], labels[:seq_len]
        # Nothing predicts the first label. A prompt of seq_len tokens leaves nothing to learn.
        if any(label != IGNORED for label in labels[1:]):
            examples.append(Example(ids, labels))
        else:
            losses.left_out += 1
            losses.cut -= 1
    if not examples:
        raise CliError(
            f"--data: {path} gives no example with a token to learn within --seq-len {seq_len}"
        )
    return examples


def _tokens(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    where, value = record
    if isinstance(value, dict):
        if isinstance(value.get("messages"), list):
            return _messages(value["messages"], value.get("tools"), tokenizer, where)
        prompt, completion = value.get("prompt"), value.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            return _completion(prompt, completion, tokenizer)
        if isinstance(value.get("text"), str):
            ids = _with_eos(_document(tokenizer, value["text"]), tokenizer)
            return ids, list(ids)
    raise CliError(f"{where}: expected {FORMS}, got {_shortened(value)}")


def _completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Both as one text: a tokenizer that is given a completion alone may put a space before it."""
    ids = _with_eos(_document(tokenizer, prompt + completion), tokenizer)
    masked = _common(_document(tokenizer, prompt), ids)
    return ids, [IGNORED] * masked + ids[masked:]


def _document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a whole text, which begins with one BOS at most and has no EOS added."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = _ids(tokenizer, text, special=not (bos and text.startswith(bos)))
    if ids[-1:] == [tokenizer.eos_token_id] and not (eos and text.endswith(eos)):
        return ids[:-1]
    return ids


def _common(some: list[int], others: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    alike = (a == b for a, b in zip(some, others, strict=False))
    return sum(1 for _ in takewhile(bool, alike))


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


# ---- conversations ---------------------------------------------------------------------------


def _messages(
    messages: list[Any], tools: Any, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise CliError(f'{where}: "messages" needs a chat template, --model\'s tokenizer has none')
    if not all(_is_message(m) for m in messages):
        raise CliError(f'{where}: every message needs "role" and "content" or "tool_calls"')
    if not any(m["role"] == "assistant" for m in messages):
        raise CliError(f"{where}: no message of the assistant, so there is nothing to learn")

    def render(count: int, prompt: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages[:count], tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return _ids(tokenizer, text)

    try:
        ids = render(len(messages))
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans = [_turn(render, i) for i in turns]
    except Exception as error:
        # Templates are programs and can raise anything, mostly for roles in the wrong order.
        raise CliError(f"{where}: the chat template refuses it: {error}") from error
    labels = [IGNORED] * len(ids)
    for start, upto in spans:
        # If a template rewrites earlier turns (to drop their reasoning, say), this turn's tokens
        # can't be located in the whole.
        if start is None or ids[: len(upto)] != upto:
            raise CliError(
                f"{where}: the chat template rewrites earlier turns, so the assistant's tokens "
                "can't be told apart; give prompt and completion instead"
            )
        labels[start : len(upto)] = upto[start:]
    return ids, labels


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return "content" in message or bool(message.get("tool_calls"))


def _turn(render: Callable[..., list[int]], i: int) -> tuple[int | None, list[int]]:
    """Where what the assistant says in message i begins, and the tokens up to its end.

    It begins after the generation prompt, as far as that is in the conversation: some open a block
    of reasoning that the message doesn't have. None: the message changes what is before it.
    """
    upto = render(i + 1)
    if i == 0:  # templates render no empty conversation: the prompt is that for the next turn
        header = render(1, prompt=True)[len(upto) :]
        return _common(header, upto), upto
    before = render(i)
    start = _common(render(i, prompt=True), upto)
    return (start if start >= len(before) else None), upto


def _shortened(record: Any) -> str:
    text = json.dumps(record, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
