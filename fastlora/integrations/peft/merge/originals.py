"""The 16-bit weights that a 4-bit model was made from, read one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .... import ops
from ....quant import QuantState
from ...keys import WEIGHT_DTYPES
from ...names import core_name
from ..names import named

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


class OriginalWeights:
    """Weights by the names of a model's layers.

    Args:
        source: a model, a state dict, or a folder with `*.safetensors`, of which only the headers
            are read until a weight is asked for.
        what: the argument that it was given as, for messages.

    Raises:
        TypeError: source is none of these.
        ValueError: the folder has no safetensors file.
    """

    def __init__(self, source: Source, what: str = "base") -> None:
        self._what = what
        self._files: dict[str, Path] = {}
        self._tensors: Mapping[str, Tensor] = {}
        if isinstance(source, nn.Module):
            self._tensors = dict(source.named_parameters())
        elif isinstance(source, Mapping):
            self._tensors = source
        elif isinstance(source, str | os.PathLike):
            self._files = _index(Path(source), what)
        else:
            raise TypeError(
                f"{what} must be a model, a state dict or a folder with safetensors files, "
                f"got {type(source).__name__}"
            )

    def key(self, layer: str) -> str:
        """The name of the weight of `layer` in these originals.

        Names may differ in their prefix: "model.layers.0.mlp.up_proj" finds
        "layers.0.mlp.up_proj.weight" and "base_model.model.model.layers.0.mlp.up_proj.weight"; and
        in where the words "model" and "language_model" stand, as those of models with vision do.

        Raises:
            ValueError: there is none, or more than one.
        """
        wanted, keys = f"{layer}.weight", self._files or self._tensors
        if wanted in keys:
            return wanted
        found = [key for key in keys if _ends_alike(key.replace(".base_layer.", "."), wanted)]
        if not found:
            found = [key for key in keys if core_name(key) == core_name(wanted)]
        if len(found) != 1:
            what = self._what
            raise ValueError(f"{what} must have one weight for layer {layer}, got {_some(found)}")
        return found[0]

    def check(self, layer: str, shape: Iterable[int]) -> None:
        """Raises ValueError unless the weight of `layer` is here, floating and of this shape."""
        key = self.key(layer)
        if key in self._files:
            with self._open(key) as file:
                part = file.get_slice(key)
                found, dtype = tuple(part.get_shape()), part.get_dtype()
        else:
            tensor = self._tensors[key]
            found, dtype = tuple(tensor.shape), named(tensor.dtype)
        if found != tuple(shape) or dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{self._what}: {key} must be a weight in 16 bits or more of shape {tuple(shape)}, "
                f"got {dtype} {found}"
            )

    def __getitem__(self, layer: str) -> Tensor:
        """The weight of `layer`; from a file, a fresh tensor on the CPU, decoded if in 4 bits."""
        key = self.key(layer)
        if key not in self._files:
            return self._tensors[key].detach()
        parts = [name for name in self._files if name.startswith(f"{key}.")]
        weight = self._read(key)
        if not parts:
            return weight
        state = QuantState.from_dict({n.removeprefix(f"{key}."): self._read(n) for n in parts})
        return ops.dequantize_4bit(weight, state, torch.float32)

    def _read(self, key: str) -> Tensor:
        with self._open(key) as file:
            weight: Tensor = file.get_tensor(key)
            return weight

    def _open(self, key: str) -> Any:
        from safetensors import safe_open

        return safe_open(self._files[key], framework="pt")


def _index(folder: Path, what: str) -> dict[str, Path]:
    """Tensor name -> file."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {k: folder / f for k, f in json.loads(index.read_text())["weight_map"].items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{what} must be a folder with *.safetensors files, got {folder}")
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except SafetensorError as error:
            raise ValueError(f"{what}: {path} can't be read: {error}") from error
    return found


def _ends_alike(one: str, other: str) -> bool:
    """True when the shorter of two dotted names ends the longer."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _some(names: list[str]) -> str:
    return "none" if not names else f"{len(names)}: {', '.join(names[:3])}"
