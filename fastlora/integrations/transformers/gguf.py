"""GGUF files: converted once, and kept in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ... import tuning
from ..keys import first_line
from .loading import load_model

StrPath = str | os.PathLike[str]
# Part of the cache key: raise it when a conversion would come out differently.
_CACHE_VERSION = 2


def is_gguf(path: StrPath) -> bool:
    """True if the file starts like a GGUF file."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def convert_gguf(
    path: StrPath, cache_dir: StrPath | None = None, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A folder with the GGUF file's weights in `dtype`, its config and its tokenizer.

    Reading a GGUF tokenizer takes half a minute, so the result is cached under the SHA-256 of the
    file. The folder is renamed into place when it is complete: an interrupted conversion leaves
    nothing behind.

    Args:
        path: the .gguf file.
        cache_dir: where the result goes; see `cache_folder`.
        dtype: bf16 is precise enough for 4- to 8-bit codes times their scales.

    Raises:
        ValueError: the file can't be read, or lacks weights of its model; cache_dir can't be
            written.
    """
    path = Path(path)
    target = gguf_cache_folder(path, cache_dir, dtype)
    if target.is_dir():
        return target
    _check_blocks(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=target.parent))
    except OSError as error:
        raise ValueError(
            f"cache_dir: can't write to {target.parent} ({error.strerror}), where {path.name} is "
            "converted; $FASTLORA_CACHE names another folder"
        ) from error
    options: dict[str, Any] = {"gguf_file": path.name}
    try:
        from transformers import GgufConfig

        # Transformers 5 would keep the weights packed, and can neither train nor save those.
        options["quantization_config"] = GgufConfig(gguf_file=path.name, dequantize=True)
    except ImportError:
        # Transformers 4 always unpacks.
        pass
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
        except Exception as error:  # whatever a wrong value makes the readers raise
            raise ValueError(f"{path} has no tokenizer: {first_line(error)}") from error
        tokenizer.save_pretrained(partial)
        load_model(path.parent, dtype=dtype, **options).save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            # Another process was faster. Its folder has the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_blocks(path: Path) -> None:
    """Checks that a file has tensors for the layers that its header promises.

    Transformers would build them all, of which a header can promise millions.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name.rpartition(".")[2]: field for name, field in reader.fields.items()}
        blocks = int(fields["block_count"].contents())
    except Exception as error:  # whatever a wrong value makes the reader raise
        raise ValueError(f"{path} can't be read as GGUF: {first_line(error)}") from error
    if blocks > len(reader.tensors):
        raise ValueError(f"{path}: expected {blocks} layers, got {len(reader.tensors)} tensors")


def gguf_cache_folder(
    path: StrPath, cache_dir: StrPath | None = None, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """The folder in which `convert_gguf` keeps the conversion of this file."""
    name = f"{file_sha256(path)}-{str(dtype).removeprefix('torch.')}-v{_CACHE_VERSION}"
    return cache_folder(cache_dir) / "gguf" / name


def cache_folder(cache_dir: StrPath | None = None) -> Path:
    """`cache_dir`, or the folder of everything that fastlora keeps, `tuning.cache_folder()`."""
    return tuning.cache_folder() if cache_dir is None else Path(cache_dir).expanduser()


def file_sha256(path: StrPath) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
