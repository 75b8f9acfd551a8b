"""Data files: what their content says they are, what of it is learned, and what is refused."""

from __future__ import annotations

import datetime
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastlora.cli.errors import CliError
from fastlora.cli.finetune.data import load_data
from fastlora.cli.finetune.examples import IGNORED
from fastlora.cli.finetune.read import read

RECORDS = [
    {"prompt": "the cat", "completion": " sat, on"},
    {"prompt": 'a "red"\nmat', "completion": " and"},
]
LINES = "\n".join(map(json.dumps, RECORDS)) + "\n"
CSV = 'prompt,completion\nthe cat," sat, on"\n"a ""red""\nmat"," and"\n'
FILES: dict[str, tuple[str, bytes]] = {
    "JSONL": ("a.jsonl", LINES.encode()),
    "JSONL named .txt": ("a.txt", LINES.encode()),
    "JSONL named .json": ("a.json", LINES.encode()),
    "JSONL without a suffix": ("a", LINES.encode()),
    "JSONL after a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "JSONL in gzip": ("a.jsonl.gz", gzip.compress(LINES.encode())),
    "an array": ("a.json", json.dumps(RECORDS).encode()),
    "an array over several lines": ("a.json", json.dumps(RECORDS, indent=1).encode()),
    "an array named .txt": ("a.txt", json.dumps(RECORDS, indent=1).encode()),
    "CSV": ("a.csv", CSV.encode()),
    "CSV in gzip": ("a.csv.gz", gzip.compress(CSV.encode())),
    "CSV named .txt": ("a.txt", CSV.encode()),
    "TSV": ("a.tsv", b'prompt\tcompletion\nthe cat\t sat, on\n"a ""red""\nmat"\t and\n'),
}


def columnar(path: Path, write: Callable[[pa.Table, Any], None]) -> bytes:
    table = pa.Table.from_pylist(RECORDS)
    with path.open("wb") as file:
        write(table, file)
    return path.read_bytes()


def arrow(table: pa.Table, file: Any) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", [*FILES, "Parquet", "Arrow"])
def test_the_content_decides(name: str, tmp_path: Path) -> None:
    if name in FILES:
        file, content = FILES[name]
    else:
        file, content = (
            "a.bin",
            columnar(tmp_path / "made", parquet.write_table if name == "Parquet" else arrow),
        )
    path = tmp_path / file
    path.write_bytes(content)
    records = read(str(path))
    assert [record.value for record in records] == RECORDS
    assert all(str(path) in record.where for record in records)


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat, and the dog ran.\nprompt,completion\n",
        "text\nabout a cat\n",
        "[1] Cats. A history, in two volumes.\n",
        "{ braces } in prose\n",
        "{} is what format() fills in.\n",
    ],
)
def test_prose_stays_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert read(str(path)) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"9" * 5000 + b"}\n", "line 2: not JSON that"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000, "line 2: .*nested too deep"),
        ("a.jsonl", b"the cat sat\n", r"line 1: not JSON \(Expecting value at column 1\)"),
        ("a.json", b'[\n{"text": "a"},\n{"text" "b"}\n]', "not JSON .* at line 3, column 9"),
        ("a.csv", b"question,answer\na,b\n", "the columns prompt and completion, .* got question"),
        ("a.csv", b"prompt,completion\na,b\nc\n", "line 3: expected 2 columns"),
        ("a.csv", b'prompt,completion\na,"b\n', "after line 1: unexpected end of data"),
        ("a.csv", b'messages,id\n"[{",1\n', "line 2: not JSON"),
        ("a.csv", b"prompt,completion\n", "has no record"),
        ("a.json", b"[]", "has no record"),
        ("a.gz", b"\x1f\x8bnothing", "can't read"),
        ("a.parquet", b"PAR1nothing", "can't read"),
        ("a.arrow", b"ARROW1nothing", "can't read"),
    ],
)
def test_malformed_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CliError, match=message) as error:
        read(str(path))
    assert str(error.value).startswith(f"--data: {path}") or "can't read" in message


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is no regular file"),
        (tmp_path / "none", "no such file"),
    ):
        with pytest.raises(CliError, match=message):
            read(str(path))


