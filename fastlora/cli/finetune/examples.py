"""Records as token ids, and as labels for the loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ..errors import CliError
from .read import FORMS, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
# Of messages, beside role and content; a template that does not know them leaves them out.
_FIELDS = ("tool_calls", "reasoning_content")


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """The tokens of a text of any length, which may be cut afterwards."""
    # verbose=False: no warning of a text longer than the model's window.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def tokens_of(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels of a record, at their whole length.

    The loss counts all of "text"; of "prompt" and "completion", the completion; of "messages",
    rendered by the tokenizer's chat template, those of the assistant. "tools" beside "messages" go
    to the template.

    Raises:
        CliError: it has none of these forms, or the chat template refuses it.
    """
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
    ids = ids_of(tokenizer, text, special=not (bos and text.startswith(bos)))
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

    def text(messages: list[Any], prompt: bool = False, tools: Any = tools) -> str:
        rendered: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return rendered

    def render(count: int, prompt: bool = False) -> list[int]:
        return ids_of(tokenizer, text(messages[:count], prompt))

    try:
        ids = render(len(messages))
        whole = text(messages)
        lost = ["tools"] if tools and whole == text(messages, tools=None) else []
        lost += [
            field
            for field in _FIELDS
            if any(message.get(field) for message in messages)
            and not _differs(whole, text, _without(field, messages))
        ]
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
    if lost:
        raise CliError(f'{where}: the chat template of --model has no place for "{lost[0]}"')
    return ids, labels


def _differs(whole: str, render: Callable[[list[Any]], str], messages: list[Any]) -> bool:
    """Whether a template renders something else of `messages`, or misses what it looks for."""
    try:
        return render(messages) != whole
    except Exception:  # templates are programs and can raise anything
        return True


def _without(field: str, messages: list[Any]) -> list[Any]:
    """The messages without a field, and a content where they had none beside it."""
    return [
        {"content": "", **{k: v for k, v in message.items() if k != field}} for message in messages
    ]


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
        return _after(render(1, prompt=True)[len(upto) :], upto), upto
    before = render(i)
    start = _common(render(i, prompt=True), upto)
    return (start if start >= len(before) else None), upto


def _after(header: list[int], upto: list[int]) -> int:
    """Where the longest beginning of `header` that is in `upto` ends there."""
    for length in range(len(header), 0, -1):
        for start in range(len(upto) - length + 1):
            if upto[start : start + length] == header[:length]:
                return start + length
    return 0


def _shortened(record: Any) -> str:
    text = json.dumps(record, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
