"""Text and JSONL files as examples: windows, masks, the held-out split, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastlora.cli.errors import CliError
from fastlora.cli.finetune.data import (
    Collator,
    Data,
    Example,
    batches,
    check_ids,
    load_data,
    split_weight,
)
from fastlora.cli.finetune.examples import IGNORED
from fastlora.cli.finetune.preview import rendered


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens([i for i in ids if i != IGNORED]))


def only_example(path: Path, tokenizer: PreTrainedTokenizerBase, seq_len: int = 64) -> Example:
    data = load_data([str(path)], tokenizer, seq_len, 0.0)
    assert len(data.train) == 1
    return data.train[0]


def test_text_is_cut_into_windows(text_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_data([str(text_file)], tokenizer, 64, 0.05)
    everything = tokenizer(text_file.read_text())["input_ids"]
    whole = len(everything) // 64
    assert len(data.train) + len(data.held_out) == whole + (len(everything) % 64 >= 32)
    assert len(data.held_out) == round(0.05 * (len(data.train) + len(data.held_out)))
    assert all(e.labels == e.input_ids for e in data.train)
    seen = sorted(e.input_ids for e in (*data.train, *data.held_out))
    assert seen == sorted(everything[s : s + 64] for s in range(0, len(seen) * 64, 64))


def test_the_split_is_always_the_same(text_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = (load_data([str(text_file)], tokenizer, 64, 0.1) for _ in range(2))
    assert one.digest() == two.digest()
    assert load_data([str(text_file)], tokenizer, 64, 0.2).digest() != one.digest()


def test_text_record(jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase) -> None:
    example = only_example(jsonl({"text": "the cat sat"}), tokenizer)
    assert words(tokenizer, example.input_ids) == "the cat sat <eos>"
    assert example.labels == example.input_ids


def test_the_prompt_is_masked(
    jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    example = only_example(jsonl({"prompt": "the cat", "completion": " sat on"}), tokenizer)
    assert words(tokenizer, example.input_ids) == "the cat sat on <eos>"
    assert example.labels[:2] == [IGNORED, IGNORED]
    assert words(tokenizer, example.labels) == "sat on <eos>"


def test_the_assistant_alone_is_learned(
    jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "a mat"},
        {"role": "assistant", "content": "and run"},
    ]
    example = only_example(jsonl({"messages": messages}), tokenizer)
    assert words(tokenizer, example.input_ids) == (
        "<|user|> the cat <|end|> <|assistant|> sat on <|end|> "
        "<|user|> a mat <|end|> <|assistant|> and run <|end|>"
    )
    assert words(tokenizer, example.labels) == "sat on <|end|> and run <|end|>"
    assert all(
        label in (IGNORED, token)
        for label, token in zip(example.labels, example.input_ids, strict=True)
    )


def test_a_template_that_rewrites_turns_is_refused(
    jsonl: Callable[..., Path], tiny_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] if loop.last else 'old' }} {{ m['content'] }} "
        "{% endfor %}"
    )
    messages = [
        {"role": role, "content": "the cat"} for role in ("user", "assistant", "user", "assistant")
    ]
    with pytest.raises(CliError, match="line 1: the chat template rewrites earlier turns"):
        load_data([str(jsonl({"messages": messages}))], tokenizer, 64, 0.0)


def test_examples_are_cut_at_seq_len_and_dropped_without_labels(
    jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    long_prompt = {"prompt": "the cat sat on a mat", "completion": " and"}
    path = jsonl(long_prompt, {"text": "the cat sat on a mat and saw"})
    example = only_example(path, tokenizer, seq_len=6)
    assert words(tokenizer, example.input_ids) == "the cat sat on a mat"
    with pytest.raises(CliError, match="no example with a token to learn within --seq-len 6"):
        load_data([str(jsonl(long_prompt))], tokenizer, 6, 0.0)


def test_batches_are_padded(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8]), Example([9, 9], [9, 9])]
    first, second = batches(examples, Collator(tokenizer, len(tokenizer)), 2)
    pad = tokenizer.pad_token_id
    assert first["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert second["input_ids"].tolist() == [[9, 9]]


def test_a_padding_token_without_a_row_is_not_taken(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = "<pad>"  # a new one: its id is beyond the model's embedding
    rows = tokenizer.convert_tokens_to_ids("<pad>")
    assert Collator(tokenizer, rows + 1).pad_id == rows
    assert Collator(tokenizer, rows).pad_id == tokenizer.eos_token_id


def test_another_models_tokenizer_is_refused(
    text_file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load_data([str(text_file)], tokenizer, 64, 0.05)
    check_ids(data, len(tokenizer))
    with pytest.raises(CliError, match=r"--model: its tokenizer gives token \d+, its embedding"):
        check_ids(data, 10)


def test_several_files_with_weights(
    jsonl: Callable[..., Path], text_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    records = jsonl(*({"text": f"the cat {word}"} for word in ("sat", "on", "a", "mat")))
    whole = load_data([str(records), str(text_file)], tokenizer, 64, 0.25)
    once, text = whole.sources
    assert (len(once.train), len(once.held_out), once.weight) == (3, 1, 1.0)
    assert whole.train == once.train + text.train
    assert whole.held_out == once.held_out + text.held_out

    def weighted(weight: str) -> list[Example]:
        data = load_data([f"{records}:{weight}", str(text_file)], tokenizer, 64, 0.25)
        assert data.held_out == whole.held_out and data.sources[1] == text
        return data.sources[0].train

    assert weighted("2") == once.train * 2
    two = weighted("0.7")
    assert len(two) == 2 and all(example in once.train for example in two)
    assert two == weighted("0.7")
    assert weighted("1.7") == once.train + two
    for weight in ("0", "-1", "nan", "inf", "1e7"):
        with pytest.raises(CliError, match=f"the weight of .* must be above 0 .*, got {weight}"):
            weighted(weight)
    with pytest.raises(CliError, match=r"gives 3 examples, of which 0\.1 is none"):
        weighted("0.1")
    odd = tmp_path / "a:2"
    odd.write_text("the cat")
    assert split_weight(str(odd)) == (str(odd), 1.0)
    assert split_weight("a:b") == ("a:b", 1.0)


def test_counts(jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase) -> None:
    long = {"prompt": "the cat sat on a mat and saw", "completion": " an old red dog"}
    path = jsonl({"text": "the cat"}, long, {"text": "the cat sat on a mat and saw an old dog"})
    for seq_len, examples, left_out, cut in ((32, 3, 0, 0), (10, 3, 0, 2), (8, 2, 1, 1)):
        (source,) = load_data([str(path)], tokenizer, seq_len, 0.0).sources
        assert (len(source.train), source.left_out, source.cut) == (examples, left_out, cut)
    assert [example.learned for example in source.train] == [2, 7]


def test_the_rest_of_a_text_is_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.txt"
    for words, examples, left_out in ((16, 1, 0), (17, 1, 1), (23, 1, 1), (24, 2, 0)):
        path.write_text("cat " * words)
        (source,) = load_data([str(path)], tokenizer, 16, 0.0).sources
        assert (len(source.train), source.left_out) == (examples, left_out), words


def test_an_example_shows_what_is_learned(
    jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    example = only_example(jsonl({"prompt": "the cat", "completion": " sat on"}), tokenizer)
    assert rendered(example, tokenizer).plain == "the cat«sat on <eos>»"
    long = only_example(jsonl({"text": "the cat " * 100}), tokenizer, seq_len=512)
    assert 220 < len(rendered(long, tokenizer).plain) < 240
    assert Data([]).train == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text \\(byte 0\\)"),
        ("a.txt", b"the cat", "gives 2 tokens, too few for a window of --seq-len 16"),
        ("a.txt", b"the cat sat on a mat and saw an old", "too few to hold out --eval-split 0.05"),
        ("a.jsonl", b'{"text": "the cat"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b'\n{"txt": "the cat"}\n', 'line 2: expected {"text": ...}.* got {"txt"'),
        ("a.jsonl", b'["the cat"]\n', "record 1: expected"),
        ("a.jsonl", b'{"prompt": "the cat"}\n', "line 1: expected"),
        ("a.jsonl", b'{"messages": ["hi"]}\n', 'line 1: every message needs "role" and "content"'),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "the cat"}]}\n',
            "line 1: no message of the assistant",
        ),
    ],
)
def test_what_is_wrong_with_the_file_is_said(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CliError, match=message) as error:
        load_data([str(path)], tokenizer, 16, 0.05)
    assert str(error.value).startswith("--data: ")


def test_messages_need_a_template(jsonl: Callable[..., Path], tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    path = jsonl({"messages": [{"role": "assistant", "content": "the cat"}]})
    with pytest.raises(CliError, match="--model's tokenizer has none"):
        load_data([str(path)], tokenizer, 16, 0.0)


def test_a_folder_is_no_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CliError, match="is a folder"):
        load_data([str(tmp_path)], tokenizer, 16, 0.0)