# ---- what is learned ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def learned(tokenizer: PreTrainedTokenizerBase, path: Path, seq_len: int = 64) -> str:
    (example,) = load_data([str(path)], tokenizer, seq_len, 0.0).train
    kept = [label for label in example.labels if label != IGNORED]
    return " ".join(tokenizer.convert_ids_to_tokens(kept))


def test_conversations_that_the_assistant_begins(
    jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [("assistant", "the cat"), ("user", "a mat"), ("assistant", "sat")]
    path = jsonl({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert learned(tokenizer, path) == "the cat <|end|> sat <|end|>"


def test_a_default_system_message_is_not_learned(
    jsonl: Callable[..., Path], tiny_model: Path
) -> None:
    """Some templates put one before the first message, whoever that is from."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "<|user|> the old house <|end|> " + str(tokenizer.chat_template)
    turns = [("assistant", "the cat"), ("user", "a mat"), ("assistant", "sat")]
    path = jsonl({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert learned(tokenizer, path) == "the cat <|end|> sat <|end|>"


def test_a_prompt_that_opens_a_block_of_reasoning(
    jsonl: Callable[..., Path], tiny_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    opened = "<|assistant|> green {% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|> {% endif %}", opened)
    turns = [("user", "the cat"), ("assistant", "sat on")]
    path = jsonl({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert learned(tokenizer, path) == "sat on <|end|>"


def test_tools_reach_the_template(jsonl: Callable[..., Path], tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}<|user|> {{ tool.function.name }} {% endfor %}"
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content or m.tool_calls[0].function.name }}"
        "<|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    call = {"type": "function", "function": {"name": "dog", "arguments": {}}}
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "tool_calls": [call]},
    ]
    tool = {"type": "function", "function": {"name": "house", "parameters": {}}}
    path = jsonl({"messages": messages, "tools": [tool]})
    (example,) = load_data([str(path)], tokenizer, 64, 0.0).train
    text = " ".join(tokenizer.convert_ids_to_tokens(example.input_ids))
    assert text.startswith("<|user|> house <|user|> the cat")
    assert learned(tokenizer, path) == "dog <|end|>"


@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content"])
def test_fields_that_the_template_leaves_out(
    field: str, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    call = {"type": "function", "function": {"name": "dog", "arguments": {}}}
    value = [call] if field == "tool_calls" else "red"
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat", field: value},
    ]
    with pytest.raises(CliError, match=f'has no place for "{field}"'):
        load_data([str(jsonl({"messages": messages}))], tokenizer, 64, 0.0)


def test_columns_beside_those_that_count(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    when = [datetime.datetime(2026, 1, 1)] * 2
    parquet.write_table(pa.table({"text": ["the cat", "a mat"], "when": when}), path)
    assert len(load_data([str(path)], tokenizer, 64, 0.0).train) == 2
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,prompt\na,b,c\n")
    with pytest.raises(CliError, match="has the column prompt twice"):
        read(str(path))


def test_tools_that_the_template_leaves_out(
    jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    tool = {"type": "function", "function": {"name": "house", "parameters": {}}}
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    path = jsonl({"messages": messages, "tools": [tool]})
    with pytest.raises(CliError, match='line 1: the chat template of --model has no place for "to'):
        load_data([str(path)], tokenizer, 64, 0.0)
    path = jsonl({"messages": messages, "tools": []})
    assert learned(tokenizer, path) == "sat <|end|>"


@pytest.fixture(scope="module")
def spaced() -> PreTrainedTokenizerBase:
    """Writes a mark before each word as SentencePiece does, a BOS first and an EOS at the end."""
    words = ["<s>", "</s>", "<unk>", "▁the", "▁cat", "▁sat", "▁on", "s"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)


@pytest.mark.parametrize("begins", ["", "<s> "])
def test_prompt_and_completion_are_one_text(
    begins: str, jsonl: Callable[..., Path], spaced: PreTrainedTokenizerBase
) -> None:
    path = jsonl({"prompt": f"{begins}the cat", "completion": " sat on"})
    (example,) = load_data([str(path)], spaced, 64, 0.0).train
    tokens = spaced.convert_ids_to_tokens(example.input_ids)
    assert tokens == ["<s>", "▁the", "▁cat", "▁sat", "▁on", "</s>"]
    assert learned(spaced, path) == "▁sat ▁on </s>"
