"""Adapters from files: what is loaded is compared with what the model has."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.utils.save_and_load import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from ..keys import WEIGHT_DTYPES, check_keys, first_line
from ..names import plain_name
from .names import named

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What PEFT writes beside the fields of a config.
_OTHER_FIELDS = {"auto_mapping", "peft_version", "base_model_name_or_path"}
# Values of peft_type whose layers are LoRA's.
KINDS = ("LORA", "ADALORA")


def adapter_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """The config of the LoRA adapter that PEFT saved in `folder`, whose weights are there, too.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: the config can't be read, or is of another kind of adapter.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"expected a folder with {CONFIG}, got {folder}")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise FileNotFoundError(f"{folder} has {CONFIG}, but no {' or '.join(WEIGHTS)}")
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        kind = fields["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no adapter's config: {first_line(error)}") from error
    if kind not in KINDS:
        raise ValueError(f"{path}: peft_type must be {' or '.join(KINDS)}, got {kind}")
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever a wrong value makes PEFT raise
        raise ValueError(f"{path} can't be read: {first_line(error)}") from error
    names = {field.name for field in dataclasses.fields(config)} | _OTHER_FIELDS
    if unknown := sorted(name for name in fields.keys() - names if fields[name]):
        raise ValueError(
            f"{path} has {', '.join(unknown)}, of which PEFT {peft.__version__} knows nothing"
        )
    return config


def trained_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of an adapter's file that aren't LoRA's: those of `modules_to_save`, by the names
    that they have in the model.

    Raises:
        ValueError: the weights can't be read.
    """
    weights = _weights(folder)
    return {plain_name(key): t for key, t in weights.items() if "lora_" not in key}


def _weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except (
        SafetensorError,
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
    ) as error:
        raise ValueError(f"the weights in {folder} can't be read: {first_line(error)}") from error
    for key, tensor in weights.items():
        if named(tensor.dtype) not in WEIGHT_DTYPES:
            raise ValueError(
                f"{folder}: {key} must be a float of 16 bits or more, got {tensor.dtype}"
            )
    return weights


def check_saved(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Checks that a folder holds the model's adapter: its rank and factor, and its tensors, finite,
    and no others.

    Raises:
        FileNotFoundError, ValueError: it does not.
    """
    saved, active = adapter_config(folder), model.peft_config["default"]
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        found, wanted = getattr(saved, name), getattr(active, name)
        if found != wanted:
            raise ValueError(f"{folder}: {name} must be {wanted}, got {found}")
    weights, own = _weights(folder), get_peft_model_state_dict(model)
    check_keys(folder, own.keys() - weights.keys(), weights.keys() - own.keys())
    for key, tensor in weights.items():
        if tensor.shape != own[key].shape:
            shapes = [list(t.shape) for t in (own[key], tensor)]
            raise ValueError(f"{folder}: {key} must be {shapes[0]}, got {shapes[1]}")
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {key} must be finite, got inf or NaN")


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """`model` with the LoRA adapter in `folder`, each of whose tensors has its place in it.

    PEFT alone warns where tensors are missing, and says nothing of those that fit nowhere.

    Args:
        model: the base model.
        folder: as PEFT saves an adapter.

    Raises:
        FileNotFoundError, ValueError: as `adapter_config`; the weights can't be read; the adapter
            lacks tensors, has others than the model has a place for, or of another shape. The model
            may have layers of the adapter then, and is of no further use.
    """
    config, weights = adapter_config(folder), _weights(folder)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
        # Once more, since from_pretrained keeps to itself what fitted nowhere.
        result = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # whatever a wrong value in the config makes PEFT raise
        if isinstance(error, KeyError):  # a trained copy of a module
            check_keys(folder, [_short(str(error.args[0]))], [])
        # PyTorch's message has a line for each tensor.
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:4])
        what = type(error).__name__
        raise ValueError(f"{folder} doesn't fit the model: {reason or what}") from error
    missing = [_short(key) for key in result.missing_keys if ".default" in key]
    check_keys(folder, missing, [_short(key) for key in result.unexpected_keys])
    return adapted


def _short(key: str) -> str:
    """A tensor's name as in the adapter's file, without PEFT's prefix."""
    return plain_name(key).replace(".default", "")
