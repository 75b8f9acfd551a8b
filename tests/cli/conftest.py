"""A tiny Llama with a tokenizer, made on the spot, and data for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the command line fine-tunes with Transformers")
pytest.importorskip("peft", reason="the command line fine-tunes with PEFT")
from tests.tiny import WORDS, save_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The work here is tiny: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand words with some order in them."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    order = torch.randint(len(WORDS), (3000,), generator=generator).tolist()
    path.write_text(" ".join(f"{WORDS[i]} {WORDS[(i + 1) % len(WORDS)]}" for i in order))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.save_model`'s."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture
def jsonl(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Writes records as a JSONL file and returns its path."""

    def write(*records: object) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
