"""Models from folders: what is loaded is compared with what the model has."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ..keys import WEIGHT_DTYPES, check_keys, first_line
from ..names import core_name

# Constants that files of old versions of Transformers hold, and models make themselves.
_OLD_BUFFERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq", "position_ids")
# Classes of models by PEFT's `task_type`.
_OF_TASK: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


def load_config(folder: str | os.PathLike[str]) -> Any:
    """The config of a model's folder. Code that comes with a model is never run.

    Raises:
        ValueError: it can't be read, or needs code of its own.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a wrong value makes it raise
        raise ValueError(f"the config in {folder} can't be used: {first_line(error)}") from error


def stored_quantisation(folder: str | os.PathLike[str]) -> Any:
    """What a folder's config says of a quantisation of its weights; None where they are plain.

    Raises:
        ValueError: as `load_config`.
    """
    return getattr(load_config(folder), "quantization_config", None)


def model_class(folder: str | os.PathLike[str], task: str | None = None) -> Any:
    """The class to load a folder's model by: that of a task, or of the folder's `architectures`.

    Args:
        folder: of a model.
        task: PEFT's `task_type` of an adapter. "CAUSAL_LM", "FEATURE_EXTRACTION" and None leave it
            to the folder.
    """
    if task in _OF_TASK:
        return _OF_TASK[task]
    names = load_config(folder).architectures or ()
    name = names[0] if names and isinstance(names[0], str) else ""
    return getattr(transformers, name, AutoModelForCausalLM) if name else AutoModelForCausalLM


def empty_model(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """The model of a folder without memory for its weights.

    Raises:
        ValueError: the config can't be read, or is of no model that Transformers knows.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"expected a folder with config.json, got {folder}")
    config, kind = load_config(folder), model_class(folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = (
                kind(config)
                if isinstance(kind, type) and issubclass(kind, PreTrainedModel)
                else kind.from_config(config)
            )
    except Exception as error:  # whatever a wrong value in the config makes it raise
        raise ValueError(f"no model can be made of {folder}: {first_line(error)}") from error
    return model


def load_model(
    folder: str | os.PathLike[str],
    kind: Any = AutoModelForCausalLM,
    given: Collection[str] = (),
    **options: Any,
) -> PreTrainedModel:
    """`kind.from_pretrained(folder, **options)`, each of whose weights is in the folder.

    Transformers alone draws missing weights at random, and says so in its log.

    Args:
        folder: of a model.
        kind: a class of Transformers, or one of its `AutoModel...`.
        given: names of weights that come from elsewhere, as those of a classifier's head from its
            adapter. Then the folder may have another head, which is left out.
        options: as `from_pretrained` takes them.

    Raises:
        ValueError: the folder lacks weights, has others than the model, or of another shape or in
            codes, can't be read, or also holds an adapter.
    """
    source = Path(folder, options.get("gguf_file", ""))
    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter beside the model, which Transformers would load with it; "
            "give each a folder of its own"
        )
    try:
        model, found = kind.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # whatever a wrong value in a config or a header makes it raise
        raise ValueError(f"the model in {source} can't be loaded: {first_line(error)}") from error
    if found["error_msgs"]:
        raise ValueError(f"the model in {source} can't be loaded: {found['error_msgs'][0]}")
    missing = [name for name in found["missing_keys"] if name not in given]
    mismatched = [each for each in sorted(found["mismatched_keys"]) if each[0] not in given]
    unexpected = [n for n in found["unexpected_keys"] if not n.endswith(_OLD_BUFFERS)]
    if given:
        body = f"{model.base_model_prefix}."
        unexpected = [name for name in unexpected if name.startswith(body)]
    if mismatched:
        name, stored, wanted = mismatched[0]
        more = f", and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        raise ValueError(
            f"{source} doesn't fit the model: "
            f"{name} must be {list(wanted)}, got {list(stored)}{more}"
        )
    check_keys(source, missing, unexpected)
    if "gguf_file" not in options:
        _check_dtypes(folder, model)
    loaded: PreTrainedModel = model
    return loaded


def _check_dtypes(folder: str | os.PathLike[str], model: Any) -> None:
    """Checks that no weight is stored in 8 bits whose scales Transformers knows nothing of.

    It would cast the codes to the model's dtype.
    """
    if stored_quantisation(folder) is not None:
        return
    names = {core_name(name) for name, _ in model.named_parameters()}
    for path, key, dtype in _stored_dtypes(Path(folder)):
        is_weight = key.endswith(".weight") or core_name(key) in names
        if is_weight and dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{path}: {key} must be a float of 16 bits or more, got {dtype}; "
                "the config says nothing of a quantisation"
            )


def _stored_dtypes(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """File, name and dtype of every tensor that Transformers reads from a folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        files = {name}
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
        found = sorted(path for file in files if (path := folder / file).is_file())
        for path in found:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118, it is no mapping
                        yield path, key, file.get_slice(key).get_dtype()
            else:
                for key, tensor in torch.load(path, mmap=True, weights_only=True).items():
                    yield path, key, str(tensor.dtype).removeprefix("torch.")
        if found:  # the first kind is read, and the other left alone
            return
