"""The cache of `fastlora tune`: the best measured choice for an op, a shape and a device.

One JSON file a device in `cache_folder()`:

    {"device": "...", "fastlora": "0.1.0", "choices": {"<op> | <shape>": {"tile": 64, ...}}}

A choice is a flat dictionary whose meaning belongs to the backend that stores it. Nothing here
measures, and only `store` stores.

    device = device_key("NVIDIA H100", "driver 580.65", "triton 3.9.0")
    store(device, "lora_linear_fwd", "bf16 M4096 N4096 K4096 R16", {"way": "fused", "BM": 128})
    lookup(device, "lora_linear_fwd", "bf16 M4096 N4096 K4096 R16")
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from .version import __version__

Choice = Mapping[str, int | float | str]
_Choices = dict[str, dict[str, int | float | str]]


def device_key(*facts: str) -> str:
    """Everything a measured time depends on, in one line: device, driver, compiler, fastlora."""
    return ", ".join((*facts, f"fastlora {__version__}"))


def size_class(size: int) -> int:
    """The power of two that is not below `size`: tokens of one class share a choice."""
    return 1 << max(0, size - 1).bit_length()


def cache_folder() -> Path:
    """`$FASTLORA_CACHE`, else `$XDG_CACHE_HOME/fastlora`, else `~/.cache/fastlora`."""
    if chosen := os.environ.get("FASTLORA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlora"


def cache_file(device: str) -> Path:
    """The file with the choices of `device`."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:60]
    return cache_folder() / f"{name}-{hashlib.sha256(device.encode()).hexdigest()[:12]}.json"


def lookup(device: str, op: str, shape: str) -> Choice | None:
    """The choice for this device, op and shape, or None.

    A file that can't be read counts as empty. It is read once in a process, and after a `store`.

    Args:
        device: from `device_key`.
        op: the op's name.
        shape: dtypes and sizes, as the backend writes them.
    """
    return _choices_of(device, os.environ.get("FASTLORA_CACHE", "")).get(f"{op} | {shape}")


def store(device: str, op: str, shape: str, choice: Choice | None) -> Path:
    """Keeps `choice`, in place of an older one; None forgets that one. Returns the file.

    Processes that store at the same time wait for each other, and a reader finds the old file or
    the new one, never a part.
    """
    import fcntl  # POSIX; reading does without

    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        choices = _read(path, device)
        choices.pop(f"{op} | {shape}", None)
        if choice is not None:
            choices[f"{op} | {shape}"] = dict(choice)
        content = {"device": device, "fastlora": __version__, "choices": choices}
        text = json.dumps(content, indent=1, sort_keys=True)
        # The lock keeps other writers out; open() gives the file the user's usual permissions.
        part = path.with_suffix(".tmp")
        part.write_text(text)
        os.replace(part, path)
        _choices_of.cache_clear()
    return path


@functools.lru_cache(maxsize=64)
def _choices_of(device: str, folder: str) -> _Choices:
    """Every op asks: the file is looked for once for each value of FASTLORA_CACHE."""
    try:
        return _read(cache_file(device), device)
    except RuntimeError:  # there is no home directory
        return {}


def _read(path: Path, device: str) -> _Choices:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    # The name has only a part of the device's hash.
    if not isinstance(content, dict) or content.get("device") != device:
        return {}
    choices = content.get("choices")
    if not isinstance(choices, dict):
        return {}
    return {name: choice for name, choice in choices.items() if isinstance(choice, dict)}
